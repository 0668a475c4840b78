"""Quality against arithmetic: what every policy does to a user's own images, rivals included.

moeca quality examples/subjects.py:ditmoe --sampler euler
->  out/quality/: rows.jsonl, quality.json, pareto.png, grid.png and a table with verdicts

Nothing of the backend imports this package, and nothing here is needed to compile a model.

    subject.py      what a user supplies: a model and how to sample with it
    samplers.py     Euler, Heun and ancestral sampling with noise that all candidates share
    candidates.py   one setting to measure, and the settings measured by default
    engine.py       runs one candidate, counts what ran
    metrics.py      distance between two sets of images
    quality.py      models x samplers x candidates x seeds, one row each
    frechet.py      the same question asked of thousands of images
    store.py        rows on disk, one per finished generation, so that a run can go on
    summary.py, verdict.py, table.py, plots.py    from rows to what is shown
"""

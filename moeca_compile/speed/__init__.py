"""What a step costs: eager, Inductor and this backend on one model, in turns, losing rows included.

moeca bench small  ->  out/bench/bench.json, bench.png and two tables

    networks.py        plain PyTorch denoisers whose dispatch is written as published code writes it
    workload.py        a model and the calls of one generation: by name, or from file.py:factory
    candidates.py      the ways to run it
    worker.py          one candidate in a process of its own: compile, time, count
    measure.py         starts workers, lets them take turns
    figures.py         medians, speed-ups by time and by FLOPs, and their ratio
    rows.py            cost of a reuse step against the share computed, and the line through it
    table.py, plots.py, machine.py    what is shown
"""

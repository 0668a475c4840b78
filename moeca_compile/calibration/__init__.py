"""From a target to options: the user's own sampling function decides what is good enough.

moeca_compile.calibrate(model, generate, {"speedup": 3}, save="policy.json")
->  torch.compile(model, backend="moeca", options={"policy_file": "policy.json"})

    calibrate.py      the public function and its result
    target.py         what was asked for, and which of two trade-offs is better
    search_space.py   which options of which policy are tried: one table
    measure.py        one generation with some options: arithmetic and distance
    trials.py         everything measured so far, and the best of it
    search.py         bisection on the one monotone knob, optuna on the others
    time_limit.py     what can still be afforded
    fingerprint.py    what a model is recognised by
    policy_file.py    the JSON file, and why one is refused
    check.py          whether a file belongs to the model that is being compiled

Nothing is imported here: options are read without the search and without optuna.
"""

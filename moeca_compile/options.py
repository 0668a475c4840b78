"""What a user may ask for, validated once, before anything is traced.

torch.compile(model, backend="moeca", options={"intervall": 4})
->  OptionsError: unknown option 'intervall'; did you mean 'interval'? valid: alpha, ...

Options.parse({"interval": 6}, budget=0.1)  ->  Options(interval=6, budget=0.1, ...)  (frozen)
Options().policy                            ->  "auto"; see default_policy

Long, and one file: an option, its documentation and its check are read together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moeca_compile.errors import OptionsError, OptionsTypeError, name_nearest
from moeca_compile.policies import POLICIES
from moeca_compile.policies.predictors import PREDICTIONS

DUMP_DIR_ENV = "MOECA_DUMP_DIR"
SCORES = ("input_drift", "moeca")
ORDERS = ("attention_first", "router_first")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CACHE_DTYPES = ("bfloat16", "float16", "float32")
# Read where rows are reused, and nowhere else.
ROW_OPTIONS = frozenset({
    "alpha", "beta", "budget", "cache_dtype", "lambda_drift", "lambda_share", "order", "score",
    "tau",
})  # fmt: skip


def default_policy(given: Mapping[str, Any]) -> str:
    """The policy where none is named: "auto", which would not look at ROW_OPTIONS nor at `interval`
    but for 1, caching off; whoever gives one of them means the paper's rule, "moeca"."""
    rows = not ROW_OPTIONS.isdisjoint(given) or given.get("interval", 1) != 1
    return "moeca" if rows else "auto"


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of the backend. Wrong name, type or range: `OptionsError`, on construction."""

    policy: str = "auto"
    """What happens between refreshes: "auto", "moeca" (the paper's), "fora", "taylorseer",
    "output_forecast", "teacache", "toca" or "duca". Default "auto"; "moeca" where an option is
    given that only row reuse reads, see `default_policy`. A name, no unit (ours)."""

    interval: int = 4
    """Every `interval`-th step is a refresh; no cached row gets older than `interval - 1` steps.
    1 turns caching off; "auto" reads nothing else of it. Default 4, in steps (paper: refresh every
    N = 4 steps on average)."""

    tau: float = 0.8
    """Base threshold on the layer-normalised score; a matched branch above it is recomputed.
    Default 0.8, no unit (paper: tau0)."""

    alpha: float = 0.6
    """How far an expert's threshold moves with its spatial entropy, in [0, 1].
    Default 0.6, no unit (paper: expert-aware threshold)."""

    beta: float = 0.65
    """Memory of the spatial statistic C, in [0, 1); 0 looks at the current step only.
    Default 0.65, no unit (paper: expert-aware threshold)."""

    lambda_drift: float = 1.0
    """Weight of the router-weight drift in score="moeca". Default 1.0, no unit (paper: l1)."""

    lambda_share: float = 0.6
    """Weight of a branch's share of the output norm in score="moeca".
    Default 0.6, no unit (paper: l2)."""

    score: str = "input_drift"
    """"moeca": the paper's score. "input_drift": router weight x cached output norm x relative
    drift of the expert's input. Read by policy "moeca". Default "input_drift", no unit (paper:
    score; drift is ours)."""

    budget: float | None = None
    """Share of the branches recomputed on a reuse step, in (0, 1]. Default None: the threshold
    rule decides, the count varies (paper: threshold; the budget is ours)."""

    order: str = "router_first"
    """"router_first": the router sees cached attention, as in the paper's synchronisation.
    "attention_first": attention of the most drifted tokens first, needs `budget`.
    Default "router_first", no unit (paper: synchronisation)."""

    tolerance: float | None = None
    """Bound that steers refreshes. "auto", "output_forecast": relative error of the forecast;
    "moeca": predicted relative error of cached branches; None: 0.12 for "auto", a refresh every
    `interval` steps for the others. "teacache": summed relative drift of the first block's input;
    None: 0.1. Default None, no unit (ours)."""

    max_interval: int = 5
    """With a tolerance, the longest distance between refreshes. Default 5, in steps (ours)."""

    forecast_order: int | None = None
    """Order of the polynomial that extrapolates, 0, 1 or 2. Default None: 1; 0 where rows are
    reused ("moeca", "toca": 1 extrapolates cached rows, 2 is refused), always 0 for "fora" and
    "duca". No unit (ours; TaylorSeer's order O)."""

    prediction: str = "output"
    """What is extrapolated to forecast the model's output: "output" itself, "clean" or "noise" of a
    rectified flow, "response" (last output plus a gain times the sample's change), or "auto": what
    was best at the last refresh. Default "output", no unit (ours)."""

    corrector: bool = True
    """Whether a refresh after skipped steps makes up for their error; see policies/output_forecast.
    Default True, no unit (ours)."""

    warmup_steps: int = 0
    """The first steps of a generation that are always refreshed; the very first one always is.
    Default 0, in steps (ours)."""

    timestep: str | None = None
    """Name of the model's timestep argument. Default None: found by its usual names and shape.
    A name, no unit (ours)."""

    cache_dtype: str | None = None
    """"float32", "bfloat16" or "float16": what cached rows are stored in; converted when written
    and read. Default None: the model's own dtype. A name, no unit (ours)."""

    max_cache_bytes: int | None = None
    """Most bytes the caches of one lane may take; layers that do not fit are computed as written.
    Default None: no limit. In bytes (ours)."""

    mode: str | None = None
    """Inductor's mode, as `torch.compile(mode=...)`, which takes no options beside it. Default
    None: none. A name, no unit (ours)."""

    compile_repeats: bool = True
    """Compile blocks that repeat, from three on, once for all of them; see lowering/pieces.py. Not
    with CUDA graphs. False: each variant as one graph. Default True, no unit (ours)."""

    strict: bool = False
    """Raise where the backend would otherwise fall back to plain Inductor and say so.
    Default False, no unit (ours)."""

    dump_dir: str | None = None
    """Folder for graph dumps after every stage. Default None: the environment variable
    MOECA_DUMP_DIR, and none without it. A path, no unit (ours)."""

    policy_file: str | None = None
    """A file that `moeca_compile.calibrate` wrote: its options hold where none are given.
    Default None. A path, no unit (ours)."""

    _given: ClassVar[frozenset[str]] = frozenset()  # names given, per instance
    _in_file: ClassVar[frozenset[str]] = frozenset()  # names the policy file brought, per instance

    def __new__(cls, *args: Any, **kwargs: Any) -> Options:
        _refuse_unknown(kwargs)
        made = super().__new__(cls)
        object.__setattr__(made, "_given", frozenset(kwargs))
        return made

    def __post_init__(self) -> None:
        if self.policy_file is not None:
            self._read_policy_file()
        if not self.policy_named:
            self._set("policy", default_policy(self.given))
        self._choice("policy", POLICIES)
        self._choice("score", SCORES)
        self._choice("order", ORDERS)
        self._choice("prediction", ("auto", *PREDICTIONS))
        self._integer("interval", at_least=1)
        self._integer("warmup_steps", at_least=0)
        self._integer("max_interval", at_least=2)
        if self.cache_dtype is not None:
            self._choice("cache_dtype", CACHE_DTYPES)
        if self.mode is not None:
            self._choice("mode", MODES)
        if self.max_cache_bytes is not None:
            self._integer("max_cache_bytes", at_least=0)
        if self.forecast_order is not None:
            self._integer("forecast_order", at_least=0)
            highest = POLICIES[self.policy].max_order
            if self.forecast_order > highest:
                raise OptionsError(
                    f"option forecast_order: expected None or 0 to {highest} with policy "
                    f"{self.policy!r}, got {self.forecast_order}"
                )
        if self.tolerance is not None:
            self._real("tolerance", "None or a number > 0", lambda v: v > 0)
        self._real("tau", "a finite number >= 0", lambda v: v >= 0)
        self._real("alpha", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        self._real("beta", "a number in [0, 1)", lambda v: 0 <= v < 1)
        self._real("lambda_drift", "a finite number", lambda _: True)
        self._real("lambda_share", "a finite number", lambda _: True)
        if self.budget is not None:
            self._real("budget", "None or a number in (0, 1]", lambda v: 0 < v <= 1)
        self._texts()
        if self.order == "attention_first" and self.budget is None:
            raise OptionsError(
                "option order='attention_first': expected budget to be a number in (0, 1], "
                "got budget=None; set budget or use order='router_first'"
            )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None = None, **extra: Any) -> Options:
        """Options from what `torch.compile(options=...)` passed; `extra` overrides it.

        Raises OptionsError for an unknown name or a bad value, OptionsTypeError for a bad type.
        """
        if options is None:
            return cls(**extra)
        if isinstance(options, Options):
            _refuse_unknown(extra)
            # what was not given stays so: a policy file, or the default policy, decides it
            given = {name: getattr(options, name) for name in options._given}
            return cls(**{**given, **extra})
        if not isinstance(options, Mapping):
            raise OptionsTypeError(
                f"options: expected a mapping, Options or None, got {type(options).__name__}"
            )
        _refuse_unknown(options)
        return cls(**{**options, **extra})

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for by name, here or in the policy file; `Options.parse(o.given) == o`."""
        return {name: getattr(self, name) for name in sorted(self._given | self._in_file)}

    @property
    def policy_named(self) -> bool:
        """Whether somebody chose the policy. Only then is a model without MoE layers cached."""
        return "policy" in self._given | self._in_file

    @property
    def resolved_dump_dir(self) -> Path | None:
        """`dump_dir`, else the environment's MOECA_DUMP_DIR, else None; read at call time."""
        folder = self.dump_dir or os.environ.get(DUMP_DIR_ENV)
        return Path(folder) if folder else None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name; `Options.parse(o.to_dict()) == o`, JSON-serialisable."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """Hex digest of every option that can change a result; the same in every process.

        `dump_dir` is left out: it only decides where text is written; `policy_file` too: what it
        holds is in the other options.
        """
        paths = ("dump_dir", "policy_file")
        fields = {name: value for name, value in self.to_dict().items() if name not in paths}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def _read_policy_file(self) -> None:
        if not isinstance(self.policy_file, (str, os.PathLike)):
            raise _type_error("policy_file", "None or a path", self.policy_file)
        from moeca_compile.calibration.policy_file import load  # most users have none

        self._set("policy_file", os.fspath(self.policy_file))
        options = load(self.policy_file).options
        _refuse_unknown(options)
        self._set("_in_file", frozenset(options))
        for name in options.keys() - self._given:
            self._set(name, options[name])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen: normalised once, in __post_init__ only

    def _choice(self, name: str, valid: Any) -> None:
        value = getattr(self, name)
        if not isinstance(value, str):
            raise _type_error(name, "a string", value)
        if value not in valid:
            raise OptionsError(
                f"option {name}: unknown value {value!r}{name_nearest(value, valid)}"
            )

    def _integer(self, name: str, *, at_least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise _type_error(name, f"an integer >= {at_least}", value)
        if value < at_least:
            raise OptionsError(f"option {name}: expected an integer >= {at_least}, got {value!r}")
        self._set(name, int(value))

    def _real(self, name: str, expected: str, accepts: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _type_error(name, expected, value)
        if not math.isfinite(value) or not accepts(value):
            raise OptionsError(f"option {name}: expected {expected}, got {value!r}")
        self._set(name, float(value))

    def _texts(self) -> None:
        for name in ("strict", "corrector", "compile_repeats"):
            if not isinstance(value := getattr(self, name), bool):
                raise _type_error(name, "True or False", value)
        if self.timestep is not None and not isinstance(self.timestep, str):
            raise _type_error("timestep", "None or an argument's name", self.timestep)
        if self.timestep == "":
            raise OptionsError("option timestep: expected None or an argument's name, got ''")
        if self.dump_dir is not None:
            if not isinstance(self.dump_dir, (str, os.PathLike)):
                raise _type_error("dump_dir", "None or a path", self.dump_dir)
            self._set("dump_dir", os.fspath(self.dump_dir))


def _refuse_unknown(given: Mapping[Any, Any]) -> None:
    valid = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in valid:
            raise OptionsError(f"unknown option {name!r}{name_nearest(name, valid)}")


def _type_error(name: str, expected: str, value: object) -> OptionsTypeError:
    return OptionsTypeError(
        f"option {name}: expected {expected}, got {value!r} of type {type(value).__name__}"
    )

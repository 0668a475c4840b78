"""Find options that reach a target on the user's own samples, and keep them in a file.

result = calibrate(model, generate, {"speedup": 3}, budget_minutes=10, save="policy.json")
print(result)                                    what was reached, also on a seed not searched with
torch.compile(model, backend="moeca", options={"policy_file": "policy.json"})

generate(model, seed) -> Tensor is any sampling function; all its randomness comes from `seed`. It
is run with the model as it is, then with the compiled one in its place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from ..errors import MoecaError, OptionsError, name_nearest
from ..options import Options
from ..torch_compat import compiled_root
from .check import versions
from .fingerprint import fingerprint
from .measure import METRICS, Generate, Measure
from .policy_file import PolicyFile
from .policy_file import save as save_file
from .proposals import require_optuna
from .search import Search
from .search_space import available
from .target import SLACK, Target, Tradeoff, worst
from .time_limit import TimeLimit
from .trials import Trial, Trials

log = logging.getLogger(__name__)
SHOWN = 8


@dataclass(frozen=True)
class CalibrationResult:
    """options: for `torch.compile`. reached: the target on the held-out seed, within 5 %.

    measured: worst over the seeds searched with. held_out: on `held_out_seed`, which the search did
    not see. file: what was or can be saved; path: where, None if it was not. seconds: wall time.
    """

    options: dict[str, Any]
    target: Target
    reached: bool
    measured: Tradeoff
    held_out: Tradeoff
    held_out_seed: int
    trials: tuple[Trial, ...]
    file: PolicyFile
    seconds: float
    path: Path | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the policy file that `options={"policy_file": path}` reads."""
        return save_file(self.file, path)

    def __str__(self) -> str:
        asked = f"target {self.target.name} {self.target.value:g}"
        ending = "reached" if self.reached else "missed"
        rows = [("searched seeds, worst", *_figures(self.measured))]
        rows += [(f"held-out seed {self.held_out_seed}", *_figures(self.held_out))]
        head = f"{asked}: {ending} with {_settings(self.options)}"
        front = [t for t in self.file.trials if t["front"]][:SHOWN]
        return "\n".join([
            f"{head}; {len(self.trials)} settings in {self.seconds:.0f} s",
            tabulate(rows, headers=("", "speed-up", "PSNR dB"), floatfmt=".2f"),
            "trade-offs that no other setting beats:",
            tabulate(
                [(_settings(t["options"]), *_first(t["seeds"]).values()) for t in front],
                headers=("options", "speed-up", "PSNR dB"), floatfmt=".2f",
            ),
        ])  # fmt: skip


def calibrate(
    model: nn.Module,
    generate: Generate,
    target: Mapping[str, float],
    *,
    budget_minutes: float = 10.0,
    seeds: Sequence[int] = (0, 1),
    save: str | os.PathLike[str] | None = None,
    metric: str = "flops",
    policies: Sequence[str] | None = None,
    peak: float | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_trials: int = 100,
    on_trial: Callable[[Trial], None] | None = None,
) -> CalibrationResult:
    """Options of the backend that reach `target` when `generate` samples with the compiled model.

    model: in eval mode. generate(model, seed) -> Tensor, the same for the same seed. target:
    {"speedup": s} with the best PSNR, or {"psnr_db": d} with the best speed-up. seeds: all have to
    reach it; the one after their largest is held out. metric: "flops", counted from what ran, or
    "wall", timed against plain Inductor. policies: names, None for all. peak: span of the values
    for PSNR, None for that of the references. options: fixed ones, e.g. {"timestep": "sigma"}.
    seed: of the search; with time enough the same search gives the same options. Nothing is
    started that would end after `budget_minutes`, but for the first setting and the held-out seed.

    Everything compiled in this process is dropped before and after (torch.compiler.reset()).
    Raises OptionsError for a bad argument, MoecaError if no setting could be run.
    """
    asked, root = Target.parse(target), _checked(model, seeds, metric, budget_minutes)
    spaces = available(policies)
    fixed = {n: v for n, v in (options or {}).items() if n != "policy"}
    Options.parse(fixed)
    require_optuna()
    limit = TimeLimit(60.0 * budget_minutes)
    trials = Trials(asked, list(dict.fromkeys(seeds)))
    with Measure(root, generate, metric, peak, fixed) as measure:
        _check_seeds(measure, trials.seeds)
        search = Search(
            measure, trials, spaces, limit, max_trials, seed, on_trial or (lambda _: None)
        )
        search.run()
        held_out = search.hold_out(max(trials.seeds) + 1)
        peak = measure.peak
    if held_out is None:
        why = next((t.error for t in trials if t.error), "no policy to try")
        raise MoecaError(f"calibrate: no setting could be run on this model: {why}")
    settings = {"metric": metric, "peak": peak, "seed": seed, "budget_minutes": budget_minutes}
    found = _result(root, asked, trials, held_out, {**settings, "seconds": limit.spent}, fixed)
    if not found.reached:
        missed = (asked.name, asked.value, found.held_out_seed, *_figures(found.held_out))
        log.warning(
            "calibrate: target missed: asked for %s %g, on seed %d it is %.2f times at %.1f dB",
            *missed,
        )
    return found if save is None else _saved(found, save)


def _checked(model: Any, seeds: Sequence[int], metric: str, minutes: float) -> nn.Module:
    root = compiled_root(model)
    if root is None:
        raise OptionsError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if root.training:
        raise OptionsError("model: it is in training mode; call model.eval() first")
    if not seeds or any(type(each) is not int for each in seeds):
        raise OptionsError(f"seeds: expected one integer or more, got {seeds!r}")
    if metric not in METRICS:
        raise OptionsError(f"metric: unknown {metric!r}{name_nearest(metric, METRICS)}")
    if not minutes > 0:
        raise OptionsError(f"budget_minutes: expected a number above 0, got {minutes!r}")
    return root


def _check_seeds(measure: Measure, seeds: Sequence[int]) -> None:
    """Raises MoecaError for a `generate` that does not follow its seed, either way."""
    first = measure.reference(seeds[0])
    other = measure.reference(seeds[1] if len(seeds) > 1 else seeds[0] + 1)
    if first.images.shape == other.images.shape and torch.equal(first.images, other.images):
        raise MoecaError(
            "generate(model, seed): two seeds gave the same result; let the seed decide"
        )
    measure.references.pop(seeds[0])
    again = measure.reference(seeds[0])
    if not torch.allclose(first.images, again.images, rtol=1e-3, atol=1e-3):
        raise MoecaError(
            "generate(model, seed): one seed gave two results; draw from the seed only"
        )


def _result(
    root: nn.Module,
    target: Target,
    trials: Trials,
    held_out: tuple[int, Tradeoff, Trial],
    search: dict[str, Any],
    fixed: dict[str, Any],
) -> CalibrationResult:
    unseen, made, best = held_out
    measured = worst([best.made[s] for s in trials.seeds if s in best.made and s != unseen])
    reached = target.reached(made, SLACK)
    front = {id(trial) for trial in trials.front()}
    tried = tuple(trial for trial in trials if trial.made or trial.error)
    chosen = {**fixed, **best.options}
    file = PolicyFile(
        options=chosen,
        model=fingerprint(root),
        target={target.name: target.value},
        reached=reached,
        made_with=versions(),
        search={**search, "seeds": [s for s in trials.seeds if s != unseen]},
        measured={"speedup": measured.speedup, "psnr_db": measured.psnr_db},
        held_out={"seed": unseen, "speedup": made.speedup, "psnr_db": made.psnr_db},
        trials=[{**trial.to_dict(), "front": id(trial) in front} for trial in tried],
    )
    return CalibrationResult(
        chosen, target, reached, measured, made, unseen, tried, file, search["seconds"]
    )


def _saved(found: CalibrationResult, path: str | os.PathLike[str]) -> CalibrationResult:
    return replace(found, path=found.save(path))


def _figures(made: Tradeoff) -> tuple[float, float]:
    return made.speedup, made.psnr_db


def _first(seeds: dict[str, Any]) -> dict[str, Any]:
    return next(iter(seeds.values()))


def _settings(options: Mapping[str, Any]) -> str:
    return " ".join([options["policy"], *(f"{k}={v}" for k, v in options.items() if k != "policy")])

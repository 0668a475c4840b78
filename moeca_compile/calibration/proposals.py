"""Values for the knobs without order, proposed by optuna.

proposals = Proposals(spaces, trials, seed=0)
policy, others = proposals.ask()           "auto", {"max_interval": 8, "prediction": "clean", ...}
proposals.tell(41.2)                       the best that the driver made of them

Tree-structured Parzen estimator (Bergstra et al. 2011), seeded. What was measured before is handed
over first, and the first proposals change one knob of the best setting each: no guesses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MoecaError
from .search_space import Choice, Space
from .trials import Trial, Trials

if TYPE_CHECKING:
    from optuna import Trial as Asked

POLICY = "policy"


class Proposals:
    """One study. Raises MoecaError without optuna."""

    def __init__(self, spaces: dict[str, Space], trials: Trials, seed: int) -> None:
        optuna = require_optuna()
        self._spaces = spaces
        self._fail = optuna.trial.TrialState.FAIL
        spoken = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            optuna.logging.set_verbosity(spoken)
        self._asked: Asked | None = None
        for trial in trials:
            if trial.options[POLICY] in spaces and trial.made:
                self._study.add_trial(self._known(trial, trials.score(trial)))

        best = trials.best()
        if best is not None and best.options[POLICY] in spaces:
            self._ask_neighbours(best)

    def _ask_neighbours(self, best: Trial) -> None:
        """The best setting with the next value of one knob, for each of its knobs."""
        policy = best.options[POLICY]
        others = self._spaces[policy].others
        own = {_name(policy, c): best.options[c.name] for c in others}
        for choice in others:
            at = choice.values.index(best.options[choice.name])
            after = choice.values[(at + 1) % len(choice.values)]
            self._study.enqueue_trial({POLICY: policy, **own, _name(policy, choice): after})

    def ask(self) -> tuple[str, dict[str, Any]]:
        """A policy and a value for each of its knobs but the driver."""
        self._asked = asked = self._study.ask()
        policy = asked.suggest_categorical(POLICY, list(self._spaces))
        others = self._spaces[policy].others
        return policy, {
            c.name: asked.suggest_categorical(_name(policy, c), c.values) for c in others
        }

    def tell(self, score: float | None) -> None:
        """What came of the last proposal; None: it could not be measured."""
        assert self._asked is not None, "ask() comes first"
        if score is None:
            self._study.tell(self._asked, state=self._fail)
        else:
            self._study.tell(self._asked, score)

    def _known(self, trial: Trial, score: float) -> Any:
        optuna = require_optuna()
        kind = optuna.distributions.CategoricalDistribution
        policy = trial.options[POLICY]
        own = {_name(policy, c): (c, trial.options[c.name]) for c in self._spaces[policy].others}
        return optuna.trial.create_trial(
            params={POLICY: policy, **{name: value for name, (_, value) in own.items()}},
            distributions={
                POLICY: kind(list(self._spaces)),
                **{name: kind(choice.values) for name, (choice, _) in own.items()},
            },
            value=score,
        )


def require_optuna() -> Any:
    """The module. Raises MoecaError with what to install."""
    try:
        import optuna
    except ImportError as error:
        raise MoecaError(
            'calibration needs optuna: pip install "moeca-compile[calibrate]"'
        ) from error
    return optuna


def _name(policy: str, choice: Choice) -> str:
    return f"{policy}/{choice.name}"

"""calibrate() on a tiny denoiser: the target holds on seeds that nothing was chosen with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from calibration.sampling import STEPS, denoiser, generate
from moeca_compile import CalibrationResult, MoecaError, OptionsError, calibrate
from moeca_compile.bench.metrics import mean_squared_error, to_psnr
from moeca_compile.calibration.target import SLACK
from moeca_compile.torch_compat import without_kernels

pytestmark = pytest.mark.slow  # minutes of searching
UNSEEN = 17


def run_with_file(path: Path, seeds: list[int], peak: float) -> list[tuple[float, float]]:
    """Speed-up in FLOPs and PSNR per seed as a user gets them, who only has the file."""
    model, found = denoiser(), []
    with torch.no_grad(), without_kernels():
        moeca_compile.prepare(model, generate(model, 0), torch.ones(2), torch.arange(2))
        compiled = torch.compile(model, backend="moeca", options={"policy_file": str(path)})
        for seed in seeds:
            moeca_compile.reset(compiled)
            images = generate(compiled, seed)
            stats = moeca_compile.stats(compiled)
            assert stats.steps == STEPS
            error = mean_squared_error(generate(model, seed), images)
            found.append((stats.speedup_flops, to_psnr(error, peak)))
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> CalibrationResult:
    path = tmp_path_factory.mktemp("fast") / "policy.json"
    return calibrate(
        denoiser(), generate, {"speedup": 2.4}, budget_minutes=30, save=path,
        policies=("auto", "fora"), max_trials=25,
    )  # fmt: skip


def test_speedup_holds_on_seeds_it_did_not_see(fast: CalibrationResult) -> None:
    assert fast.reached and fast.held_out_seed == 2
    assert fast.measured.speedup >= 2.4
    assert fast.held_out.speedup >= 2.4 * (1 - SLACK)
    assert fast.path is not None
    seeds = [UNSEEN, fast.held_out_seed]
    unseen, again = run_with_file(fast.path, seeds, fast.file.search["peak"])
    assert unseen[0] >= 2.4 * (1 - SLACK)
    assert again == pytest.approx((fast.held_out.speedup, fast.held_out.psnr_db), rel=1e-3)


def test_nothing_measured_beats_what_was_chosen(fast: CalibrationResult) -> None:
    able = [t for t in fast.trials if {0, 1} <= t.made.keys()]
    best = max(able, key=lambda t: fast.target.score([t.made[0], t.made[1]]))
    assert fast.options == best.options
    assert len({t.options["policy"] for t in fast.trials}) == 2
    assert any(t.origin == "optuna" for t in fast.trials)


def test_the_file_says_what_was_measured(fast: CalibrationResult) -> None:
    assert fast.path is not None
    data = json.loads(fast.path.read_text())
    assert data["target"] == {"speedup": 2.4} and data["options"] == fast.options
    assert data["held_out"]["seed"] == 2 and data["search"]["seeds"] == [0, 1]
    assert data["made_with"]["torch"] == torch.__version__
    assert len(data["trials"]) == len(fast.trials) and any(t["front"] for t in data["trials"])
    assert "held-out seed 2" in str(fast) and "reached" in str(fast)


def test_psnr_holds_on_seeds_it_did_not_see(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    found = calibrate(
        denoiser(), generate, {"psnr_db": 50}, budget_minutes=30, save=path,
        policies=("fora",), peak=8.0,
    )  # fmt: skip
    assert found.reached and found.measured.psnr_db >= 50 and found.measured.speedup > 1.2
    assert run_with_file(path, [UNSEEN], 8.0)[0][1] >= 50 * (1 - SLACK)


def test_a_target_out_of_reach_is_said_to_be_missed(caplog: pytest.LogCaptureFixture) -> None:
    found = calibrate(
        denoiser(), generate, {"speedup": 500}, budget_minutes=30, policies=("fora",), max_trials=6
    )
    assert not found.reached and "missed" in str(found)
    assert "target missed" in caplog.text
    assert found.measured.speedup == max(t.made[0].speedup for t in found.trials)


def test_same_seed_same_search() -> None:
    def search(seed: int) -> list[dict[str, Any]]:
        found = calibrate(
            denoiser(), generate, {"speedup": 2.4}, budget_minutes=30, policies=("fora",),
            seed=seed, max_trials=7,
        )  # fmt: skip
        return [trial.to_dict() for trial in found.trials]

    first = search(3)
    assert first == search(3)
    assert any(trial["origin"] == "optuna" for trial in first)


def not_seeded(model: Any, seed: int) -> Tensor:
    return generate(model, 0)


def never_the_same(model: Any, seed: int, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(seed)
    return generate(model, len(seen))


def without_model(model: Any, seed: int) -> Tensor:
    return torch.full((2, 3), float(seed))


def two_tensors(model: Any, seed: int) -> Any:
    return generate(model, seed), None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (not_seeded, "two seeds gave the same"),
        (never_the_same, "one seed gave two results"),
        (without_model, "without calling the model"),
        (two_tensors, "expected a Tensor, got tuple"),
    ],
)
def test_a_sampling_function_that_cannot_be_compared(function: Any, message: str) -> None:
    with pytest.raises(MoecaError, match=message):
        calibrate(denoiser(), function, {"speedup": 2}, policies=("fora",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": {}}, "expected"),
        ({"target": {"speedup": 2, "psnr_db": 40}}, "expected"),
        ({"target": {"speed": 2}}, "did you mean 'speedup'"),
        ({"target": {"speedup": 1}}, "above 1"),
        ({"target": {"psnr_db": math.nan}}, "above 0"),
        ({"metric": "time"}, "valid: flops, wall"),
        ({"policies": ["forra"]}, "did you mean 'fora'"),
        ({"seeds": ()}, "one integer or more"),
        ({"budget_minutes": 0}, "above 0"),
        ({"options": {"intervall": 3}}, "did you mean 'interval'"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        calibrate(**{"model": denoiser(), "generate": generate, "target": {"speedup": 2}, **given})


def test_training_mode_and_no_module() -> None:
    with pytest.raises(OptionsError, match="model.eval"):
        calibrate(denoiser().train(), generate, {"speedup": 2})
    with pytest.raises(OptionsError, match="expected a torch.nn.Module"):
        calibrate(generate, generate, {"speedup": 2})  # pyright: ignore[reportArgumentType]


def test_a_model_without_anything_to_cache() -> None:
    model = nn.Linear(4, 4).eval()

    def sample(model: Any, seed: int) -> Tensor:
        return model(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))

    with pytest.raises(MoecaError, match="no setting could be run.*explain"):
        calibrate(model, sample, {"speedup": 2}, policies=("fora",))


@pytest.mark.slow
@pytest.mark.compile
def test_wall_time_is_measured_with_kernels() -> None:
    found = calibrate(
        denoiser(), generate, {"speedup": 1.2}, budget_minutes=30, metric="wall",
        policies=("fora",), max_trials=2, peak=8.0,
    )  # fmt: skip
    made = [trial.made[0] for trial in found.trials]
    assert all(0 < m.speedup < 100 and 20 < m.psnr_db < 100 for m in made)
    assert found.file.search["metric"] == "wall"

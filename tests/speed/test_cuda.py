"""The contracts on a GPU: what a step computes there, that it never waits, and CUDA graphs.

One tiny model, float32 without TF32 where values are compared. benchmarks/gpu.sh measures.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
from moeca_compile.backend import moeca
from moeca_compile.speed.networks import SIZES, Network, build, call
from moeca_compile.speed.workload import Call, trajectory
from moeca_compile.torch_compat import without_kernels

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
from gpu_checks import no_waiting  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
    # Inductor's advice (TF32, online softmax), which differs by device and version
    pytest.mark.filterwarnings("default::UserWarning"),
]
STEPS = 7
MOECA = {"policy": "moeca", "interval": 4, "budget": 0.25, "order": "attention_first"}
OPTIONS = {
    "moeca": MOECA,
    "router_first": MOECA | {"order": "router_first"},
    "threshold": {"policy": "moeca", "interval": 4, "budget": None},
    "fora": {"policy": "fora", "interval": 3},
    "taylorseer": {"policy": "taylorseer", "interval": 3},
    "auto": {"policy": "auto"},
}
GRAPHS = {"mode": "reduce-overhead"}


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32: the CPU has none."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def model() -> Network:
    return build(SIZES["tiny"])


def steps(device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Call]:
    x, t, y = call(SIZES["tiny"], 4, seed=seed)
    calls = trajectory(((x, t, y), {}), x, t, STEPS)
    return [((x.to(device, dtype), t.to(device), y.to(device)), {}) for (x, t, y), _ in calls]


def compiled(model: torch.nn.Module, options: dict[str, Any], device: str) -> Any:
    return torch.compile(copy.deepcopy(model).to(device), backend=moeca, options=options)


@torch.no_grad()
def run(function: Any, calls: list[Call]) -> list[Tensor]:
    """Outputs on the host: CUDA graphs write the next ones to the same place."""
    return [function(*args, **kwargs).float().cpu() for args, kwargs in calls]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_equal_those_of_the_cpu(model: Network, name: str) -> None:
    """Same rows chosen, same values, for a generation and the next one."""
    with without_kernels():
        host = compiled(model, OPTIONS[name], "cpu")
        expected = run(host, steps("cpu")) + run(host, steps("cpu", seed=2))
    device = compiled(model, OPTIONS[name], "cuda")
    found = run(device, steps("cuda")) + run(device, steps("cuda", seed=2))
    assert off(found, expected) < 1e-3
    told, wanted = moeca_compile.stats(device), moeca_compile.stats(host)
    assert told.refresh_steps == wanted.refresh_steps < 2 * STEPS
    assert told.reuse_steps == wanted.reuse_steps and told.skip_steps == wanted.skip_steps


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.bfloat16) for n in ("moeca", "router_first", "threshold", "fora", "auto")]
    + [("moeca", torch.float32)],  # whose products read sizes on the host: graphs around them
    ids=str,
)
def test_cuda_graphs_change_nothing(model: Network, name: str, dtype: torch.dtype) -> None:
    placed = copy.deepcopy(model).to(dtype)
    plain, replayed = (compiled(placed, OPTIONS[name] | extra, "cuda") for extra in ({}, GRAPHS))
    for seed in (1, 2, 1):
        expected = run(plain, steps("cuda", dtype, seed))
        found = run(replayed, steps("cuda", dtype, seed))
        assert off(found, expected) < (1e-3 if dtype == torch.float32 else 8e-2)
    told, wanted = moeca_compile.stats(replayed), moeca_compile.stats(plain)
    assert told.speedup_flops == pytest.approx(wanted.speedup_flops, rel=0.05)
    assert told.speedup_flops > 1


@pytest.mark.parametrize(
    ("name", "extra"),
    [(n, {}) for n in ("moeca", "router_first", "fora", "taylorseer", "auto")]
    + [(n, GRAPHS) for n in ("moeca", "auto")],
    ids=str,
)
def test_no_step_waits_for_the_device(model: Network, name: str, extra: dict[str, Any]) -> None:
    made = compiled(copy.deepcopy(model).bfloat16(), OPTIONS[name] | extra, "cuda")
    calls = steps("cuda", torch.bfloat16)
    run(made, calls)  # compiles, which waits
    expected = run(made, calls)
    with no_waiting(made):
        found = run(made, calls)
    assert off(found, expected) < 1e-3


def test_a_read_of_the_data_is_noticed(model: Network) -> None:
    """What `no_waiting` finds: the threshold rule asks how many branches passed."""
    made = compiled(copy.deepcopy(model).bfloat16(), OPTIONS["threshold"], "cuda")
    calls = steps("cuda", torch.bfloat16)
    run(made, calls)
    with no_waiting(made), pytest.raises(RuntimeError, match="synchronizing"):
        run(made, calls)


@pytest.mark.parametrize("extra", [{}, GRAPHS], ids=["kernels", "cuda-graphs"])
def test_two_conditionings_keep_rows_of_their_own(model: Network, extra: dict[str, Any]) -> None:
    """Guidance as two calls a step: two lanes, whose caches lie elsewhere."""
    placed = copy.deepcopy(model)
    first, second = steps("cuda", seed=1), steps("cuda", seed=2)
    made = compiled(placed, MOECA | extra, "cuda")
    for calls in (first, second):
        run(made, calls)
    alone = [run(made, calls) for calls in (first, second)]
    moeca_compile.reset(made)
    found = [run(made, list(pair)) for pair in zip(first, second, strict=True)]
    assert moeca_compile.stats(made).lanes == 2
    assert off([a for a, _ in found], alone[0]) < 1e-3
    assert off([b for _, b in found], alone[1]) < 1e-3


@pytest.mark.parametrize("extra", [{}, GRAPHS], ids=["kernels", "cuda-graphs"])
def test_weights_edited_between_steps_are_used(model: Network, extra: dict[str, Any]) -> None:
    """Stacked copies of the experts' weights follow them."""
    placed = copy.deepcopy(model).bfloat16().cuda()
    made = torch.compile(placed, backend=moeca, options=MOECA | extra)
    calls = steps("cuda", torch.bfloat16)
    run(made, calls)
    run(made, calls)
    with torch.no_grad():
        for block in placed.blocks:
            for expert in block.mlp.experts:  # type: ignore[union-attr]
                expert.down.weight.mul_(-2)
    expected = run(placed, calls[:1])
    assert off(run(made, calls[4:])[:1], run(placed, calls[4:5])) < 4e-2
    assert off(run(made, calls)[:1], expected) < 4e-2


def test_half_precision_is_within_its_rounding(model: Network) -> None:
    exact = run(model, steps("cpu"))
    half = compiled(copy.deepcopy(model).bfloat16(), MOECA, "cuda")
    run(half, steps("cuda", torch.bfloat16))
    found = run(half, steps("cuda", torch.bfloat16))
    assert off(found[:1], exact[:1]) < 4e-2
    assert off(found, exact) < 0.5  # reuse is an approximation; NaN and stale rows are not

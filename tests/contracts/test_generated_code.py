"""A reuse step never scales with all rows where it need not: what Inductor's output code says.

No scatter on a cache, no copy of a cache, rows computed sized by the run-time count.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from graph_runs import compile_model, only_entry
from idioms import make, trajectory

TOKENS = 32  # 2 samples x 16


EXTRAPOLATED = {"order": "router_first", "forecast_order": 1, "tolerance": 1.0, "max_interval": 4}


@pytest.fixture(
    scope="module",
    params=[
        {"order": "router_first"},
        pytest.param({"order": "attention_first"}, marks=pytest.mark.slow),
        pytest.param(EXTRAPOLATED, marks=pytest.mark.slow),
    ],
    ids=["router_first", "attention_first", "extrapolated"],
)
def reuse_code(request: pytest.FixtureRequest) -> tuple[str, dict[str, tuple[int, ...]]]:
    """(the `call` function Inductor generates for a reuse step, shapes of the row caches)."""
    torch._dynamo.reset()
    model = make("split", attention="sdpa", dim=32, depth=1, tokens=16, expert="swiglu")
    calls = trajectory(model, 2, dx=0.05)
    options = {"policy": "moeca", "interval": 4, "budget": 0.25, **request.param}
    compiled = compile_model(model, calls[0], **options)
    # Without its caches Inductor generates; run_and_get_code starts with a Dynamo reset.
    no_graph_cache = torch._inductor.config.patch(fx_graph_cache=False)
    no_autograd_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), no_graph_cache, no_autograd_cache:
        _, codes = run_and_get_code(lambda: [compiled(*call) for call in calls])
    plan = only_entry(compiled).variants.analysis.plan
    code = codes[-1]  # refresh, then reuse
    return code[code.index("def call(") :], {
        s.name: s.shape for s in plan.layout.specs if s.name in plan.scratch
    }


@pytest.mark.compile
def test_no_cache_is_copied_or_scattered_into(reuse_code: tuple) -> None:
    code, caches = reuse_code
    assert "index_copy" in code and "grouped_linear" in code  # it is the reuse graph
    assert "aten.scatter" not in code and "aten.index_copy" not in code
    # A copied cache would be a buffer of the cache's own size, scratch row included.
    allocated = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = {tuple(int(n) for n in text.split(",") if n.strip()) for text in allocated}
    assert sizes
    assert not {name: shape for name, shape in caches.items() if shape in sizes}


@pytest.mark.compile
def test_matrix_products_run_on_selected_rows(reuse_code: tuple) -> None:
    """Products of token rows have a run-time number of rows; router, embedding, head see all."""
    code, _ = reuse_code
    rows = dict(re.findall(r"(\w+) = empty_strided_cpu\(\(([^,()]+),", code))
    products = re.findall(r"extern_kernels\.(?:addmm|mm)\(.*out=(\w+)\)", code)
    sizes = [rows[out] for out in products if out in rows]
    selected = [s for s in sizes if re.search(r"u\d+", s)]
    # qkv, projection, and the shared expert's two products; experts go through grouped_linear
    assert len(selected) >= 3, sizes  # a buffer may be used twice
    assert sizes.count(str(TOKENS)) <= 3, sizes

"""Code that matches nothing, and other backends beside this one: nothing changes for either."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moeca_compile
from contracts.generations import difference
from moeca_compile.torch_compat import without_kernels

SCRIPT = '''
import torch
from torch import nn


class Strange(nn.Module):
    """Expert halves swapped by a number that is read on the host: no idiom known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

    def swap_halves(self, x):
        cut = int(x.abs().sum().item()) % 7 + 1
        return torch.cat([self.second(x[cut:]), self.first(x[:cut])])

    def forward(self, x, t):
        return self.last(self.swap_halves(x + t)).tanh()
'''

BESIDE = """
import sys
import torch

sys.path[:0] = [{tests!r}, {root!r}]
from idioms import inputs, make


def graphs_of(model):
    seen = []

    def backend(gm, values):
        seen.append(gm.print_readable(print_output=False))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for _ in range(2):
            torch.compile(model, backend=backend)(*inputs(model))
    return seen


def built():
    return make("I2_stacked", depth=1, num_experts=4)


before = graphs_of(built())
assert "moeca_compile" not in sys.modules
import moeca_compile

imported = graphs_of(built())
captured = built()
report = moeca_compile.prepare(captured, *inputs(captured))
assert report.installed == 1
beside, itself = graphs_of(built()), graphs_of(captured)
assert len(before) > 1 and before == imported == beside
assert [g.count("moeca") for g in itself] == [0] * len(itself)
print("equal", len(before))
"""


@pytest.fixture
def script(tmp_path: Path) -> ModuleType:
    path = tmp_path / "strange_script.py"
    path.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strange(script: ModuleType) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    model = script.Strange().eval().requires_grad_(False)
    return model, (torch.randn(9, 8), torch.tensor(0.5))


def test_explain_names_the_function_that_broke_the_graph(script: ModuleType) -> None:
    model, call = strange(script)
    report = moeca_compile.explain(model, *call)
    assert report.regions == () and not report.matched
    assert report.graph_breaks >= 1
    assert any("strange_script.py:15 in swap_halves" in reason for reason in report.break_reasons)
    assert "swap_halves" in str(report)


def test_it_runs_in_fragments_with_equal_numbers(script: ModuleType) -> None:
    model, call = strange(script)
    compiled = torch.compile(model, backend="moeca")
    with torch.no_grad(), without_kernels():
        for step in range(3):
            moved = (call[0] + 0.3 * step, call[1] - 0.1 * step)
            assert difference(compiled(*moved), model, *moved) <= 1e-6
    assert moeca_compile.stats(compiled).steps == 0  # nothing cached, nothing counted


@pytest.mark.slow
@pytest.mark.compile
def test_it_runs_as_plain_inductor(script: ModuleType) -> None:
    model, call = strange(script)
    compiled = torch.compile(model, backend="moeca")
    with torch.no_grad():
        for _ in range(2):
            assert difference(compiled(*call), model, *call) <= 1e-5


@pytest.mark.slow  # test_backend.py has it in this process
def test_other_backends_see_the_same_graphs(tmp_path: Path) -> None:
    """In a process of its own: before this package is imported, after, beside a captured model."""
    tests = Path(__file__).parents[1]
    path = tmp_path / "beside.py"
    path.write_text(BESIDE.format(tests=str(tests), root=str(tests.parent)))
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("equal")

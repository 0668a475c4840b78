"""The private names of torch behave as `torch_compat` says; run this on every new release."""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import sizevars
from torch._inductor.codegen import cpp

from capture.harness import capturing, plain
from moeca_compile.capture.activity import compiling_for_moeca, is_marked_backend
from moeca_compile.torch_compat import (
    c_library,
    compile_call,
    compiling_with,
    on_call_end,
    remembered_indices,
    trace_no_more,
    traced_frame,
)


def doubled_if_active(x: Tensor) -> Tensor:
    return x * 2 if compiling_for_moeca() else x


def test_probe_is_a_constant_of_the_compiling_backend() -> None:
    x = torch.ones(3)
    for make, factor in ((capturing, 2.0), (plain, 1.0), (capturing, 2.0)):
        counter, backend = make()
        run = torch.compile(doubled_if_active, backend=backend, fullgraph=True)
        assert torch.equal(run(x), x * factor)
        assert torch.equal(run(x), x * factor)
    assert torch.equal(doubled_if_active(x), x)


def test_compiling_with_is_false_outside_a_trace() -> None:
    assert compiling_with(lambda _: True) is False


def test_marked_backend_is_found_through_wrappers() -> None:
    _, backend = capturing()

    @functools.wraps(backend)
    def wrapped(*args: Any) -> Any:
        return backend(*args)

    class Wrapper:
        compiler_fn = staticmethod(functools.partial(wrapped, mode="x"))

    assert is_marked_backend(Wrapper())
    assert not is_marked_backend(plain()[1])
    assert not is_marked_backend(None)


def test_call_and_frame_seen_from_inside() -> None:
    seen: list[Any] = []
    ended: list[str] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        seen.append(traced_frame())

        def run(*args: Any) -> Any:
            call = compile_call()
            assert call is not None
            seen.append((call.function, call.args))
            assert on_call_end(call, lambda: ended.append("end"))
            ended.append("run")
            return gm.forward(*args)

        return run

    def function(x: Tensor) -> Tensor:
        return x + 1

    x = torch.ones(2)
    torch.compile(function, backend=backend)(x)
    frame, (called, args) = seen
    assert frame.code is function.__code__ and frame.breaks is False
    assert called is function and args[0] is x
    assert ended == ["run", "end"]
    assert traced_frame() is None and compile_call() is None


def test_a_break_is_visible_to_the_backend() -> None:
    frames: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        frames.append(traced_frame())
        return gm.forward

    def function(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(function, backend=backend)(torch.ones(2))
    assert [frame.breaks for frame in frames] == [True, False]
    assert "test_torch_compat.py" in frames[0].reason
    assert frames[1].code is not function.__code__


def test_the_rest_of_a_call_runs_as_it_is_and_is_traced_by_the_next() -> None:
    compiled: list[str] = []
    pause = [True]

    def backend(gm: Any, example_inputs: Any) -> Any:
        frame = traced_frame()
        assert frame is not None
        compiled.append(frame.code.co_name.split("_at_")[0])

        def run(*args: Any) -> Any:
            if pause:
                call = compile_call()
                assert call is not None and trace_no_more(call)
                pause.pop()
            return gm.forward(*args)

        return run

    def inner(x: Tensor) -> Tensor:
        return x * 3

    def function(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return inner(x) - 1

    x = torch.ones(2)
    run = torch.compile(function, backend=backend)
    assert torch.equal(run(x), x * 5) and compiled == ["function"]
    assert torch.equal(run(x), x * 5)
    assert compiled == ["function", "torch_dynamo_resume_in_function"]
    assert torch.equal(run(x), x * 5) and len(compiled) == 2


def test_indices_are_remembered_inside_only() -> None:
    names = ("simplify_index_in_vec_range", "stride_at_vec_range")
    before = [getattr(sizevars, name) for name in names]
    rows, column = sympy.symbols("u0 x1", integer=True, positive=True)
    with remembered_indices():
        wide = [getattr(sizevars, name) for name in names]
        assert cpp.stride_at_vec_range is wide[1]
        for old, new in zip(before, wide, strict=True):
            assert new.cache_info().maxsize > old.cache_info().maxsize
            assert new(384 * rows + 2 * column, column, 8) == old(
                384 * rows + 2 * column, column, 8
            )
        hits = wide[1].cache_info().hits
        wide[1](384 * rows + 2 * column, column, 8)
        assert wide[1].cache_info().hits == hits + 1
    assert [getattr(sizevars, name) for name in names] == before
    assert cpp.stride_at_vec_range is before[1]
    with remembered_indices():  # what was found is still known
        assert [getattr(sizevars, name) for name in names] == wide


def test_c_source_becomes_a_library() -> None:
    source = 'extern "C" int twice(int number) { return 2 * number; }'
    assert c_library(source).twice(21) == 42

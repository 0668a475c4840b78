"""Running one expert's body, given as text, on the rows of one expert after another.

values   x [R, D], W [2F, D], V [D, F]                 values 0, 1, 2; each line makes one
program  [["linear.default", ["%0", "%1"], {}],        3: gate_up [R, 2F]
          ["chunk.default", ["%3", 2, -1], {}], ...]   graph/expert_program.py writes it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import Tensor

GETITEM = "getitem"  # one of several results; every other name is that of an ATen overload
Line = tuple[str, tuple[Any, ...], dict[str, Any]]


@cache
def parsed(program: str) -> tuple[Line, ...]:
    """(op, arguments, keyword arguments) of each line; an argument "%3" is value number 3."""
    return tuple((op, tuple(args), kwargs) for op, args, kwargs in json.loads(program))


@cache
def runner(program: str) -> Callable[[list[Any]], Tensor]:
    """A function of the body's inputs, as a list which it appends to."""
    steps = [
        (_op(op), [_number(a) for a in args], args, kwargs) for op, args, kwargs in parsed(program)
    ]

    def run(values: list[Any]) -> Tensor:
        for op, numbers, args, kwargs in steps:
            given = [a if n is None else values[n] for n, a in zip(numbers, args, strict=True)]
            values.append(op(*given, **kwargs))
        return values[-1]

    return run


def run_grouped(
    program: str,
    rows: Sequence[Tensor],
    index: Tensor,
    ends: Sequence[int],
    banks: Sequence[Sequence[Tensor] | Tensor],
    width: int,
) -> Tensor:
    """Row r of the result is the expert's output for row `index[r]` of `rows`; zero past the end.

    rows: each [T, D]; index: [R], sorted by expert; ends: where each expert's part of it ends;
    banks: for each parameter one tensor per expert, or all stacked. Returns [R, width].
    """
    run = runner(program)
    out = rows[0].new_empty(index.shape[0], width)
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            part = index[start:end]
            own: list[Any] = [r.index_select(0, part) for r in rows]
            out[start:end] = run(own + [bank[expert] for bank in banks])
        start = max(start, end)
    out[start:].zero_()
    return out


def program_flops(program: str, rows: int, inputs: int, shapes: Sequence[Sequence[int]]) -> int:
    """FLOPs of the products on `rows` rows; shapes: those of one expert's parameters."""
    sizes = {f"%{inputs + i}": _numel(shape) for i, shape in enumerate(shapes)}
    total = 0
    for number, (op, args, _) in enumerate(parsed(program), start=inputs + len(shapes)):
        if op in ("t.default", "transpose.int"):
            sizes[f"%{number}"] = sizes[args[0]]
        elif op in ("linear.default", "matmul.default", "mm.default"):
            total += 2 * rows * sizes[args[1]]
    return total


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _number(argument: Any) -> int | None:
    named = isinstance(argument, str) and argument.startswith("%")
    return int(argument[1:]) if named else None


def _op(name: str) -> Callable[..., Any]:
    if name == GETITEM:
        return getitem
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)

"""The canonical dispatch: what a recognised MoE computes, written so that Dynamo can trace it.

    before:  loop over experts with host-side sizes
    after:   y_e  = experts[e](moeca.expert_rows(x [T, Din], e), ...)         e = 0 .. E-1
             rows = moeca.select_experts(ids [T, K], [y_0 ..])                [T, K, D]
             out  = (rows * w [T, K, 1]).sum(1), or rows themselves           original layout

A plan holds names only, no tensor and no module, so one plan serves every copy of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops as _ops  # noqa: F401  registers the marker ops
from .expert_template import ExpertTemplate

ROWS = "rows"
VALUE = "value"
CONSTANT = "constant"


@dataclass(frozen=True)
class Argument:
    """Where one expert argument comes from.

    rows: local `name`, one row a token, its first `flatten` dims are the tokens.
    value: local `name` as it is. constant: the Python constant `constant`.
    """

    kind: str
    name: str = ""
    flatten: int = 1
    constant: object = None


@dataclass(frozen=True)
class DispatchPlan:
    """One dispatch in terms of the local names of the function that holds it.

    ids: integers, slots_first False: [.., K] or flat [T*K]; True: [K, T] or flat [K*T].
    combine: "none" (branches), "sum" or "weighted"; weights: [T*K] in ids' order, or dense [T, E].
    layout: shape of the result, see `arrange`. accumulate: add to local `target`'s old value.
    dtype_name: local whose dtype the result has, "" to keep what the arithmetic gives.
    template: how to run an expert that is a slice of parameters; None if experts are modules.
    """

    bank_path: tuple[str, ...]
    experts: int
    slots: int
    ids: str
    slots_first: bool
    positional: tuple[Argument, ...]
    keyword: tuple[tuple[str, Argument], ...]
    combine: str
    weights: str
    dense_weights: bool
    layout: str
    accumulate: str
    dtype_name: str
    template: ExpertTemplate | None = None

    @property
    def rows_argument(self) -> Argument:
        """The argument that carries the token rows."""
        arguments = (*self.positional, *(argument for _, argument in self.keyword))
        return next(argument for argument in arguments if argument.kind == ROWS)


def run_plan(plan: DispatchPlan, module: nn.Module, values: Mapping[str, Any]) -> Tensor:
    """Evaluate `plan` with `module` as its owner; `values` maps local names to values.

    Raises ValueError when the bank or the shapes no longer are what was recognised.
    """
    branches = run_branches(plan, module, values)
    return finish_plan(plan, branches, values)


def run_branches(plan: DispatchPlan, module: nn.Module, values: Mapping[str, Any]) -> Tensor:
    """The rows the experts chosen for each token return: [T, K, D].

    Traced, every expert is called on all rows; called in a check, on some that were not for it.
    """
    container = module
    for name in plan.bank_path:
        container = getattr(container, name)
    experts = _experts(plan, container)
    ids = _by_token(values[plan.ids], plan)
    rows = plan.rows_argument
    if _rows(values[rows.name], rows).shape[0] != ids.shape[0]:
        raise ValueError(f"'{plan.ids}' does not hold {plan.slots} experts a token: capture again")
    # Dynamo traces every call and comprehension of this loop again for each expert of each layer
    args = [_argument(argument, values) for argument in plan.positional]
    kwargs = {name: _argument(argument, values) for name, argument in plan.keyword}
    by_place = [(i, args[i]) for i, a in enumerate(plan.positional) if a.kind == ROWS]
    by_name = [(name, kwargs[name]) for name, a in plan.keyword if a.kind == ROWS]
    tracing = torch.compiler.is_compiling()
    outputs = []
    for index, expert in enumerate(experts):
        some = None if tracing else _some_rows(ids, index)
        for place, tokens in by_place:
            args[place] = _marked(tokens, index) if some is None else tokens[some]
        for name, tokens in by_name:
            kwargs[name] = _marked(tokens, index) if some is None else tokens[some]
        output = expert(*args, **kwargs)
        outputs.append(output if some is None else _spread(output, some, ids.shape[0]))
    return torch.ops.moeca.select_experts(ids, outputs)


_marked = torch.ops.moeca.expert_rows.default
_EVERY = 8  # one row of so many is given to every expert in a check, chosen or not


def _some_rows(ids: Tensor, expert: int) -> Tensor:
    """Rows to check an expert on: those it was chosen for, and others as in a trace, where it gets
    all rows. All of them would cost experts / slots times what the dispatch costs."""
    chosen = (ids == expert).any(1)
    chosen[::_EVERY] = True
    return chosen.nonzero().squeeze(1)


def _spread(output: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """[tokens, ..] that holds `output` at its rows; the others are not read."""
    return output.new_zeros(tokens, *output.shape[1:]).index_copy(0, rows, output)


def _experts(plan: DispatchPlan, container: nn.Module) -> list[Callable[..., Any]]:
    if plan.template is not None:
        return plan.template.experts(container)
    experts: list[Callable[..., Any]] = [e for e in container._modules.values() if e is not None]
    if len(experts) != plan.experts:
        raise ValueError(f"captured {plan.experts} experts, found {len(experts)}: capture again")
    return experts


def finish_plan(plan: DispatchPlan, branches: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Weigh, sum and lay out branches [T, K, D] as the original did."""
    result = branches
    if plan.combine == "weighted":
        result = branches * token_weights(plan, values).unsqueeze(-1)
    if plan.dtype_name:
        result = result.to(values[plan.dtype_name].dtype)
    if plan.combine != "none":
        result = result.sum(1)
    result = arrange(plan.layout, result, values[plan.rows_argument.name], plan.rows_argument)
    return values[plan.accumulate] + result if plan.accumulate else result


def token_weights(plan: DispatchPlan, values: Mapping[str, Any]) -> Tensor:
    """Router weights [T, K]."""
    weights = values[plan.weights]
    if plan.dense_weights:
        return weights.reshape(-1, plan.experts).gather(1, _by_token(values[plan.ids], plan).long())
    return _by_token(weights, plan)


def arrange(layout: str, result: Tensor, source: Tensor, argument: Argument) -> Tensor:
    """Give [T, D] or [T, K, D] the original's shape.

    flat: leave it; merged: [T*K, D]; lead: the leading dims of the rows' source instead of T.
    """
    if layout == "merged":
        return result.flatten(0, 1)
    if layout == "lead":
        return result.unflatten(0, source.shape[: argument.flatten])
    return result


def _by_token(value: Tensor, plan: DispatchPlan) -> Tensor:
    if plan.slots_first:
        return value.reshape(plan.slots, -1).t()
    return value.reshape(-1, plan.slots)


def _rows(value: Tensor, argument: Argument) -> Tensor:
    return value if argument.flatten == 1 else value.flatten(0, argument.flatten - 1)


def _argument(argument: Argument, values: Mapping[str, Any]) -> Any:
    """What every expert gets, one row a token where each is to mark it as its own."""
    if argument.kind == CONSTANT:
        return argument.constant
    value = values[argument.name]
    return _rows(value, argument) if argument.kind == ROWS else value

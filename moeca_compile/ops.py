"""The `moeca::` dialect: schema, fake implementation and semantics of each op.

Trace form: two marker ops make any dispatch visible in one graph.

A captured dispatch calls every expert on all rows and selects, so the traced graph is branch-free
and correct for any reader; `normalize_experts` then replaces the dense form by a grouped one that
computes only the routed rows.

    before:  Python loop over experts, sizes read on the host (not traceable)
    after:   y_e  = expert_e(moeca.expert_rows(x [T, D], e))          for every e in range(E)
             rows = moeca.select_experts(ids [T, K], [y_0 .. y_{E-1}])  -> [T, K, D]
             out  = (rows * weights[..., None]).sum(1)

Cache form: `cache_read`, `cache_write`, `cache_fill`, `expert_thresholds` and `guard_branches` are
what `insert_cache` puts around regions; lowering replaces them by ops that Inductor fuses.
`grouped_linear`, `grouped_experts`, `few_rows_linear` and `few_queries_attention` stay ops: how
many rows there are is known only at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lowering import few_queries, few_rows, guards
from .lowering.expert_programs import run_grouped


@torch.library.custom_op("moeca::expert_rows", mutates_args=())
def expert_rows(rows: Tensor, expert: int) -> Tensor:
    """Mark `rows [T, ...]` as what expert number `expert` is called on; values are unchanged."""
    return rows.clone()


@expert_rows.register_fake
def _(rows: Tensor, expert: int) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("moeca::select_experts", mutates_args=())
def select_experts(ids: Tensor, outs: list[Tensor]) -> Tensor:
    """Pick, for every (token, slot), the row of the expert the router chose.

    ids: [T, K] integers in [0, E); outs: E tensors [T, D]. Returns [T, K, D] in the dtype of outs.
    """
    stacked = torch.stack(outs, 1)  # [T, E, D]
    return stacked.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, stacked.shape[-1]))


@select_experts.register_fake
def _(ids: Tensor, outs: list[Tensor]) -> Tensor:
    return outs[0].new_empty(ids.shape[0], ids.shape[1], outs[0].shape[-1])


HOST_READ = (torch.Tag.cudagraph_unsafe,)  # lowering/variants.py makes no CUDA graph with it
_library = torch.library.Library("moeca", "FRAGMENT")


def _define(function: Callable[..., Tensor], tags: Sequence[torch.Tag] = ()) -> None:
    """Define `moeca::<name>` as `torch.library.custom_op` does for a function that changes nothing,
    without what that does around every call: 40 microseconds, for ops that a step calls often."""
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=tags)
    _library.impl(name, function, "CompositeExplicitAutograd")


def grouped_linear(
    rows: Tensor, ends: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """Per-expert linear over rows sorted by expert: `out[r] = W_e rows[r] + b_e`.

    rows: [R, I]; ends: [E], where each expert's rows end (rows past the last end are padding, their
    output is zero); weights: E tensors [O, I] or one [E, O, I]; biases: none, E tensors [O] or one
    [E, O]. Reads `ends` on the host: free on a CPU, one synchronisation on a GPU.
    """
    stacked = len(weights) == 1 and weights[0].dim() == 3
    bank = weights[0] if stacked else weights
    shift = biases[0] if biases and stacked else biases
    out = rows.new_empty(rows.shape[0], bank[0].shape[0])
    if few_rows.products(rows, ends, tuple(bank), tuple(shift), out):
        out[int(ends[-1]) :].zero_()
        return out
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            part, weight = rows[start:end], bank[expert].t()
            if not len(shift):
                torch.mm(part, weight, out=out[start:end])
            else:
                torch.addmm(shift[expert], part, weight, out=out[start:end])
        start = end
    out[start:].zero_()
    return out


_define(grouped_linear, HOST_READ)


@torch.library.register_fake("moeca::grouped_linear")
def _(rows: Tensor, ends: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[-2])


def few_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of few rows, or of as many as are known at run time only, by what suits them.

    rows: [..., I]; weight: [O, I]; bias: [O] or None. Returns [..., O].
    """
    out = few_rows.product(rows, weight, bias)
    return torch.nn.functional.linear(rows, weight, bias) if out is None else out


_define(few_rows_linear)


@torch.library.register_fake("moeca::few_rows_linear")
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention` of queries whose number is known at run time only.

    q: [B, H, L, D]; k: [B, H, S, D]; v: [B, H, S, W]; scale: None for 1 / sqrt(D). Returns
    [B, H, L, W], in memory [B, L, H, W].
    """
    out = few_queries.attention(q, k, v, scale)
    if out is None:
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out = found.transpose(1, 2).contiguous().transpose(1, 2)
    return out


_define(few_queries_attention)


@torch.library.register_fake("moeca::few_queries_attention")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


def grouped_experts(
    rows: list[Tensor],
    index: Tensor,
    ends: Tensor,
    params: list[Tensor],
    counts: list[int],
    program: str,
    width: int,
) -> Tensor:
    """Outputs [R, width] of whole experts for the rows `index [R]`, which is sorted by expert.

    rows: each [T, D]; ends: [E] as in `grouped_linear`; params: for each parameter E tensors, or
    one stacked [E, ...] where `counts` says 1; program: one expert's body, see
    `lowering.expert_programs`. Runs on a CPU, where `ends` is read for free.
    """
    banks: list[Any] = []
    given = iter(params)
    for count in counts:
        bank = [next(given) for _ in range(count)]
        banks.append(bank[0] if count == 1 else bank)
    return run_grouped(program, rows, index, ends.tolist(), banks, width)


_define(grouped_experts, HOST_READ)


@torch.library.register_fake("moeca::grouped_experts")
def _(
    rows: list[Tensor],
    index: Tensor,
    ends: Tensor,
    params: list[Tensor],
    counts: list[int],
    program: str,
    width: int,
) -> Tensor:
    return rows[0].new_empty(index.shape[0], width)


@torch.library.custom_op("moeca::cache_read", mutates_args=())
def cache_read(cache: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of a row cache [rows + 1, ...]; the last row takes padding writes."""
    return cache[:rows].clone()


@cache_read.register_fake
def _(cache: Tensor, rows: int) -> Tensor:
    return cache.new_empty(rows, *cache.shape[1:])


@torch.library.custom_op("moeca::cache_write", mutates_args=("cache",))
def cache_write(cache: Tensor, index: Tensor, rows: Tensor) -> None:
    """Overwrite row `index[i]` of the cache by `rows[i]`, in its dtype; cost O(len(index))."""
    cache.index_copy_(0, index, rows.to(cache.dtype))


@cache_write.register_fake
def _(cache: Tensor, index: Tensor, rows: Tensor) -> None:
    return None


@torch.library.custom_op("moeca::cache_fill", mutates_args=("cache",))
def cache_fill(cache: Tensor, rows: Tensor) -> None:
    """Overwrite the first `len(rows)` rows of the cache (refresh, or small per-slot state)."""
    cache[: rows.shape[0]].copy_(rows)


@cache_fill.register_fake
def _(cache: Tensor, rows: Tensor) -> None:
    return None


@torch.library.custom_op("moeca::expert_thresholds", mutates_args=())
def expert_thresholds(
    spatial: Tensor, ids: Tensor, tau: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """New spatial statistic [E, N] and thresholds [E]; see `lowering.guards.expert_thresholds`."""
    return guards.expert_thresholds(spatial, ids, tau, alpha, beta)


@expert_thresholds.register_fake
def _(spatial: Tensor, ids: Tensor, tau: float, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(spatial), spatial.new_empty(spatial.shape[0])


@torch.library.custom_op("moeca::guard_branches", mutates_args=())
def guard_branches(
    ids: Tensor,
    weights: Tensor,
    slot_ids: Tensor,
    slot_weight: Tensor,
    slot_norm: Tensor,
    drift: Tensor,
    thresholds: Tensor,
    samples: int,
    count: int | None,
    score: str,
    lambda_drift: float,
    lambda_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which branches to compute, in slot order; see `lowering.guards.guard_branches`."""
    return guards.guard_branches(
        ids, weights, slot_ids, slot_weight, slot_norm, drift, thresholds,
        samples, count, score, lambda_drift, lambda_share,
    )  # fmt: skip


@guard_branches.register_fake
def _(
    ids: Tensor,
    weights: Tensor,
    slot_ids: Tensor,
    slot_weight: Tensor,
    slot_norm: Tensor,
    drift: Tensor,
    thresholds: Tensor,
    samples: int,
    count: int | None,
    score: str,
    lambda_drift: float,
    lambda_share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = torch.empty_like(slot_ids, dtype=torch.bool)
    share = torch.empty_like(slot_weight)
    now = torch.empty_like(slot_ids)
    return mask, now, torch.empty_like(weights), share, torch.empty_like(mask)

"""The variants that compute no row: layers or the whole model extrapolated from histories.

    refresh   ... as written; layer.0.blocks.0.attn.0 <- attention; output0.0 <- output
              -> output + k_0 output + sum_j k_j o_j  (corrector), inner products for the policy
    forecast  attention and experts = sum_j w_j h_j; embedding, modulation, norms, head as written
    skip      output = sum_j c_j o_j + e x + sum_j e_j x_j; nothing else runs
    probe     |u - u'|_1 / |u'|_1 of the first attention's input u, u' that of the last call

The weights come from the policy on the host, as one small tensor a step (policies/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.traceback import set_current_meta

from ..graph.evaluate import Evaluator
from .histories import Histories, History, gram

moeca = torch.ops.moeca


def keep_layers(histories: Histories, evaluator: Evaluator, caches: dict[str, Tensor]) -> None:
    """A refresh stores every layer's output as soon as it is computed."""
    for history in histories.layers:

        def keep(value: Tensor, history: History = history) -> None:
            with set_current_meta(history.node):
                history.push(caches, value)

        evaluator.after(history.node, keep)


def update_layers(histories: Histories, evaluator: Evaluator, caches: dict[str, Tensor]) -> None:
    """After a reuse step the newest stored outputs are its own: some of their rows are younger."""
    for history in histories.layers:
        with set_current_meta(history.node):
            moeca.cache_fill(caches[history.fields[0]], evaluator.value(history.node))


def hold_layers(
    histories: Histories, evaluator: Evaluator, caches: dict[str, Tensor], weights: Tensor
) -> None:
    """Every layer's output becomes the weighted sum of its stored ones."""
    for history in histories.layers:

        def build(history: History = history) -> None:
            with set_current_meta(history.node):
                value = history.weighted(caches, weights).to(history.node.meta["val"].dtype)
            evaluator.set(history.node, value)

        evaluator.replace(history.node, build)


def finish_refresh(
    histories: Histories,
    inputs: dict[Node, Any],
    caches: dict[str, Tensor],
    correction: Tensor,
    outputs: list[Any],
) -> tuple[list[Any], Tensor]:
    """(corrected outputs, inner products); stores outputs and sample, uncorrected."""
    sample = inputs[histories.sample.node] if histories.sample else None
    measure = gram(histories, caches, outputs[0], sample)
    corrected = []
    for history, value in zip(histories.outputs, outputs):
        new = torch.where(correction[0] != 0, value.float() * correction[0], 0.0)
        fixed = value.float() + new + history.weighted(caches, correction[1:])
        corrected.append(fixed.to(value.dtype))
    for history, value in zip(histories.outputs, outputs):
        history.push(caches, value)
    if histories.sample is not None and sample is not None:
        histories.sample.push(caches, sample)
    return corrected, measure


def skip_outputs(
    histories: Histories, inputs: dict[Node, Any], caches: dict[str, Tensor], mix: Tensor
) -> list[Tensor]:
    """The model's outputs without the model. mix: as `Predictor.mix`, [2 * depth + 1]."""
    depth = histories.outputs[0].depth
    found = []
    for i, history in enumerate(histories.outputs):
        value = history.weighted(caches, mix[:depth])
        if histories.sample is not None and i == 0:
            now = inputs[histories.sample.node].float()
            value = value + torch.where(mix[depth] != 0, now * mix[depth], 0.0)
            value = value + histories.sample.weighted(caches, mix[depth + 1 :])
        found.append(value.to(history.node.meta["val"].dtype))
    return found


def probe_input(histories: Histories, evaluator: Evaluator, caches: dict[str, Tensor]) -> Tensor:
    """Relative l1 change [1] of the first attention's input, which is stored for the next call."""
    entry = histories.input
    if entry is None:
        raise ValueError("probe: expected an attention region, found none")
    now = evaluator.value(entry.node)
    then = caches[entry.fields[0]].float()
    drift = (now.float() - then).abs().sum() / then.abs().sum().clamp(min=1e-12)
    moeca.cache_fill(caches[entry.fields[0]], now)
    return drift.reshape(1)

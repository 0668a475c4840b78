"""Which models can be trained, and what differs between them: objective and router balance.

finegrained   rectified flow; a bias per expert is nudged after each step (no balance loss)
epsilon       noise prediction; a balance loss on the softmax probabilities
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..fashion_epsilon import model as epsilon
from ..fashion_finegrained import model as finegrained
from . import objectives

BIAS_RATE = 0.005  # per step; sigmoid scores lie in (0, 1)
BALANCE_WEIGHT = 0.01


@dataclass(frozen=True)
class Entry:
    """How to make one model and train it."""

    make: Callable[[], nn.Module]
    moe_class: type[nn.Module]
    objective: objectives.Objective
    balance_loss: Callable[[Sequence[nn.Module]], Tensor]
    after_step: Callable[[Sequence[nn.Module]], None]


def no_loss(layers: Sequence[nn.Module]) -> Tensor:
    return torch.zeros(())


def switch_loss(layers: Sequence[nn.Module]) -> Tensor:
    """E * sum_e (share of branches * mean probability), 1 when even.

    Fedus et al. 2021, arXiv:2101.03961 eq. 4, averaged over the layers.
    """
    terms = []
    for layer in layers:
        share = layer.load / layer.load.sum()
        mean = layer.router.probabilities(layer.tokens).mean(0)
        terms.append(len(layer.experts) * (share * mean).sum())
    return BALANCE_WEIGHT * torch.stack(terms).mean()


def no_update(layers: Sequence[nn.Module]) -> None:
    pass


@torch.no_grad()
def nudge_bias(layers: Sequence[nn.Module]) -> None:
    """Loss-free balancing (Wang et al. 2024, arXiv:2408.15664): a sign step towards equal load."""
    for layer in layers:
        load = layer.load.float()
        layer.router.balance_bias += BIAS_RATE * (load.mean() - load).sign()


MODELS = {
    "finegrained": Entry(
        make=lambda: finegrained.FineGrainedDiT(finegrained.Config()),
        moe_class=finegrained.MoE,
        objective=objectives.flow,
        balance_loss=no_loss,
        after_step=nudge_bias,
    ),
    "epsilon": Entry(
        make=lambda: epsilon.EpsilonDiT(epsilon.Config()),
        moe_class=epsilon.SparseFeedForward,
        objective=objectives.epsilon,
        balance_loss=switch_loss,
        after_step=no_update,
    ),
}

"""Mixture-of-experts blocks of `transformers`, as they are, inside our minimal denoiser.

Each in the three ways the library runs stacked experts: "eager" (a loop over the experts that were
hit), "batched_mm" (weights gathered per branch) and "grouped_mm" (bfloat16 only while compiling).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compat.case import Built, Case
from compat.minimal_dit import DIM, EXPERTS, HIDDEN, TOP_K, ForeignMoE, denoiser
from reference_views import view_of

IDIOMS = {"eager": "I2", "batched_mm": "I8", "grouped_mm": "I9"}


def sized(config_class: Callable[..., Any], implementation: str, **more: Any) -> Any:
    """A tiny configuration of the library's class."""
    config = config_class(hidden_size=DIM, num_experts_per_tok=TOP_K, **more)
    config._experts_implementation = implementation
    return config


class Mixtral(ForeignMoE):
    """Softmax over all, the chosen ones divided by their sum."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.mixtral import configuration_mixtral, modeling_mixtral

        config = sized(
            configuration_mixtral.MixtralConfig,
            implementation,
            intermediate_size=HIDDEN,
            num_local_experts=EXPERTS,
        )
        super().__init__(modeling_mixtral.MixtralSparseMoeBlock(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = softmax_top_k(self.inner.gate, rows)
        return weights / weights.sum(-1, keepdim=True), ids


class Qwen2(ForeignMoE):
    """A shared expert behind a gate of its own."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.qwen2_moe import configuration_qwen2_moe, modeling_qwen2_moe

        config = sized(
            configuration_qwen2_moe.Qwen2MoeConfig,
            implementation,
            moe_intermediate_size=HIDDEN,
            shared_expert_intermediate_size=HIDDEN,
            num_experts=EXPERTS,
        )
        super().__init__(modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.inner.gate, rows)

    def shared_rows(self, rows: Tensor) -> Tensor:
        return self.inner.shared_expert_gate(rows).sigmoid() * self.inner.shared_expert(rows)


class Qwen3(ForeignMoE):
    """Renormalised softmax, no shared expert."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

        config = sized(
            configuration_qwen3_moe.Qwen3MoeConfig,
            implementation,
            moe_intermediate_size=HIDDEN,
            num_experts=EXPERTS,
            norm_topk_prob=True,
        )
        super().__init__(modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = softmax_top_k(self.inner.gate, rows)
        return weights / weights.sum(-1, keepdim=True), ids


class Olmoe(ForeignMoE):
    """Softmax weights as they are."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.olmoe import configuration_olmoe, modeling_olmoe

        config = sized(
            configuration_olmoe.OlmoeConfig,
            implementation,
            intermediate_size=HIDDEN,
            num_experts=EXPERTS,
        )
        super().__init__(modeling_olmoe.OlmoeSparseMoeBlock(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.inner.gate, rows)


class DeepseekV3(ForeignMoE):
    """Sigmoid scores, a bias only for the choice, experts limited to one of two groups."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

        config = sized(
            configuration_deepseek_v3.DeepseekV3Config,
            implementation,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
        )
        super().__init__(modeling_deepseek_v3.DeepseekV3MoE(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.inner.gate
        scores = F.linear(rows, gate.weight).sigmoid()
        grouped = (scores + gate.e_score_correction_bias).view(rows.shape[0], 2, -1)
        best = grouped.topk(2, dim=-1)[0].sum(-1).argmax(-1, keepdim=True)
        other = torch.arange(2) != best
        choice = grouped.masked_fill(other.unsqueeze(-1), float("-inf")).flatten(1)
        ids = choice.topk(TOP_K, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), ids

    def shared_rows(self, rows: Tensor) -> Tensor:
        return self.inner.shared_experts(rows)


class GptOss(ForeignMoE):
    """Softmax over the chosen logits; interleaved gate and up with biases, clamped."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss

        config = sized(
            configuration_gpt_oss.GptOssConfig,
            implementation,
            intermediate_size=HIDDEN,
            num_local_experts=EXPERTS,
        )
        super().__init__(modeling_gpt_oss.GptOssMLP(config))

    def router(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = F.linear(rows, self.inner.router.weight, self.inner.router.bias).topk(TOP_K)
        return best.softmax(-1), ids

    def one_expert(self, expert: int, rows: Tensor) -> Tensor:
        bank = self.inner.experts
        both = rows @ bank.gate_up_proj[expert] + bank.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=bank.limit), both[:, 1::2].clamp(-bank.limit, bank.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * bank.alpha)
        return hidden @ bank.down_proj[expert] + bank.down_proj_bias[expert]


def softmax_top_k(gate: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest softmax probabilities [T, K] and their ids."""
    return F.linear(rows, gate.weight).softmax(-1).topk(TOP_K, dim=-1)


BLOCKS: dict[str, type[ForeignMoE]] = {
    "Mixtral": Mixtral,
    "Qwen2-MoE": Qwen2,
    "Qwen3-MoE": Qwen3,
    "OLMoE": Olmoe,
    "DeepSeek-V3": DeepseekV3,
    "gpt-oss": GptOss,
}


def make(block: type[ForeignMoE], implementation: str) -> Built:
    """The denoiser with this block; grouped_mm in bfloat16."""
    dtype = torch.bfloat16 if implementation == "grouped_mm" else None
    attention = "rope" if block in (Qwen3, GptOss) else "sdpa"
    return denoiser(lambda: block(implementation), attention=attention, dtype=dtype)


def case(name: str, implementation: str) -> Case:
    grouped = implementation == "grouped_mm"
    return Case(
        f"{name} block, {implementation}",
        "transformers",
        IDIOMS[implementation],
        partial(make, BLOCKS[name], implementation),
        moe=1,
        attention=1,
        sample="x",
        condition="y",
        view=None if grouped else view_of,
        tolerance=2e-2 if grouped else 1e-5,
    )


CASES = [case(name, implementation) for name in BLOCKS for implementation in IDIOMS]

"""All cases, in the order of the table."""

from __future__ import annotations

from compat.case import Case
from compat.cases import hidream, hunyuan, nucleus, public_repositories, transformers_blocks

CASES: list[Case] = [
    *hidream.CASES,
    *nucleus.CASES,
    *transformers_blocks.CASES,
    *public_repositories.CASES,
    *hunyuan.CASES,
]

"""What a stage changed: a unified diff of the graph before and after it.

-expert_rows: "f32[32, 32]" = torch.ops.moeca.expert_rows.default(flatten_3, 0)   # blocks.0.moe
+routed_experts: "f32[32, 2, 32]" = moeca_compile.graph.experts.routed_experts(...)
"""

from __future__ import annotations

import difflib

COMMON_SHARE = 0.2  # below it a diff is one text taken out and another put in


def graph_diff(before: str, after: str, names: tuple[str, str]) -> str:
    """Unified diff with three lines around a change; a sentence where little is common."""
    old, new = before.splitlines(), after.splitlines()
    if old == new:
        return f"{names[1]} left the graph as {names[0]} had made it\n"
    common = len(set(old) & set(new))
    if common < COMMON_SHARE * max(len(old), len(new)):
        return (
            f"{names[0]} and {names[1]} have {common} of {len(new)} lines in common: another "
            "dialect, read the files side by side\n"
        )
    return "\n".join(difflib.unified_diff(old, new, *names, lineterm="")) + "\n"

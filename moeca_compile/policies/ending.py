"""Where a schedule of timesteps ends, as far as the timesteps seen so far tell.

    900, 880        falls: it ends at 0, 880 are left
    0.10, 0.12      rises: it ends at 1 (at 1000 where a timestep was above 1), 0.88 are left
    -0.1, -0.2      anything (the logarithm of a noise level): unknown, infinite

A schedule that ends earlier than these is refreshed as if it went on.
"""

from __future__ import annotations

import math

THOUSAND = 1000.0  # models whose timestep runs to 1000


def time_left(before: float, now: float, highest: float) -> float:
    """From `now` to the end, >= 0; infinite where it is not known.

    before: an earlier timestep, infinite where there is none; highest: the largest one so far.
    """
    if not math.isfinite(before) or now < 0.0 or before < 0.0 or now == before:
        return math.inf
    if now < before:
        return now
    return max((THOUSAND if max(highest, now) > 1.0 else 1.0) - now, 0.0)


def is_last(before: float, now: float, highest: float) -> bool:
    """Whether a schedule with even steps has no call behind `now`; before: the last call's."""
    width = abs(now - before)
    return time_left(before, now, highest) - width < width / 2

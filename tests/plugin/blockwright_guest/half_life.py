"""``blockwright half-life DECAY…``: print after how many tokens a decay has halved what is remembered."""

from __future__ import annotations

import math
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    for decay in map(float, arguments):
        print(f"{decay}: {math.log(0.5) / math.log(decay):.1f} tokens")

"""Words quoted for Hydra's override grammar."""

from __future__ import annotations

import re
from pathlib import Path


def quoted(value: Path | str) -> str:
    """A path quoted for Hydra's override grammar; one with a slash and plain characters is itself."""
    if re.fullmatch(r"[\w./-]*/[\w./-]*", str(value), re.ASCII):
        return str(value)
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"

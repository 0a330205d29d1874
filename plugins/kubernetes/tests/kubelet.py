"""How a kubelet reads a container's command and variables: $(NAME) is the value of a variable, and $$ one dollar."""

from __future__ import annotations

import re
from collections.abc import Mapping


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text as the container gets it; names that are no variable stay as they are."""
    pattern = re.compile(r"\$\$|\$\(([^)]*)\)")
    return pattern.sub(lambda found: "$" if found[1] is None else variables.get(found[1], found[0]), text)

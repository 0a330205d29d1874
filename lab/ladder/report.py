"""stub"""

from pathlib import Path


def conclude(directory: Path) -> None: ...

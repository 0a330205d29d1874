"""``blockwright train [OVERRIDE …] [--cfg job] [--multirun]``: train a model, or sweep with ``-m``.

An OVERRIDE is KEY=VALUE or GROUP=NAME, composed by Hydra from conf/. With fit, validate, test or predict as first word
it is Lightning CLI on the same configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from blockwright.training.entry import main as entry


def main(arguments: Sequence[str] | None = None) -> None:
    """Train.

    Args:
        arguments: None for those of the process. Others become the process's, and this its program: Lightning starts
            further ranks by running it again
    """
    if arguments is not None:
        sys.argv = [__file__, *arguments]
        sys.modules["__main__"].__spec__ = __spec__
    entry.main()


if __name__ == "__main__":
    main()

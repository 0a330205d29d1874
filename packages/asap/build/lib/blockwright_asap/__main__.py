"""``python -m blockwright_asap``."""

import sys

from blockwright_asap.command import main

if __name__ == "__main__":
    sys.exit(main())

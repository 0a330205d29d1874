"""``python -m blockwright``: the ``blockwright`` command."""

from blockwright.command import main

if __name__ == "__main__":
    main()

"""``blockwright evaluate``: reading tests with ``--suite``, else lm-evaluation-harness (extra ``lm_eval``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

USAGE = """\
blockwright evaluate MODEL --suite needle --lengths 4k,32k,128k [--generate] [--position NODE]   how far it reads
blockwright evaluate --model_args path=MODEL --tasks TASKS …                      lm-evaluation-harness (extra lm_eval)

blockwright evaluate MODEL --suite x --help describes the first; without --suite all options are the harness's.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command that the arguments are for.

    Raises:
        registry.ConfigError: an error in the command line or the model
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    ours = any(word == "--suite" or word.startswith("--suite=") for word in arguments)
    importlib.import_module("lab.reading.command" if ours else "lab.lm_eval").main(arguments)

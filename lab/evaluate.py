"""``blockwright evaluate MODEL --suite NAME|--task FILE``: how far a model reads, or how well it solves prompts.

Without either flag it is lm-evaluation-harness (extra ``lm_eval``).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

from blockwright.registry import ConfigError

USAGE = """\
blockwright evaluate MODEL --suite needle --lengths 4k,32k,128k [--generate] [--position NODE]   how far it reads
blockwright evaluate MODEL --task FILE                                            prompts judged by a reward: pass@k
blockwright evaluate --model_args path=MODEL --tasks TASKS …                      lm-evaluation-harness (extra lm_eval)

blockwright evaluate MODEL --suite x --help and --task x --help describe the first two.
"""

ENTRY_POINTS = "blockwright.evaluations"  # option → the command that it chooses


def main(arguments: Sequence[str]) -> None:
    """Run the command that the arguments are for.

    Raises:
        registry.ConfigError: an error in the command line or the model
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    options = {word.split("=")[0] for word in arguments}
    offered = {f"--{point.name}": point for point in entry_points(group=ENTRY_POINTS)}
    chosen = next((point for option, point in offered.items() if option in options), None)
    if chosen is not None:
        chosen.load()(arguments)
        return
    rule = "does not say by what it is evaluated"
    remedy = "Add --suite needle --lengths 512, or --task FILE; or write --model_args path=MODEL --tasks TASKS"
    raise ConfigError("command line", " ".join(arguments), rule, remedy)

"""``blockwright COMMAND …``: every command of the project under one name.

Maps each command to the module that reads its arguments. Nothing is imported before it is needed, so that ``--help``
and completion are fast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from blockwright.registry.command import run_command
from blockwright.registry.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        about: what it does, for the list
        module: the module whose ``main`` takes the arguments
        prefix: arguments inserted before the user's
    """

    about: str
    module: str
    prefix: tuple[str, ...] = ()


TRAIN = "train"
COMMANDS = {
    TRAIN: Command(
        "train a model: KEY=VALUE overrides, -m to sweep; fit|validate|test|predict for Lightning CLI",
        "blockwright.train",
    ),
    "describe": Command(
        "what models cost: parameters, FLOPs, cache, memory; nothing is allocated", "blockwright.lab.describe"
    ),
    "plan": Command(
        "how to spread a training over GPUs: step time, memory, traffic, cost", "blockwright.lab.plan.__main__"
    ),
    "match": Command("size the arms of a comparison to the same cost", "blockwright.lab.match.__main__"),
    "ablate": Command(
        "run a matched comparison, from its definition to its report", "blockwright.lab.ablation.__main__"
    ),
    "sweep": Command("status, resume, retry or stop a sweep", "blockwright.lab.sweep.__main__"),
    "kubernetes": Command(
        "run or sweep on a cluster, and watch, stop and resume it", "blockwright.lab.kubernetes.__main__"
    ),
    "report": Command("write a sweep's results as one page", "blockwright.lab.report.__main__"),
    "surgery": Command(
        "trained weights in another composition, and a ledger of what that changes", "blockwright.lab.surgery.__main__"
    ),
    "generate": Command("write text with a trained model", "blockwright.lab.generate"),
    "cache-loss": Command("what a quantised cache costs in loss", "blockwright.lab.cache_loss"),
    "evaluate": Command(
        "how far a model reads (--suite needle), or lm-evaluation-harness (extra lm_eval)", "blockwright.lab.evaluate"
    ),
    "import": Command("a Hugging Face checkpoint → a model here", "blockwright.interop.hf", ("import",)),
    "export": Command(
        "a model here → a Hugging Face checkpoint, or an engine with pipelines", "blockwright.lab.handover.__main__"
    ),
    "consolidate": Command("a sharded checkpoint → one file", "blockwright.interop.consolidate"),
    "blocks": Command("list blocks, their parameters and ranges", "blockwright.registry.__main__"),
    "check": Command("test that a block keeps the contract of its kind", "blockwright.blocks.conformance.__main__"),
}
# Those whose arguments may be Hydra overrides.
OVERRIDES = (TRAIN, "describe", "plan", "match", "ablate", "surgery", "kubernetes")


def usage() -> str:
    """The text of ``--help``."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:{width}}{command.about}" for name, command in COMMANDS.items())
    return (
        "blockwright COMMAND [ARGUMENT …]\n\n"
        f"{listed}\n\n"
        "blockwright COMMAND --help describes a command's arguments. Tab completion in bash or zsh:\n"
        '  eval "$(blockwright --completion)"\n'
    )


def completion() -> str:
    """A script for bash, and for zsh by its ``bashcompinit``: completes commands, then overrides and files.

    Hydra knows the groups, their options and the keys of what the words so far compose.
    """
    names, given = " ".join(COMMANDS), " ".join(OVERRIDES)
    return f"""[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
_blockwright() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" known=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
    return
  fi
  case " {given} " in
    *" ${{COMP_WORDS[1]}} "*)
      known=$(COMP_LINE="train.py ${{COMP_WORDS[*]:2}}" "${{COMP_WORDS[0]}}" {TRAIN} -sc query=bash 2>/dev/null)
  esac
  COMPREPLY=($(compgen -W "$known" -- "$word") $(compgen -f -- "$word"))
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
complete -o nospace -F _blockwright blockwright
"""


def _train(arguments: Sequence[str]) -> None:
    """Run as ``python -m blockwright.train``: Lightning starts further ranks by running that again."""
    train = importlib.import_module(COMMANDS[TRAIN].module)
    sys.argv = [train.__file__ or "train.py", *arguments]
    sys.modules["__main__"].__spec__ = train.__spec__
    train.main()


def run(arguments: Sequence[str]) -> int | None:
    """Run a command line after the word ``blockwright``."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage(), end="")
    elif name == "--version":
        from blockwright import __version__

        print(f"blockwright {__version__}")
    elif name == "--completion":
        print(completion(), end="")
    elif name not in COMMANDS:
        remedy = did_you_mean(name, COMMANDS)
        if "=" in name or name in ("-m", "--multirun", "fit", "validate", "test", "predict"):
            remedy = f"Write: blockwright train {name} …"
        raise ConfigError("command line", name, "is not a command", remedy)
    elif name == TRAIN:
        _train(rest)
    else:
        command = COMMANDS[name]
        return importlib.import_module(command.module).main([*command.prefix, *rest])
    return None


def main() -> None:
    """The console script."""
    sys.exit(run_command(run))

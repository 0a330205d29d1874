"""``blockwright consolidate RUN OUT``: convert a training checkpoint, one file or sharded, to safetensors.

OUT gets the composition (``model.yaml``), the weights under our names (``model.safetensors``; start from them with
``init_from=OUT model=pretrained``), the tokenizer's files, ``origin.json`` as an import writes it, and the optimizer
state of each weight (``optimizer.safetensors``, by ``<parameter>.<name>``). ``--checkpoint`` adds ``last.ckpt``, one
file from which any number of processes resumes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import check_origin, check_out, start_from, whole, write_origin
from blockwright.blocks.checkpoint.read import read_checkpoint, weights_of
from blockwright.blocks.checkpoint.shards import ready, save, write_shards
from blockwright.blocks.checkpoint.source import COMPOSITION, tokenizer_state
from blockwright.registry.command import Parser, run_command
from blockwright.training.data.tokenizers import files as tokenizer

OPTIMIZER = "optimizer"
MAX_BYTES = 5 * 10**9


def consolidate(source: Path, out: Path, *, checkpoint: bool = False) -> None:
    """Write a safetensors folder.

    Args:
        source: a run's folder, or a checkpoint
        out: folder to create; must not exist, or be empty
        checkpoint: whether to write ``last.ckpt`` too

    Raises:
        ConfigError: the source is damaged, or the folder cannot be written
    """
    check_out(out)
    last = source / "checkpoints" / "last.ckpt"
    checkpoint_file = last if last.exists() else source
    found = read_checkpoint(checkpoint_file)
    model, words = found["hyper_parameters"]["model"], tokenizer_state(found)
    came_from = check_origin(found.get("origin", {}), str(checkpoint_file))
    with whole(out) as folder:
        if words and words.get("kind") in tokenizer.KINDS:
            tokenizer.write(words, folder, model["max_positions"])
        if came_from:
            write_origin(came_from, folder)
        (folder / COMPOSITION).write_text(yaml.safe_dump(model, sort_keys=False), encoding="utf-8")
        write_shards(
            folder, {name: ready(tensor.contiguous()) for name, tensor in weights_of(found).items()}, MAX_BYTES
        )
        states = _optimizer_tensors(found)
        if states:
            save(states, folder / f"{OPTIMIZER}.safetensors")
        if checkpoint:
            with (folder / "last.ckpt").open("wb") as file:  # torch's own would not say that the disk is full
                torch.save(found, file)


def _optimizer_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """``<parameter>.<name>`` → tensor, of all optimizers."""
    named: dict[str, Tensor] = {}
    known = checkpoint.get("optimizer_parameters") or []
    for which, state in enumerate(checkpoint.get("optimizer_states") or []):
        names = known[which] if which < len(known) else []
        for index, values in state["state"].items():
            parameter = names[index] if index < len(names) else f"{which}.{index}"
            named |= {f"{parameter}.{k}": v.contiguous() for k, v in values.items() if isinstance(v, Tensor)}
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(prog="blockwright consolidate", description=__doc__)
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder, or a checkpoint: a file or a folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist, or be empty")
    parser.add_argument("--checkpoint", action="store_true", help="also write last.ckpt, one file to resume from")
    given = parser.parse_args(arguments)
    consolidate(given.source, given.out, checkpoint=given.checkpoint)
    print(f"Wrote {given.out}. Start from it: {shlex.join(['blockwright', 'train', *start_from(given.out)])}")


if __name__ == "__main__":
    sys.exit(main())

"""``blockwright surgery RUN [OVERRIDE …]``: put trained weights into another composition, and measure the change.

OVERRIDES change the composition of RUN, as in blockwright train (model/attention=mla model.ffn.n_experts=8), and choose
operators (surgery/transplant=drop surgery.exact=true). The ledger, a table of the operators, says of each before a
token is trained how far it moves the logits on random tokens, whether it is exact, and how many parameters it copies,
derives and draws; with --ledger also the difference of the loss on validation text. OUT is a folder to start from:
blockwright train init_from=OUT model=pretrained.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import check_out, start_from, whole, write_origin
from blockwright.blocks.checkpoint.read import PREFIX, distributions
from blockwright.blocks.checkpoint.shards import ready, write_shards
from blockwright.blocks.checkpoint.source import COMPOSITION, named_by, open_source, read_composition
from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.cache_loss import USUAL, Window, text_windows, validation_windows
from blockwright.lab.describe import usual_context
from blockwright.lab.own_text import own_text
from blockwright.lab.writer import Writer
from blockwright.plugins.surgery.ledger import Ledger
from blockwright.plugins.surgery.start import Surgery
from blockwright.plugins.surgery.tables import cost_table, costs, plain, rows, table
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, quoted, run_command, strict_json
from blockwright.registry.printing import show
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of
from blockwright.training.data.tokenizers.files import write_all

OBEYED = r"[+~]*(model|surgery|seed)\b"  # overrides that have an effect here
USUAL_WINDOWS = 64
MAX_BYTES = 5 * 10**9  # of a file of weights
Text = Callable[[], Iterable[Mapping[str, Tensor]]]


def requested(run: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Surgery]:
    """The new composition and the surgery, from overrides.

    Raises:
        ConfigError: they cannot be composed, or the composition is invalid
    """
    # Nothing of a pretrained model is in the groups yet, so all that replaces it there is added.
    added = [re.sub(r"^model([/.])", lambda m: ("+" if m[1] == "/" else "++") + m[0], o) for o in overrides]
    cfg = compose_config(["model=pretrained", f"init_from={quoted(run)}", "surgery=default", *added])
    read = OmegaConf.masked_copy(cfg, ["model", "surgery", "init_from", "seed"])
    plain: Any = OmegaConf.to_container(read, resolve=True, enum_to_str=True)
    plain["model"] = check(composition_of(plain["model"]))
    (surgery,) = parts.starts(plain)
    return plain["model"], surgery


def _refuse_without_effect(words: Any) -> None:
    """Refuse what this command would read and not obey.

    Raises:
        ConfigError
    """
    for override in words.overrides:
        if not re.match(OBEYED, override):
            key, _, value = override.partition("=")
            rule = "changes neither the composition nor the surgery, and nothing is trained here"
            raise ConfigError(key, value, rule, "Leave it out, or give it to the run that starts from OUT")
    if words.windows is not None and not words.ledger:
        raise ConfigError("--windows", words.windows, "counts the text that --ledger reads", "Add --ledger")
    if words.length is not None and not words.text:
        rule = "cuts the files of --text, and the text of RUN has windows of its own"
        raise ConfigError("--length", words.length, rule, "Add --text FILE")


def texts(
    run: Path, files: Sequence[Path], length: int | None, most: int, learn: int, measures: bool
) -> tuple[Text, list[Window]]:
    """Text that operators learn from, and windows to measure on.

    Args:
        run: whose own training and validation text is used if there are no files
        files: of text, whose first ``learn`` windows are learnt from, and the others measured on
        length: tokens of a window of the files; None for the usual
        most: windows to measure on
        learn: windows to learn from
        measures: whether any are needed
    """
    if files:
        windows = list(text_windows(Writer.open(run, device="cpu"), files, length, learn + most))
        return lambda: ({"tokens": tokens} for tokens, _ in windows[:learn]), windows[learn:] if measures else []

    def own() -> Iterable[Mapping[str, Tensor]]:
        return own_text(run, "RUN").train_dataloader()

    return own, list(validation_windows(run, most)) if measures else []


def write(out: Path, run: Path, decoder: Decoder) -> None:
    """Write a folder to start from, of the kind of RUN: that of a run with its checkpoint, or an imported one.

    Raises:
        ConfigError: the folder cannot be written
    """
    source = open_source(run)
    with whole(out) as folder:
        if source.folder is None:
            weights = {f"{PREFIX}{name}": tensor for name, tensor in decoder.state_dict().items()}
            parts = {"hyper_parameters": {"model": decoder.config}, "distributions": distributions(decoder.config)}
            (folder / "checkpoints").mkdir()
            words: dict[str, Any] = {} if source.tokenizer is None else {"data": {"tokenizer": source.tokenizer}}
            words |= {"origin": source.origin} if source.origin else {}
            with (folder / "checkpoints" / "last.ckpt").open("wb") as file:  # torch's own would not say: full disk
                torch.save({"state_dict": weights, **parts, **words}, file)
            return
        (folder / COMPOSITION).write_text(yaml.safe_dump(decoder.config, sort_keys=False), encoding="utf-8")
        write_all(source, folder, decoder.config["max_positions"])
        if source.origin:
            write_origin(source.origin, folder)
        write_shards(folder, {name: ready(t.contiguous()) for name, t in decoder.state_dict().items()}, MAX_BYTES)


def _parser() -> Parser:
    parser = Parser(prog="blockwright surgery", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an imported folder")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="of the composition, and of surgery")
    parser.add_argument("--out", metavar="OUT", type=Path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--ledger", action="store_true", help="measure the loss on validation text too")
    parser.add_argument("--text", action="append", type=Path, default=[], metavar="FILE", help="instead of RUN's own")
    usual = f"tokens of a window of --text; default {USUAL}, or all that the model reads if fewer"
    parser.add_argument("--length", type=int, metavar="N", help=usual)
    parser.add_argument("--windows", type=int, metavar="N", help=f"that --ledger reads; default {USUAL_WINDOWS}")
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, the composition or the text, or an operator that refuses
    """
    words = _parser().parse_args(arguments)
    for name in ("length", "windows"):
        if (given := getattr(words, name)) is not None and given < 1:
            raise ConfigError(f"--{name}", given, "must be at least 1", "Leave it out")
    _refuse_without_effect(words)
    if words.out is not None:
        check_out(words.out)
    with named_by("RUN"):
        model, surgery = requested(words.run, words.overrides)
        learns = surgery.outline(read_composition(words.run), model).reads_text
    if words.text and not (words.ledger or learns):
        rule = "is read by no operator of this surgery"
        raise ConfigError("--text", str(words.text[0]), rule, "Add --ledger to measure the loss on it, or leave it out")
    most = words.windows or USUAL_WINDOWS
    text, windows = texts(words.run, words.text, words.length, most, surgery.batches, words.ledger)
    new = compose(model, seed=surgery.seed).eval()

    def report(old: Decoder, ledger: Ledger) -> None:
        """Before a refusal."""
        found = rows(old, new, surgery.growth, ledger, windows)
        context = usual_context([old, new])
        before, after = costs(old.config, context), costs(new.config, context)
        if words.json:
            print(strict_json(plain(found, ledger, before, after, context)))
        else:
            show(table(found, ledger, sum(int((targets != IGNORED).sum()) for _, targets in windows)))
            show(cost_table(before, after, context))
        for error in ledger.errors:
            print(f"error of an operator: {error}", file=sys.stderr)

    surgery.operate(new, text, report)
    if words.out is not None:
        write(words.out, words.run, new)
        print(f"Wrote {words.out}. Start from it: {shlex.join(['blockwright', 'train', *start_from(words.out)])}")


if __name__ == "__main__":
    sys.exit(run_command(main))

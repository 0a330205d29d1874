"""Checks of the data configuration before a run: instant, without Lightning, without tokenising.

``check`` takes the plain ``data`` node of a composed configuration. What requires the tokens (a BPE corpus slightly too
short, a batch larger than an epoch) is refused later by the data module, with the same kind of error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.ranges import Count, Seed, Whole
from blockwright.registry.schema import conforms, fault
from blockwright.training.data import lengths
from blockwright.training.data.corpus import SPLITS, Corpus
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.data.transform import Transform

MODULE = "blockwright.training.data.module.TextDataModule"


class Rows(NamedTuple):
    """A data module of conversations, seen from files that import no Lightning.

    rendering: the class that makes its rows
    arguments: of its own
    """

    rendering: str
    arguments: set[str]


ROWS = {
    "blockwright.training.data.chat_module.ChatDataModule": Rows(
        "blockwright.training.data.rendering.Rendering", {"chat"}
    ),
    "blockwright.training.data.prompt_module.PromptDataModule": Rows(
        "blockwright.training.data.prompts.PromptRendering", {"chat", "updates"}
    ),
    "blockwright.training.data.preference_module.PreferenceDataModule": Rows(
        "blockwright.training.data.preferences.PairRendering", {"chat"}
    ),
    "blockwright.training.data.picture_module.PictureDataModule": Rows(
        "blockwright.training.data.picture_rows.PictureRendering", {"chat", "model", "row_tiles"}
    ),
}

Length = Annotated[int, Ge(2)]  # of a window: a token, and one to predict
# Numeric arguments of the data module, repeated here because reading its annotations would import Lightning.
RANGES: dict[str, Any] = {
    "sequence_length": Length,
    "batch_size": Count,
    "eval_batch_size": Count | None,
    "eval_windows": Count | None,
    "num_workers": Whole,
    "updates": Count,
    "row_tiles": Count | None,
    "seed": Seed,
    "documents": Literal["apart", "joined"],
    "min_length": Length | None,
}
ARGUMENTS = {"corpus", "tokenizer", "cache_dir", "lengths", "transforms", *RANGES} - {"updates", "row_tiles"}
HYDRA_KEYS = {"_target_", "_convert_", "_recursive_", "_partial_"}


def check(node: Mapping[str, Any]) -> int | None:
    """Refuse a data configuration that cannot work.

    Args:
        node: the ``data`` node as plain types, interpolations resolved. A node whose ``_target_`` is no data module of
            this project is not checked

    Returns:
        the tokenizer's number of ids; None for another data module

    Raises:
        ConfigError: at ``data.<key>``
    """
    target = node.get("_target_", MODULE)
    rows = ROWS.get(target)
    if rows is None and target != MODULE:
        return None
    refuse_missing("data", node)
    _known_keys("data", node, ARGUMENTS | (rows.arguments if rows else set()))
    for key, hint in RANGES.items():
        if key in node and not conforms(node[key], hint):
            raise ConfigError(f"data.{key}", node[key], fault(node[key], hint), f"Write data.{key}=<another>")
    corpus = _build("data.corpus", node.get("corpus"), Corpus)
    tokenizer = _build("data.tokenizer", node.get("tokenizer"), Tokenizer)
    if rows is None:
        _check_windows(node, corpus, tokenizer)
    else:
        _check_rows(node, corpus, tokenizer, rows)
    return tokenizer.vocab_size


def _check_windows(node: Mapping[str, Any], corpus: Corpus, tokenizer: Tokenizer) -> None:
    corpus.check()
    length, batch_size = node.get("sequence_length", 256), node.get("batch_size", 16)
    mixed = lengths.read(node.get("lengths"), length, batch_size)
    check_transforms(transforms_of(node), length, tokenizer.vocab_size, mixed)
    if corpus.is_small():
        tokenizer.check(part for document in corpus.streams("train") for part in tokenizer.parts(document))
        _long_enough(corpus, node.get("sequence_length", 2))


def _check_rows(node: Mapping[str, Any], corpus: Corpus, tokenizer: Tokenizer, rows: Rows) -> None:
    from hydra.utils import get_class

    _refuse_windows(node)
    made_by: Any = get_class(rows.rendering)
    rendering = made_by.of(node, corpus, tokenizer)
    corpus.check()
    for split in SPLITS if corpus.is_small() else ():
        rendering.check(corpus.documents(split))


def tokenizer_of(node: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a checked ``data`` node; None for another data module."""
    return (
        _build("data.tokenizer", node.get("tokenizer"), Tokenizer) if node.get("_target_") in (MODULE, *ROWS) else None
    )


def _refuse_windows(node: Mapping[str, Any]) -> None:
    """Refuse settings of windows for rows of conversations, which would ignore them."""
    for key, usual in (("lengths", None), ("min_length", None), ("documents", "apart"), ("transforms", {})):
        if node.get(key, usual) not in (usual, None, {}):
            rule = "is about windows of a text, and this data is conversations"
            raise ConfigError(f"data.{key}", node[key], rule, "Leave it out, or use data=text")


def transforms_of(node: Mapping[str, Any]) -> dict[str, Transform]:
    """The transforms of a ``data`` node, built.

    Raises:
        ConfigError: at ``data.transforms``
    """
    given = node.get("transforms") or {}
    if not isinstance(given, Mapping):
        raise ConfigError("data.transforms", given, "maps names to transforms", _EXAMPLE["data.transforms"])
    found = {name: inner for name, inner in given.items() if inner is not None}
    return {name: _build(f"data.transforms.{name}", inner, Transform) for name, inner in found.items()}


def check_transforms(
    transforms: Mapping[str, Transform], sequence_length: int, vocab_size: int, mixed: lengths.Lengths | None
) -> None:
    """Refuse transforms that cannot work with some windows.

    Args:
        transforms: by name
        sequence_length: tokens of the longest windows
        vocab_size: ids of the tokenizer
        mixed: the lengths of other windows

    Raises:
        ConfigError: at ``data.transforms``
    """
    for each in transforms.values():
        for length in {sequence_length, *(mixed.all if mixed else ())}:
            each.check(length, vocab_size)


def positions_needed(node: Mapping[str, Any]) -> int:
    """The number of positions that training windows of a checked ``data`` node need; 0 for another data module."""
    if node.get("_target_", MODULE) != MODULE:
        return 0
    length = node.get("sequence_length", 256)
    return max([length, *(each.reach(length) for each in transforms_of(node).values())])


def too_short(split: str, n_tokens: int, sequence_length: int) -> ConfigError:
    """The error for a split shorter than one sequence.

    Args:
        split: ``train``, ``val`` or ``test``
        n_tokens: tokens of the split, at most
        sequence_length: tokens of a sequence
    """
    fraction = "" if split == "train" else f", or hold out more of it, or none (data.corpus.{split}_fraction=0)"
    return ConfigError(
        "data.sequence_length",
        sequence_length,
        f"the {split} split has {n_tokens} tokens, one sequence and the token after it need {sequence_length + 1}",
        f"Set data.sequence_length={max(n_tokens - 1, 2)} or less, give the corpus more text{fraction}",
    )


def _long_enough(corpus: Corpus, sequence_length: int) -> None:
    """Refuse a split with fewer bytes than a sequence has tokens: a token is at least a byte, or ends a document."""
    for split in SPLITS:
        most = 0
        for document in corpus.streams(split):
            most += sum(len(text.encode()) for text in document) + 1
            if most > sequence_length:
                break
        if most <= sequence_length and (most or split == "train"):
            raise too_short(split, most, sequence_length)


def _known_keys(path: str, node: Mapping[str, Any], known: set[str]) -> None:
    for key in node:
        if key not in known | HYDRA_KEYS:
            raise ConfigError(
                f"{path}.{key}", node[key], "there is no such setting", did_you_mean(key, known, "Leave it out")
            )


def refuse_missing(path: str, node: Any) -> None:
    """Refuse ``???`` anywhere in a node."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_missing(f"{path}.{key}", value)
    elif node == "???":
        raise ConfigError(path, node, "a value is required", f"Give one on the command line: {path}=…")


def _build(path: str, node: Any, family: type) -> Any:
    """Build the corpus or tokenizer of a node; only a class of that family is ever called."""
    from hydra.errors import InstantiationException
    from hydra.utils import get_class, instantiate

    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(
            path, node, f"a node with _target_ is needed, the class of a {family.__name__}", _example(path)
        )
    target = node["_target_"]
    try:
        cls = get_class(target)
    except Exception as error:  # importing a plug-in's module may fail in any way
        raise ConfigError(f"{path}._target_", target, f"no such class: {_last_line(error)}", _example(path)) from error
    if not issubclass(cls, family):
        raise ConfigError(f"{path}._target_", target, f"the class is not a {family.__name__}", _example(path))
    parameters = inspect.signature(cls).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        _known_keys(path, node, set(parameters))
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for name in required:
        if name not in node:
            raise ConfigError(f"{path}.{name}", None, "a value is required", f"Give one: {path}.{name}=…")
    try:
        return instantiate(dict(node))
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):  # Hydra wraps what a constructor raises
            raise error.__cause__ from None
        raise ConfigError(path, target, f"it cannot be built: {_last_line(error)}", _example(path)) from error


def _last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


def _example(path: str) -> str:
    return _EXAMPLE.get(path) or _EXAMPLE[path.rpartition(".")[0]]


_EXAMPLE = {
    "data.corpus": "For example: data=shakespeare, or data=text data.corpus.files='books/*.txt'",
    "data.tokenizer": "For example: data/tokenizer=bytes (or chars, or bpe)",
    "data.transforms": "For example: data/transforms=pose data.transforms.pose.target=4096",
}

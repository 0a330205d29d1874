"""A run's own text, read from the settings in its folder, for commands that measure a model on it.

The folder may be untrusted. Of its settings those in ``KEPT`` are read, and the corpus is built if its class is
declared ``readable``. The tokenizer is the one in the checkpoint, and tokens are kept in the cache of this project, not
where the folder says. Conversations are no text: their formats, rewards and pictures are not built here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.blocks.checkpoint.source import checkpoint_of, read_composition, read_start, tokenizer_state
from blockwright.registry import ConfigError
from blockwright.registry.folder import References, read_yaml
from blockwright.registry.limits import open_plain, read_plain
from blockwright.renamed import with_moved
from blockwright.training.configuration.instantiate import build_readable
from blockwright.training.data.corpus import Corpus
from blockwright.training.data.tokenizers.rebuild import rebuild

if TYPE_CHECKING:
    from blockwright.training.data.modules.text import TextDataModule

# --- the text of a file that ``--text`` names -------------------------------------------------------------------------


MAX_BYTES = 2**30  # it is encoded at once, in a hundred times the memory
NAMED = "Name a file of text in UTF-8"


def read_text_file(file: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: at ``--text``: it is unreadable, no plain file, too long, not UTF-8, or empty
    """
    try:
        text = read_plain(file, "--text", NAMED, MAX_BYTES).decode()
    except UnicodeDecodeError:
        raise ConfigError("--text", str(file), "cannot be read (it is not UTF-8)", NAMED) from None
    if not text:
        raise ConfigError("--text", str(file), "is empty", NAMED)
    return text


KEPT = ("sequence_length", "batch_size", "eval_batch_size", "documents", "seed")  # of the data's settings
MAX_TEXT_BYTES = 2**31  # of all files that a folder names
MAX_BATCH_TOKENS = 2**20
SETTINGS = ".hydra/config.yaml"
REMEDY = "Name the text yourself: --text FILE"


def own_text(run: Path, option: str, most: int | None = None) -> TextDataModule:
    """The text of a run, tokenised, as its data module.

    Args:
        run: its folder
        option: by which the command names it, for messages
        most: windows to evaluate, evenly spaced; None for all

    Raises:
        ConfigError: the folder has no settings, they name no text, or text that a folder may not name
    """
    from blockwright.training.data.modules.text import (
        Batching,  # Lightning, which --help does without
        TextDataModule,
    )

    if not (run / SETTINGS).is_file():
        rule = f"holds no {SETTINGS}, which names its validation text"
        raise ConfigError(option, str(run), rule, "Name a run's folder, or the text: --text FILE")
    node = _settings(run)
    corpus: Corpus = build_readable(node.get("corpus"), Corpus, "data.corpus", REMEDY, files=True)
    _check_files(corpus)
    settings = {key: node[key] for key in KEPT if key in node}
    state = tokenizer_state(read_start(run)) if checkpoint_of(run) else None
    if state is None:
        raise ConfigError(option, str(run), "holds no tokenizer with its checkpoint", REMEDY)
    settings |= {"eval_windows": most, "cache_dir": str(_project() / "data" / "cache")}
    joined = settings.pop("documents", "apart")
    data = TextDataModule(Batching(rebuild(state), corpus=corpus, **settings), joined)
    model = read_composition(run)
    given = {"sequence_length": data.sequence_length, "tokenizer.vocab_size": data.tokenizer.vocab_size}
    for (key, value), room in zip(given.items(), (model["max_positions"], model["vocab_size"]), strict=True):
        if value > room:
            raise ConfigError(f"data.{key}", value, f"is more than the model of this folder has: {room}", REMEDY)
    if max(data.batch_size, data.eval_batch_size) * data.sequence_length > MAX_BATCH_TOKENS:
        rule = f"makes batches of more than {MAX_BATCH_TOKENS:,} tokens of the folder's text"
        raise ConfigError("data.batch_size", data.batch_size, rule, REMEDY)
    data.prepare_data()
    data.setup("validate")
    return data


def _settings(run: Path) -> dict[str, Any]:
    """The data's settings that are read: ``KEPT``, and the corpus."""
    try:
        found = with_moved(read_yaml(run, SETTINGS))
    except ConfigError as error:
        raise ConfigError(error.path, error.value, error.rule, REMEDY) from None
    node = found.get("data") if isinstance(found, Mapping) else None
    name = node.get("name", node.get("_target_")) if isinstance(node, Mapping) else None
    if node is None or name != "text":
        rule = "is no text, but conversations, pictures or data of a kind that a folder may not name"
        raise ConfigError("data.name", name, rule, REMEDY)
    paths = found.get("paths") if isinstance(found.get("paths"), Mapping) else {}
    root = {**found, "paths": {**paths, "root_dir": str(_project())}}  # for this project's files, wherever they are now
    kept = {key: node[key] for key in (*KEPT, "corpus") if key in node}
    return References(root, str(run / SETTINGS), REMEDY).resolve(kept)


def _project() -> Path:
    """The folder of this project's data: conf/paths."""
    return Path(os.environ.get("PROJECT_ROOT", "."))


def _check_files(corpus: Corpus) -> None:
    """Refuse files that no text is in, and more than a command should read because a folder says so."""
    size = 0
    for file in corpus.paths():
        try:
            with open_plain(file) as opened:
                size += os.fstat(opened.fileno()).st_size
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError("data.corpus", str(file), f"cannot be read ({reason})", REMEDY) from None
        if size > MAX_TEXT_BYTES:
            rule = f"has more than {MAX_TEXT_BYTES:,} bytes, which are not read because a folder names them"
            raise ConfigError("data.corpus", str(file), rule, REMEDY)

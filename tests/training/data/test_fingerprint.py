"""A cache's key is all that shaped it: each setting, changed alone, gives another key or the same tokens."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_class

from blockwright import registry
from blockwright.training.configuration.conf import CONF
from blockwright.training.data.corpus import SPLITS, Corpus
from blockwright.training.data.fingerprint import state
from blockwright.training.data.packing import cache_key
from blockwright.training.data.rows import Rendering
from blockwright.training.data.tokenizers.rebuild import KINDS
from blockwright.training.data.tokenizers.tokenizer import Tokenizer
from tests.training.data.test_chat import TEMPLATE, WithWords

TALKS = [[("user", f"Say {i}"), ("assistant", f"No {i}.")] for i in range(12)]
TEXT = "To be, or not to be:\nthat is the question.\n" * 20
ROOM = {"val_fraction": 0.3, "test_fraction": 0.3, "split_seed": 5}
SMALL = {"train": 8, "held_out": 4}
DRAWN = {"train": 9, "held_out": 9, "salt": 1}


def talks(name: str) -> list[list[tuple[str, str]]]:
    """The conversations of the file a, or those of b."""
    return TALKS if name == "a" else [[(role, content.upper()) for role, content in talk] for talk in TALKS]


def turns(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of everything: what a setting that names a file is changed to is beside what it was."""
    folder = tmp_path_factory.mktemp("files")
    for name, words in (("a", TEXT), ("b", TEXT.upper())):
        (folder / f"{name}.txt").write_text(words)
        lines = [{"messages": turns(talk)} for talk in talks(name)]
        (folder / f"talk-{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / f"{name}.jinja").write_text(TEMPLATE if name == "a" else TEMPLATE.replace("im_end", "im_start"))
    return folder


def of_corpora(at: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Class → what it is built with, and another value of every setting."""
    return {
        "blockwright.training.data.corpus.TextFiles": (
            {"files": str(at / "a.txt")},
            {"files": str(at / "b.txt"), "separator": "question", **ROOM},
        ),
        "blockwright.training.data.conversations.Conversations": (
            {"files": str(at / "talk-a.jsonl")},
            {"files": str(at / "talk-b.jsonl"), **ROOM},
        ),
        "blockwright.training.data.corpora.Sorting": (SMALL, {**DRAWN, "shortest": 3, "longest": 9, "falling": 0.1}),
        "blockwright.training.data.corpora.Shakespeare": ({}, {}),
    }


def keep_apart(make: Callable[..., tuple[str, Any]], usual: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Each change alone gives another key or the same result, and the same settings the same key."""
    key, result = make(**usual)
    assert make(**usual) == (key, result)
    changed = 0
    for name, value in others.items():
        own_key, own = make(**{**usual, name: value})
        assert own == result or own_key != key, f"{name}={value!r} gives other tokens under the same key"
        changed += own != result
    assert changed or not others, "no setting that was changed changes anything: this compares nothing"


def test_every_corpus_and_tokenizer_of_the_configuration_is_compared(files: Path) -> None:
    named = [yaml.safe_load(path.read_text()).get("corpus", {}) for path in (CONF / "data").glob("*.yaml")]
    assert {node["_target_"] for node in named if "_target_" in node} <= set(of_corpora(files))
    chosen = [
        get_class(yaml.safe_load(p.read_text())["_target_"]) for p in (CONF / "data" / "tokenizer").glob("*.yaml")
    ]
    assert {cls.kind for cls in chosen} == set(KINDS) == set(of_tokenizers(files))


@pytest.mark.parametrize("name", of_corpora(Path()))
def test_documents_of_other_settings_have_another_key(files: Path, name: str) -> None:
    assert_documents_apart(get_class(name), *of_corpora(files)[name])


def documents(corpus: Corpus) -> Any:
    return [list(corpus.documents(split)) for split in SPLITS]


def assert_documents_apart(cls, usual, others, shown=documents):
    """Each setting of a corpus gives other documents only under another key."""
    assert set(inspect.signature(cls).parameters) == set(others)

    def make(**settings: Any) -> tuple[str, Any]:
        corpus = cls(**settings)
        return corpus.fingerprint(), shown(corpus)

    if others:
        keep_apart(make, usual, others)


def of_tokenizers(at: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {
        "bytes": ({}, {"vocab_size": 300}),
        "chars": ({}, {"vocab_size": 90}),
        "bpe": ({"vocab_size": 300}, {"vocab_size": 264}),
        "pretrained": ({"file": str(at / "a.json")}, {"file": str(at / "b.json"), "eos": "<b>", "vocab_size": 999}),
    }


def save_tokenizers(at: Path) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models

    for name, words in (("a", "be to or"), ("b", "or to be")):
        vocabulary = {word: i for i, word in enumerate(["<a>", "<b>", *words.split(), "<unk>"])}
        engine = Engine(models.WordLevel(vocabulary, unk_token="<unk>"))
        engine.add_special_tokens(["<a>", "<b>"])
        engine.save(str(at / f"{name}.json"))
    (at / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<a>"}))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_other_tokenizers_have_another_key(files: Path, kind: str) -> None:
    save_tokenizers(files)
    usual, others = of_tokenizers(files)[kind]
    assert set(inspect.signature(KINDS[kind]).parameters) == set(others)

    def make(**settings: Any) -> tuple[str, Any]:
        tokenizer: Tokenizer = KINDS[kind](**settings)
        key = cache_key("", tokenizer)
        tokenizer.fit([TEXT])
        return key, ([tokenizer.encode(word).tolist() for word in ("to", TEXT)], tokenizer.eos, tokenizer.vocab_size)

    keep_apart(make, usual, others)


class Begins(WithWords):
    """Bytes with special tokens, one of which begins a document; its state says nothing of it."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.begin = begin
        self.companions = {"chat_template.jinja": TEMPLATE}

    @property
    def bos(self) -> int:
        return self.special_words[self.begin]


def render(rendering: Rendering) -> tuple[str, Any]:
    talk = json.dumps({"where": "a:1", "messages": turns(TALKS[0]), "columns": {}})
    return cache_key("", rendering), rendering.encode(talk).tolist()


def chat_of(node: Any) -> Any:
    return registry.build("chat", registry.Node(node, "data.chat"), registry.Scope({}, {}, own=True))


@pytest.mark.parametrize("name", registry.names("chat"))
def test_tokens_of_other_formats_have_another_key(files: Path, name: str) -> None:
    others: dict[str, Any] = {"begin": "<|eot_id|>", "longest": 1000, "template": str(files / "b.jinja")}
    others |= {"chat": "plain" if name != "plain" else "deepseek_v2"}
    settings = set(registry.lookup("chat", name).schema.parameters)
    assert settings <= set(others), "give another value of each setting"

    def make(begin: str, longest: int, chat: str, **own: Any) -> tuple[str, Any]:
        own = own if chat == name else {}
        return render(Rendering(Begins(begin), chat_of({"name": chat, **own}), longest))

    own = {"template": str(files / "a.jinja")} if "template" in settings else {}
    others = {k: v for k, v in others.items() if k != "template" or "template" in settings}
    keep_apart(make, {"begin": "<s>", "longest": 64, "chat": name, **own}, others)


def test_what_cannot_be_compared_must_be_left_out() -> None:
    class Own:
        def __init__(self) -> None:
            self.kept, self.made = {"a": (1, 2.5)}, lambda: 3

    with pytest.raises(TypeError, match="leave it out"):
        state(Own())
    assert state(Own(), {"made": "it is a result"})["kept"] == [["a", [1, 2.5]]]

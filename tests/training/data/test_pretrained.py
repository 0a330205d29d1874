"""A pretrained tokenizer as one of ours: the same ids, no special token from a text, bytes that add up."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.training.data.chat.jinja import reread
from blockwright.training.data.tokenizers import companions, files
from blockwright.training.data.tokenizers.pretrained import Pretrained
from blockwright.training.data.tokenizers.rebuild import KINDS, rebuild
from tests import built

TEXT = "To be, or not to be:\n\tthat is the question — naïve café! 日本語 0123\n\n"
EOS = "<|end|>"


def byte_level() -> Engine:
    """As GPT-2, Llama 3, Qwen and DeepSeek have it."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator([TEXT] * 3, trainer)
    engine.post_processor = processors.TemplateProcessing(f"{EOS} $A", special_tokens=[(EOS, 0)])
    return engine


def sentence_piece() -> Engine:
    """As Llama 2 and Mistral have it: blanks as ▁, one in front, unknown characters in bytes."""
    engine = Engine(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    engine.normalizer = normalizers.Sequence(blanks)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    engine.train_from_iterator(["to be or not to be that is the question\n"] * 3, trainer)
    state = json.loads(engine.to_str())
    for token in state["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    return Engine.from_str(json.dumps(state))


@pytest.fixture(params=[byte_level, sentence_piece])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """tokenizer.json with tokenizer_config.json beside it."""
    request.param().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    return tmp_path / "tokenizer.json"


def test_ids_are_the_librarys_and_bytes_of_tokens_add_up_to_the_text(file: Path) -> None:
    ours, theirs = Pretrained(str(file)), Engine.from_file(str(file))
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.vocab_size == theirs.get_vocab_size() and ours.fitted
    counted = ours.token_bytes()
    assert counted[ours.encode(TEXT)].sum() == len(TEXT.encode()) + ("Prepend" in file.read_text())
    assert counted[ours.eos] == 0 and len(counted) == ours.vocab_size
    ids = ours.encode(f"a{EOS}b")  # no text spells the end of a document
    assert ours.eos not in ids and ours.decode(ids) == f"a{EOS}b"
    assert ours.decode([*ours.encode("a"), ours.eos, 10**6]) == "a"


def test_state_travels_without_the_file(file: Path) -> None:
    ours = Pretrained(str(file), vocab_size=512)
    state = json.loads(json.dumps(ours.to_json()))
    file.unlink()
    for again in (rebuild(state), pickle.loads(pickle.dumps(ours))):
        assert again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
        assert (again.vocab_size, again.eos, again.fingerprint()) == (512, ours.eos, ours.fingerprint())


def test_exported_run_has_the_tokenizer_it_was_trained_with(file: Path, tmp_path: Path) -> None:
    ours, out = Pretrained(str(file)), tmp_path / "out"
    out.mkdir()
    files.write(ours.to_json(), out)
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(file.read_text())
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == {"content": EOS}
    assert files.special(ours.to_json()).ends[0] == ours.eos


def refused_at(file: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Pretrained(str(file), **settings)
    return caught.value.path


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    assert refused_at(tmp_path / "nowhere.json") == "data.tokenizer.file"
    for content in ("", "{", "{}", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert refused_at(tmp_path / "tokenizer.json") == "data.tokenizer.file"


def test_end_of_a_document_and_vocabulary_that_do_not_fit_are_refused(file: Path) -> None:
    assert refused_at(file, eos="<|endd|>") == "data.tokenizer.eos"
    assert refused_at(file, vocab_size=10) == "data.tokenizer.vocab_size"
    for eos in ("x", [True], [-1], {"a": 1}):
        (file.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert refused_at(file) == "generation_config.json: eos_token_id"
    (file.parent / "generation_config.json").unlink()
    (file.parent / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refused_at(file)
    (file.parent / "tokenizer_config.json").unlink()
    assert refused_at(file) == "data.tokenizer.eos"
    assert Pretrained(str(file), eos=EOS).eos >= 0


@pytest.mark.parametrize(
    ("files", "bos", "ends"),
    [
        ({"tokenizer_config.json": {"eos_token": "a", "bos_token": {"content": "b"}}}, "b", ["a"]),
        ({"special_tokens_map.json": {"eos_token": {"content": "a"}, "bos_token": "b"}}, "b", ["a"]),
        ({"generation_config.json": {"eos_token_id": ["a", "c"], "bos_token_id": "b"}}, "b", ["a", "c"]),
        ({"config.json": {"eos_token_id": "a"}}, None, ["a"]),  # GPT-2 names its end token nowhere else
        ({"origin.json": {"config": {"eos_token_id": ["a"], "bos_token_id": "b"}}}, "b", ["a"]),
        ({"tokenizer_config.json": {"eos_token": "a", "extra_special_tokens": {"eot_token": "c"}}}, None, ["a", "c"]),
        (
            {"tokenizer_config.json": {"eos_token": "a"}, "generation_config.json": {"eos_token_id": ["b", "a"]}}
            | {"config.json": {"eos_token_id": "c"}},
            None,
            ["a", "b", "c"],
        ),
    ],
    ids=str,
)
def test_special_tokens_are_gathered_from_every_file_that_names_one(
    files: dict[str, dict[str, object]], bos: str | None, ends: list[str], tmp_path: Path
) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    ids = Engine.from_file(str(tmp_path / "tokenizer.json")).get_vocab()

    def numbered(key: str, value: object) -> object:
        if isinstance(value, dict):
            return {k: numbered(k, v) for k, v in value.items()}
        words = value if isinstance(value, list) else [value]
        found = [ids[word] if key.endswith("_id") else word for word in words]
        return found if isinstance(value, list) else found[0]

    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(numbered("", values)))
    ours = Pretrained(str(tmp_path / "tokenizer.json"))
    assert ours.bos == (None if bos is None else ids[bos])
    assert ours.eos == ids[ends[0]] and ours.ends == {ids[end] for end in ends}
    again = rebuild(json.loads(json.dumps(ours.to_json())))
    assert (again.bos, again.ends, again.special_words) == (ours.bos, ours.ends, ours.special_words)


def test_token_that_ends_a_turn_ends_a_text_wherever_it_is_listed(tmp_path: Path) -> None:
    engine = byte_level()
    engine.add_special_tokens(["<|im_end|>"])
    engine.add_tokens(["<|eot_id|>"])  # a plain word, whatever it looks like
    engine.save(str(tmp_path / "tokenizer.json"))
    ours = Pretrained(str(tmp_path / "tokenizer.json"), eos=EOS)
    assert ours.ends == {ours.eos, engine.token_to_id("<|im_end|>")}


@pytest.mark.parametrize("name", ["../chat_template.jinja", "run.sh", "additional_chat_templates/../a.jinja"])
def test_file_of_a_checkpoint_that_no_tokenizer_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        companions.check({name: "{}"}, "data.tokenizer")
    assert (refused.value.path, refused.value.value) == ("data.tokenizer", name) and refused.value.remedy


def test_cache_of_tokens_does_not_depend_on_a_template(file: Path) -> None:
    before = Pretrained(str(file)).fingerprint()
    (file.parent / "chat_template.jinja").write_text("{{ messages }}")
    after = Pretrained(str(file))
    assert after.companions["chat_template.jinja"] == "{{ messages }}" and after.fingerprint() == before


def test_template_of_a_training_takes_the_place_of_the_tokenizers(file: Path, tmp_path: Path) -> None:
    from blockwright.training.data.sorting import Sorting

    (file.parent / "chat_template.jinja").write_text("{{ messages }}")
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    for chat, kept in (("plain", "{{ messages }}"), ({"name": "jinja", "template": str(own)}, own.read_text())):
        parts = {"corpus": Sorting(8, 1), "tokenizer": Pretrained(str(file)), "cache_dir": str(tmp_path / "cache")}
        data = built.data("chat", batch_size=1, chat=chat, **parts)
        data.prepare_data()
        data.setup()
        assert rebuild(data.state_dict()["tokenizer"]).companions["chat_template.jinja"] == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_text_of_the_template_with_every_tokenizer(
    kind: str, file: Path, tmp_path: Path
) -> None:
    from blockwright.training.data.sorting import Sorting

    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}")
    tokenizer = Pretrained(str(file)) if kind == "pretrained" else KINDS[kind](300)  # type: ignore[call-arg]
    chat = {"name": "jinja", "template": str(own)}
    data = built.data("chat", corpus=Sorting(8, 1), tokenizer=tokenizer, chat=chat, cache_dir=str(tmp_path / "cache"))
    words = rebuild(data.state_dict()["tokenizer"])
    own.unlink()
    form = registry.build("chat", registry.Node(reread(chat, words), "data.chat"), registry.Scope({}, {}))
    form.prepare(words)
    assert [piece.text for piece in form.render([{"role": "assistant", "content": "a"}])] == ["a!"]

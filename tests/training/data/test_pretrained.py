"""Somebody else's tokenizer as ours: the same ids, no special token from a text, bytes that add up."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from interop import tokenizer as interop_tokenizer
from registry import ConfigError
from training.data.tokenizers.pretrained import Pretrained
from training.data.tokenizers.rebuild import rebuild

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


def test_ids_are_the_librarys_without_what_it_puts_around_a_text(file: Path) -> None:
    ours, theirs = Pretrained(str(file)), Engine.from_file(str(file))
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.vocab_size == theirs.get_vocab_size() and ours.fitted


def test_no_text_spells_the_end_of_a_document(file: Path) -> None:
    ours = Pretrained(str(file))
    ids = ours.encode(f"a{EOS}b")
    assert ours.eos not in ids and ours.decode(ids) == f"a{EOS}b"
    assert ours.decode([*ours.encode("a"), ours.eos, 10**6]) == "a"


def test_bytes_of_tokens_add_up_to_the_text(file: Path) -> None:
    ours = Pretrained(str(file))
    in_front = "Prepend" in file.read_text()
    counted = ours.token_bytes()
    assert counted[ours.encode(TEXT)].sum() == len(TEXT.encode()) + in_front
    assert counted[ours.eos] == 0 and len(counted) == ours.vocab_size


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
    interop_tokenizer.write(ours.to_json(), out)
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(file.read_text())
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == EOS
    assert interop_tokenizer.eos_id(ours.to_json()) == ours.eos


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 3}'])
def test_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for path in (tmp_path / "tokenizer.json", tmp_path / "nowhere.json"):
        with pytest.raises(ConfigError, match=r"tokenizer\.json") as caught:
            Pretrained(str(path))
        assert caught.value.path == "data.tokenizer.file"


def test_end_of_a_document_must_be_known(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Pretrained(str(file), eos="<|endd|>")
    assert caught.value.path == "data.tokenizer.eos" and EOS in caught.value.remedy
    (file.parent / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="must end a document"):
        Pretrained(str(file))
    assert Pretrained(str(file), eos=EOS).eos >= 0


def test_vocabulary_smaller_than_the_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Pretrained(str(file), vocab_size=10)
    assert caught.value.path == "data.tokenizer.vocab_size"

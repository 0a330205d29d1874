"""Tokenizers: text survives, eos is out of reach of any text, bytes add up, the state is plain JSON."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.training.data.chat.jinja import reread
from blockwright.training.data.tokenizers import bpe as bpe_module
from blockwright.training.data.tokenizers import companions, files
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.pretrained import Pretrained
from blockwright.training.data.tokenizers.rebuild import KINDS, rebuild
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars, Tokenizer, token_dtype
from tests import built

ROOT = Path(__file__).parents[3]
TEXTS = [
    "To be, or not to be: that is the question.\n\n" * 20,
    "Whether 'tis nobler in the mind — to suffer\n\n\n" * 20,
]
SPELLED = "<|endoftext|> <unk> </s> <eos> [EOS]"


def fitted(kind: str) -> Tokenizer:
    tokenizer = {"bytes": Bytes(300), "chars": Chars(64), "bpe": BPE(320)}[kind]
    tokenizer.fit(TEXTS)
    return tokenizer


@pytest.fixture(scope="module", params=("bpe", "bytes", "chars"))
def tokenizer(request) -> Tokenizer:
    return fitted(request.param)


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return fitted("bpe")


def test_the_train_text_survives(tokenizer):
    for text in [*TEXTS, ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_within_the_vocabulary_and_never_eos(tokenizer):
    ids = tokenizer.encode(TEXTS[0] + SPELLED)
    assert ids.dtype == token_dtype(tokenizer.vocab_size) and ids.ndim == 1
    assert ids.max() < tokenizer.vocab_size and tokenizer.eos < tokenizer.vocab_size
    assert tokenizer.eos not in ids


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer):
    n_bytes = tokenizer.token_bytes()
    assert n_bytes.shape == (tokenizer.vocab_size,) and n_bytes[tokenizer.eos] == 0
    for text in TEXTS:
        assert n_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_decoding_never_fails(tokenizer):
    assert tokenizer.decode([tokenizer.eos]) == ""
    assert isinstance(tokenizer.decode(np.arange(-100, tokenizer.vocab_size + 100)), str)
    assert tokenizer.decode([]) == ""


def test_the_state_rebuilds_the_tokenizer_from_plain_json_and_in_another_process(tokenizer):
    for again in (rebuild(json.loads(json.dumps(tokenizer.to_json()))), pickle.loads(pickle.dumps(tokenizer))):
        assert type(again) is type(tokenizer) and again.fitted and again.eos == tokenizer.eos
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
        assert (again.token_bytes() == tokenizer.token_bytes()).all()


def test_what_is_unfitted_says_so_and_stays_so_in_its_state():
    for kind in ("chars", "bpe"):
        blank = KINDS[kind](300)
        assert not blank.fitted and not rebuild(blank.to_json()).fitted
        with pytest.raises(RuntimeError, match="call fit"):
            blank.encode("a")


def test_an_unknown_kind_in_a_checkpoint_is_refused_and_one_of_a_plug_in_is_accepted():
    with pytest.raises(ConfigError):
        rebuild({"kind": "byte", "vocab_size": 257})
    assert isinstance(rebuild({"kind": "byte", "vocab_size": 257}, {"byte": Bytes}), Bytes)


@settings(max_examples=40)
@given(st.text())
def test_any_text_survives_as_bytes_and_as_bpe(bpe, text):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=40)
@given(st.text(alphabet=sorted(set("".join(TEXTS)))))
def test_text_of_known_characters_survives_as_chars(text):
    tokenizer = fitted("chars")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_bpe_is_the_same_in_every_process(bpe):
    code = "from blockwright.training.data.tokenizers.bpe import BPE; "
    code += f"b = BPE(320); b.fit({TEXTS!r}); print(b.fingerprint())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.strip() == bpe.fingerprint()


def test_bpe_merges_and_a_small_corpus_leaves_ids_unused_and_keeps_eos_last(bpe):
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    tokenizer = BPE(4096)
    tokenizer.fit(["aa aa"])
    assert tokenizer.eos == 4095 and tokenizer.token_bytes()[-1] == 0
    assert tokenizer.decode(tokenizer.encode("zebra")) == "zebra"


def test_a_character_unseen_in_training_is_unknown_and_counts_as_a_byte():
    tokenizer = fitted("chars")
    assert tokenizer.encode("Zé").tolist() == [0, 0] and tokenizer.decode([0]) == "\ufffd"
    assert tokenizer.token_bytes()[0] == 1


def test_a_vocabulary_too_small_is_refused():
    need = len(set("".join(TEXTS))) + 2
    Chars(need).fit(TEXTS)
    small = [lambda cls=cls, least=least: cls(least - 1) for cls, least in ((Bytes, 257), (BPE, 257), (Chars, 3))]
    for refuse in (lambda: Chars(need - 1).fit(TEXTS), lambda: Chars(need - 1).check(TEXTS), *small):
        with pytest.raises(ConfigError) as refused:
            refuse()
        assert refused.value.path == "data.tokenizer.vocab_size"
    assert Bytes(257) and BPE(257) and Chars(3)


def test_bpe_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError):
        BPE()


SPACED = st.text("ab \n\t\r1,.'\u4e00\u3002\u00e9\x1c\u00a0\u2028\ufeff", max_size=60)


@settings(max_examples=40)
@given(
    SPACED
    | st.lists(st.sampled_from(["to", " be", "\n", " ", "x", "'s", "1", "\t", ",", "."]), max_size=60).map("".join),
    st.integers(1, 7),
    st.integers(1, 9),
)
def test_a_document_in_parts_has_the_ids_of_the_whole(bpe, text, piece, part):
    for tokenizer in (Bytes(), fitted("chars"), bpe):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe_module, "PART", len(text) + 1)
            whole = tokenizer.encode(text).tolist()
            patch.setattr(bpe_module, "PART", part)
            parts = list(tokenizer.parts(text[i : i + piece] for i in range(0, len(text), piece)))
            assert [i for each in parts for i in tokenizer.encode(each).tolist()] == whole
            assert "".join(parts) == text and "" not in parts


def test_text_without_line_ends_is_cut_too():
    for text in ("one, two. " * 20_000, "one,two." * 20_000, "\u4e00\u4e01\u3002" * 50_000):
        assert max(map(len, BPE(300).parts([text]))) < bpe_module.PART + 20


def test_a_tokenizer_that_does_not_say_where_to_cut_gets_whole_documents():
    assert list(Tokenizer.parts(Bytes(), ["a", "", "b"])) == ["ab"] and list(Tokenizer.parts(Bytes(), [])) == []


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
def test_special_tokens_are_gathered_from_every_file_that_names_one(files, bos, ends, tmp_path):
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
    from blockwright.training.data.corpora import Sorting

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
def test_a_checkpoint_holds_the_text_of_the_template_with_every_tokenizer(kind, file, tmp_path):
    from blockwright.training.data.corpora import Sorting

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

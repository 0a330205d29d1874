"""Text from a model: from Python, from the command line, and every mistake one message."""

import io
import json
import sys

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.blocks.generation.generate import generate
from blockwright.blocks.generation.sample import Sampling
from blockwright.lab import generate as command
from blockwright.lab.generate import main, show
from blockwright.lab.writer import Request, Writer
from blockwright.registry import ConfigError
from blockwright.registry.printing import printable
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("lab_generate")  # its fixture is slow to set up


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    """Settings of the process are the command's own affair."""
    monkeypatch.setattr(command, "multiply_fastest", lambda *models: None)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def save(tiny, tmp_path_factory):
    """Writes a run's folder whose model is random but sharp."""

    def make(tokenizer=True, **changes):
        folder = tmp_path_factory.mktemp("run")
        decoder = compose(tiny(vocab_size=257, init={"std": 0.3, "depth_scaled": False}, **changes), seed=3)
        weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
        if tokenizer:
            parts["TextDataModule"] = {"tokenizer": Bytes().to_json()}
        (folder / "checkpoints").mkdir()
        torch.save(parts, folder / "checkpoints" / "last.ckpt")
        return folder

    return make


@pytest.fixture(scope="module")
def run(save):
    return save(moe=True)


@pytest.fixture(scope="module")
def writer(run):
    return Writer.open(run, device="cpu")


def greedy(writer, prompt, n):
    tokens = generate(writer.decoder, torch.tensor([[*prompt.encode()]]), n, temperature=0)[0, len(prompt) :].tolist()
    return Bytes().decode(tokens[: tokens.index(256)] if 256 in tokens else tokens)


def test_text_is_that_of_greedy_decoding_alone_or_together_or_from_nothing(writer):
    assert writer.write("To be", 30, temperature=0) == [greedy(writer, "To be", 30)]
    prompts = ["To be, or not", "A", "what is it"]
    together = writer.write(prompts, 20, seed=4, top_p=0.9)
    assert together == [writer.write(p, 20, seed=4 + i, top_p=0.9)[0] for i, p in enumerate(prompts)]
    assert together != writer.write(prompts, 20, seed=5, top_p=0.9)
    request = Request(10, Sampling(0), bos=True)
    expected = generate(writer.decoder, torch.tensor([[256]]), 10, temperature=0)[0, 1:].tolist()
    expected = expected[: expected.index(256)] if 256 in expected else expected
    assert "".join(piece for _, piece in writer.stream([""], request)) == Bytes().decode(expected)


def test_text_ends_before_its_stop_and_says_so(writer):
    whole = greedy(writer, "To be", 30)
    stop, why = whole[12:14], []
    request = Request(30, Sampling(0), stops=(stop,))
    pieces = list(writer.stream(["To be"], request, lambda row, reason, n: why.append((row, reason, n))))
    assert "".join(piece for _, piece in pieces) == whole.split(stop)[0]
    assert [(row, reason) for row, reason, _ in why] == [(0, "stop")]


def test_text_ends_at_every_end_token(run, monkeypatch):
    writer = Writer.open(run, device="cpu")
    first = generate(writer.decoder, torch.tensor([[65, 66]]), 3, temperature=0)[0, 2:].tolist()
    monkeypatch.setattr(Bytes, "ends", frozenset({256, first[2]}))
    why = []
    n = first.index(first[2])
    request = Request(30, Sampling(0))
    text = "".join(p for _, p in writer.stream(["AB"], request, lambda *told: why.append(told)))
    assert why == [(0, "end", n)] and text == Bytes().decode(first[:n])


def test_plain_text_is_prompts_and_what_follows_in_order(run, writer, capsys):
    main([str(run), "--prompt", "To be", "--prompt", "A", "--temperature", "0", "--max-new-tokens", "12"])
    texts = [prompt + greedy(writer, prompt, 12) for prompt in ("To be", "A")]
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n"


def test_json_is_one_document(run, writer, capsys):
    words = "--prompt A --prompt BC --temperature 0 --max-new-tokens 9 --seed 3 --bits 8 --json"
    main([str(run), *words.split()])
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["seed"], told["bits"], told["min_p"], told["top_k"]) == (str(run), 3, 8, None, None)
    assert [c["prompt"] for c in told["completions"]] == ["A", "BC"]
    assert [c["text"] for c in told["completions"]] == writer.write(["A", "BC"], 9, temperature=0, bits=8)
    assert all(c["ended"] in ("length", "end") and 0 <= c["tokens"] <= 9 for c in told["completions"])


def test_attention_without_a_cache_is_refused(writer, monkeypatch):
    from blockwright.blocks.attention.base import Attention

    monkeypatch.setattr(type(writer.decoder.layers[0].attention), "new_cache", Attention.new_cache)
    with pytest.raises(ConfigError, match="new_cache"):
        writer.write("x")


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--drafts", "lookup"]], ids=" ".join)
def test_model_that_has_diverged_is_refused(save, words):
    folder = save()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    parts = torch.load(checkpoint)
    parts["state_dict"]["decoder.embedding.weight"][120] = float("nan")
    torch.save(parts, checkpoint)
    main([str(folder), "--prompt", "aaa", "--max-new-tokens", "1", *words])
    with pytest.raises(ConfigError, match="not finite") as refused:
        main([str(folder), "--prompt", "x", "--max-new-tokens", "3", *words])
    assert refused.value.path == "MODEL" and refused.value.remedy


def printed(capsys, *words):
    main([*words, "--prompt", "ab", "--prompt", "abcabc", "--max-new-tokens", "12", "--json"])
    found = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_drafts_of_every_kind_leave_texts_as_they_are_and_are_counted(save, capsys):
    model, small = str(save(mtp={"depth": 2})), str(save(n_layers=1))
    plain = printed(capsys, model)
    assert "drafts" not in plain
    for kind, tokens in (("mtp", ["--draft-tokens", "1"]), ("lookup", []), (small, [])):
        found = printed(capsys, model, "--drafts", kind, *tokens)
        drafts = found.pop("drafts")
        assert found == plain
        assert drafts["tokens_a_pass"] == 1 + drafts["accepted"] / drafts["passes"]
        assert 0 <= drafts["accepted"] <= drafts["drafted"] and (drafts["drafted"] > 0 or kind == "lookup")


def test_visits_of_a_loop_are_chosen_after_training(save, capsys):
    looped = save(loop={"name": "cycle", "visits": 2, "entry": "add"})
    deeper = save(loop={"name": "cycle", "visits": 5, "entry": "add"})
    texts = []
    for words in ([str(looped)], [str(looped), "--visits", "5"], [str(deeper)]):
        main([*words, "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] != texts[0]


MISTAKES = {  # words after those of a prompt, for the run → path of the message
    "--prompt=": "--prompt",
    "--top-p 2": "--top-p",
    "--temperature nan": "--temperature",
    "--max-new-tokens 0": "--max-new-tokens",
    f"--max-new-tokens {10**12}": "--max-new-tokens",
    f"--max-new-tokens {10**26} --drafts lookup": "--max-new-tokens",
    f"--max-new-tokens {10**12} --bits 6": "--max-new-tokens",
    "--seed -1": "--seed",
    "--tempreture 1": "command line",
    "--dtype int8": "dtype",
    "--device abacus": "device",
    "--prompt x\udcff": "--prompt",
    "--image x.png": "--image",
    "--drafts mtp": "--drafts",  # the model has none
    "--drafts nowhere": "--drafts",
    "--drafts lookup --draft-tokens 0": "--draft-tokens",
    "--drafts lookup --draft-tokens 1000000000": "--draft-tokens",
    "--draft-tokens 2": "--draft-tokens",
    "--visits 2": "--visits",
}


def refused(words, path, capsys):
    with pytest.raises(ConfigError) as refusal:
        main(words)
    assert refusal.value.path == path and refusal.value.remedy and not capsys.readouterr().out
    assert not path.startswith("--") or f"{path[2:].replace('-', '_')}=" not in refusal.value.remedy  # not as in Python


@pytest.mark.parametrize("words", MISTAKES, ids=ascii)
def test_mistake_is_one_message_at_its_option(words, run, capsys):
    refused([str(run), "--prompt", "x", *words.split()], MISTAKES[words], capsys)


def test_mistake_of_a_model_is_one_message(save, run, capsys):
    refused([], "command line", capsys)
    refused(["nowhere", "--prompt", "x"], "MODEL", capsys)
    refused([str(run)], "--prompt", capsys)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        main([str(save(tokenizer=False)), "--prompt", "x"])
    few = str(save(position="learned", max_positions=10))
    refused([few, "--prompt", "xy", "--max-new-tokens", "9"], "--max-new-tokens", capsys)
    refused([few, "--prompt", "x" * 10, "--max-new-tokens", "1"], "--max-new-tokens", capsys)
    for visits in ("0", "2000"):
        refused([str(save(loop={"name": "cycle"})), "--prompt", "ab", "--visits", visits], "--visits", capsys)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_escape_sequences_of_a_model_do_not_reach_a_terminal(writer, monkeypatch, is_terminal):
    monkeypatch.setattr(writer, "stream", lambda prompts, request, ended: iter([(0, "a\x1b[2Jb\n")]))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.StringIO())
        patch.setattr(out, "isatty", lambda: is_terminal, raising=False)
        show(writer, ["x"], Request())
    assert ("\x1b" in out.getvalue()) != is_terminal and "[2Jb\n" in out.getvalue()


def test_terminal_gets_each_piece_at_once_and_drafts_change_no_text(run, save, monkeypatch, capsys, writer):
    class Terminal(io.StringIO):
        flushed = 0

        def isatty(self):
            return True

        def flush(self):
            self.flushed += 1

    words = ["--prompt", "To be", "--temperature", "0", "--max-new-tokens", "12"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal := Terminal())
        main([str(run), *words])
    assert terminal.getvalue() == "To be" + printable(greedy(writer, "To be", 12)) + "\n" and terminal.flushed > 3
    drafting = str(save(mtp={"depth": 1}))
    said = []
    for more in ([], ["--drafts", "mtp"]):
        main([drafting, *words, *more])
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out and "tokens a pass" in said[1].err and "drafts" not in said[0].err

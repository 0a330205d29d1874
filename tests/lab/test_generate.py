"""Text from a model: from Python, from the command line, and every mistake one message."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from warm import Warm

from blockwright.blocks.compose import compose
from blockwright.blocks.generation.generate import generate
from blockwright.blocks.generation.sample import Sampling
from blockwright.lab import generate as command
from blockwright.lab.generate import main
from blockwright.lab.writer import Request, Writer
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.bytes import Bytes

pytestmark = pytest.mark.xdist_group("lab_generate")  # its fixture is slow to set up

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the process are the command's own affair."""
    monkeypatch.setattr(command, "set_float32_matmul", lambda *choice: None)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def save(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a run's folder whose model is random but sharp."""

    def make(tokenizer: bool = True, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("run")
        decoder = compose(tiny(vocab_size=257, init={"std": 0.3, "depth_scaled": False}, **changes), seed=3)
        weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        parts: dict[str, Any] = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
        if tokenizer:
            parts["TextDataModule"] = {"tokenizer": Bytes().to_json()}
        (folder / "checkpoints").mkdir()
        torch.save(parts, folder / "checkpoints" / "last.ckpt")
        return folder

    return make


@pytest.fixture(scope="module")
def run(save: Callable[..., Path]) -> Path:
    return save(moe=True)


@pytest.fixture(scope="module")
def writer(run: Path) -> Writer:
    return Writer.open(run, device="cpu")


def greedy(writer: Writer, prompt: str, n: int) -> str:
    tokens = generate(writer.decoder, torch.tensor([[*prompt.encode()]]), n, temperature=0)[0, len(prompt) :].tolist()
    return Bytes().decode(tokens[: tokens.index(256)] if 256 in tokens else tokens)


# --- in Python --------------------------------------------------------------------------------------------------------


def test_three_lines_write_text(writer: Writer) -> None:
    assert writer.write("To be", 30, temperature=0) == [greedy(writer, "To be", 30)]


def test_prompts_together_give_what_each_gives_alone(writer: Writer) -> None:
    prompts = ["To be, or not", "A", "what is it"]
    together = writer.write(prompts, 20, seed=4, top_p=0.9)
    assert together == [writer.write(p, 20, seed=4 + i, top_p=0.9)[0] for i, p in enumerate(prompts)]
    assert together != writer.write(prompts, 20, seed=5, top_p=0.9)


def test_text_ends_before_its_stop_and_says_so(writer: Writer) -> None:
    whole = greedy(writer, "To be", 30)
    stop, why = whole[12:14], []
    request = Request(30, Sampling(0), stops=(stop,))
    pieces = list(writer.stream(["To be"], request, lambda row, reason, n: why.append((row, reason, n))))
    assert "".join(piece for _, piece in pieces) == whole.split(stop)[0]
    assert [(row, reason) for row, reason, _ in why] == [(0, "stop")]


def test_text_ends_at_every_end_token(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer.open(run, device="cpu")
    first = generate(writer.decoder, torch.tensor([[65, 66]]), 3, temperature=0)[0, 2:].tolist()
    monkeypatch.setattr(Bytes, "ends", frozenset({256, first[2]}))
    why: list[tuple[int, str, int]] = []
    n = first.index(first[2])
    request = Request(30, Sampling(0))
    text = "".join(p for _, p in writer.stream(["AB"], request, lambda *told: why.append(told)))
    assert why == [(0, "end", n)] and text == Bytes().decode(first[:n])


def test_a_document_can_be_begun_from_nothing(writer: Writer) -> None:
    request = Request(10, Sampling(0), bos=True)
    expected = generate(writer.decoder, torch.tensor([[256]]), 10, temperature=0)[0, 1:].tolist()
    expected = expected[: expected.index(256)] if 256 in expected else expected
    assert "".join(piece for _, piece in writer.stream([""], request)) == Bytes().decode(expected)


# --- the command ------------------------------------------------------------------------------------------------------


def test_plain_text_is_prompts_and_what_follows_in_order(
    run: Path, writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--prompt", "To be", "--prompt", "A", "--temperature", "0", "--max-new-tokens", "12"])
    texts = [prompt + greedy(writer, prompt, 12) for prompt in ("To be", "A")]
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n"


def test_terminal_gets_each_piece_at_once(run: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer) -> None:
    class Terminal(io.StringIO):
        flushed = 0

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            self.flushed += 1

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    main([str(run), "--prompt", "To be", "--temperature", "0", "--max-new-tokens", "12"])
    assert terminal.getvalue() == "To be" + greedy(writer, "To be", 12) + "\n" and terminal.flushed > 3


def test_json_is_one_document(run: Path, writer: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--prompt A --prompt BC --temperature 0 --max-new-tokens 9 --seed 3 --bits 8 --json"
    main([str(run), *words.split()])
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["seed"], told["bits"], told["min_p"], told["top_k"]) == (str(run), 3, 8, None, None)
    assert [c["prompt"] for c in told["completions"]] == ["A", "BC"]
    assert [c["text"] for c in told["completions"]] == writer.write(["A", "BC"], 9, temperature=0, bits=8)
    assert all(c["ended"] in ("length", "end") and 0 <= c["tokens"] <= 9 for c in told["completions"])


@pytest.mark.parametrize(
    ("words", "path", "says"),
    [
        (["nowhere", "--prompt", "x"], "MODEL", "no such file or folder"),
        (["RUN"], "--prompt", "is required"),
        (["RUN", "--prompt", "x", "--prompt="], "--prompt", "is empty"),
        (["RUN", "--prompt", "x", "--top-p", "2"], "--top-p", "at most 1"),
        (["RUN", "--prompt", "x", "--temperature", "nan"], "--temperature", "finite"),
        (["RUN", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens", "1 or more"),
        (["RUN", "--prompt", "x", "--seed", "-1"], "--seed", "whole number"),
        (["RUN", "--prompt", "x", "--tempreture", "1"], "command line", "--temperature"),
        (["RUN", "--prompt", "x", "--dtype", "int8"], "dtype", "bfloat16"),
        (["RUN", "--prompt", "x", "--device", "abacus"], "device", "no such device"),
        (["RUN", "--prompt", "x\udcff"], "--prompt", "no text in UTF-8"),
        (["RUN", "--prompt", "x", "--image", "x.png"], "--image", "reads text alone"),
        ([], "command line", "MODEL"),
    ],
    ids=str,
)
def test_mistake_is_one_message_at_its_option(
    words: list[str], path: str, says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        main([str(run) if word == "RUN" else word for word in words])
    assert refused.value.path == path and says in refused.value.render()
    assert not path.startswith("--") or f"{path[2:].replace('-', '_')}=" not in refused.value.remedy  # not as in Python
    assert not capsys.readouterr().out


def test_model_without_a_tokenizer_is_refused(save: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        main([str(save(tokenizer=False)), "--prompt", "x"])


def test_more_than_learned_positions_is_refused_with_what_fits(save: Callable[..., Path]) -> None:
    run = save(position="learned", max_positions=10)
    with pytest.raises(ConfigError, match="at most 8") as refused:
        main([str(run), "--prompt", "xy", "--max-new-tokens", "9"])
    assert refused.value.path == "--max-new-tokens"
    with pytest.raises(ConfigError, match="Shorten the prompt to 9 tokens"):
        main([str(run), "--prompt", "x" * 10, "--max-new-tokens", "1"])


@pytest.mark.parametrize(("n", "words"), [(10**12, []), (10**26, ["--drafts", "lookup"]), (10**12, ["--bits", "6"])])
def test_more_tokens_than_memory_holds_are_refused(run: Path, n: int, words: list[str]) -> None:
    with pytest.raises(ConfigError, match="memory of cpu") as refused:
        main([str(run), "--prompt", "xy", "--max-new-tokens", str(n), *words])
    assert refused.value.path == "--max-new-tokens"


def test_attention_without_a_cache_is_refused(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockwright.blocks.attention.base import Attention

    monkeypatch.setattr(type(writer.decoder.layers[0].attention), "new_cache", Attention.new_cache)
    with pytest.raises(ConfigError, match="new_cache"):
        writer.write("x")


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--drafts", "lookup"]], ids=" ".join)
def test_model_that_has_diverged_is_refused(save: Callable[..., Path], words: list[str]) -> None:
    folder = save()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    parts = torch.load(checkpoint)
    parts["state_dict"]["decoder.embedding.weight"][120] = float("nan")
    torch.save(parts, checkpoint)
    main([str(folder), "--prompt", "aaa", "--max-new-tokens", "1", *words])
    with pytest.raises(ConfigError, match="not finite") as refused:
        main([str(folder), "--prompt", "x", "--max-new-tokens", "3", *words])
    assert refused.value.path == "MODEL" and refused.value.remedy


@pytest.mark.slow
def test_command_refuses_without_a_traceback(warm: Warm, environment: dict[str, str]) -> None:
    done = warm.run("-m", "blockwright.lab.generate", "nowhere", "--prompt", "x", cwd=ROOT, env=environment)
    assert done.returncode == 64 and not done.stdout
    assert done.stderr.startswith("error: MODEL = nowhere") and "Traceback" not in done.stderr


def test_page_says_what_the_command_takes() -> None:
    page = (ROOT / "docs/how-to/generate.md").read_text()
    flags = {flag for action in command._parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert not [flag for flag in flags - {"--help"} if flag not in page]


# --- drafts -----------------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*words, "--prompt", "ab", "--prompt", "abcabc", "--max-new-tokens", "12", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.slow
def test_drafts_of_every_kind_leave_texts_as_they_are_and_are_counted(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, small = str(save(mtp={"depth": 2})), str(save(n_layers=1))
    plain = printed(capsys, model)
    assert "drafts" not in plain
    for kind, tokens in (("mtp", ["--draft-tokens", "1"]), ("lookup", []), (small, [])):
        found = printed(capsys, model, "--drafts", kind, *tokens)
        drafts = found.pop("drafts")
        assert found == plain
        assert drafts["tokens_a_pass"] == 1 + drafts["accepted"] / drafts["passes"]
        assert 0 <= drafts["accepted"] <= drafts["drafted"] and (drafts["drafted"] > 0 or kind == "lookup")


def test_share_of_accepted_drafts_goes_to_stderr_beside_plain_text(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save(mtp={"depth": 1}))
    main([model, "--prompt", "ab", "--max-new-tokens", "5"])
    plain = capsys.readouterr()
    main([model, "--prompt", "ab", "--max-new-tokens", "5", "--drafts", "mtp"])
    drafted = capsys.readouterr()
    assert drafted.out == plain.out and "tokens a pass" in drafted.err and "drafts" not in plain.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--drafts", "mtp"], "--drafts"),  # the model has none
        (["--drafts", "nowhere"], "--drafts"),
        (["--drafts", "lookup", "--draft-tokens", "0"], "--draft-tokens"),
        (["--drafts", "lookup", "--draft-tokens", "1000000000"], "--draft-tokens"),
        (["--draft-tokens", "2"], "--draft-tokens"),
    ],
)
def test_drafts_that_cannot_be_are_refused(run: Path, words: list[str], option: str) -> None:
    with pytest.raises(ConfigError) as error:
        main([str(run), "--prompt", "ab", *words])
    assert error.value.path == option and error.value.remedy


def test_visits_of_a_loop_are_chosen_after_training(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    looped = save(loop={"name": "cycle", "visits": 2, "entry": "add"})
    deeper = save(loop={"name": "cycle", "visits": 5, "entry": "add"})
    texts = []
    for words in ([str(looped)], [str(looped), "--visits", "5"], [str(deeper)]):
        main([*words, "--prompt", "ab", "--max-new-tokens", "8", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2] != texts[0]


@pytest.mark.parametrize(("loop", "visits"), [({"name": "cycle"}, "0"), ({"name": "cycle"}, "2000"), (None, "2")])
def test_visits_that_cannot_be_are_refused(save: Callable[..., Path], loop: Any, visits: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        main([str(save(**({"loop": loop} if loop else {}))), "--prompt", "ab", "--visits", visits])
    assert refusal.value.path == "--visits" and refusal.value.remedy

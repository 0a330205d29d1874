"""Reading tests: prompts whose answer stands where it is said to, scores that are right, refusals, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.lab.report.svg import standalone
from blockwright.plugins.long_context.reading import base
from blockwright.plugins.long_context.reading.base import (
    Prompt,
    ReadingTest,
    Sentences,
    Symbols,
    Wording,
    compose_prompt,
    find,
    reading_test,
)
from blockwright.plugins.long_context.reading.command import lengths_of, main
from blockwright.plugins.long_context.reading.measure import (
    Grid,
    PositionLoss,
    Reading,
    forced_scores,
    generated_scores,
    position_loss,
    prompts,
    read,
    window_loss,
)
from blockwright.plugins.long_context.reading.report import heat_map, written
from blockwright.registry import ConfigError, RegistrationError
from blockwright.training.data.tokenizers.tokenizer import Bytes

TEXT = np.frombuffer(b"It was the best of times, it was the worst of times, it was the age of wisdom. " * 99, np.uint8)
SUITES = ("needle", "multi_key", "multi_query", "multi_value", "copy", "variable_tracking", "frequent_words")
WORDS: dict[str, Wording] = {"symbols": Symbols(), "sentences": Sentences(Bytes())}


class Oracle(torch.nn.Module):
    """A decoder that knows what comes: the next token of the rows that it has been shown."""

    def __init__(self, rows: list[list[int]], wrong: int = 0) -> None:
        super().__init__()
        self.rows, self.wrong = rows, wrong
        self.embedding = torch.nn.Embedding(1, 1)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        known = {tuple(row[: tokens.shape[1]]): row for row in self.rows}
        following = [known[tuple(row)][1 : tokens.shape[1] + 1] for row in tokens.tolist()]
        return torch.tensor(following)[..., None].float(), []

    def logits(self, hidden: Tensor) -> Tensor:
        aim = hidden[..., 0].long()
        aim[: self.wrong] = 0
        return torch.nn.functional.one_hot(aim, 300).float()


def some(suite: str, words: str = "symbols", length: int = 2048, depth: float = 0.5, **grid: Any) -> list[Prompt]:
    (test,) = find([suite], "suites")
    return list(prompts(test, length, depth, TEXT, WORDS[words], Grid([length], **{"samples": 4, **grid})))


@pytest.mark.parametrize(("suite", "words"), pairs(SUITES, list(WORDS)))
def test_a_prompt_ends_with_its_answers_which_stand_in_its_text(suite: str, words: str) -> None:
    for prompt in some(suite, words):
        assert len(prompt.tokens) == 2048 and prompt.accepted
        for index, ids in prompt.accepted.items():
            assert index >= prompt.start and prompt.tokens[index] in ids
        text = " ".join(map(str, prompt.tokens[: prompt.start]))
        for answer in prompt.answers:
            assert " ".join(map(str, answer)) in text
    assert some(suite, words)[0] == some(suite, words)[0] != some(suite, words, seed=1)[0]


def test_the_needle_stands_at_its_depth() -> None:
    for depth in (0.0, 0.25, 1.0):
        for prompt in some("needle", depth=depth):
            key = prompt.tokens[prompt.start - 3 : prompt.start]
            rows = [prompt.tokens[i : i + 3] for i in range(prompt.start)]
            assert rows.index(key) == round(depth * (prompt.start - 3 - 8))


def test_one_of_many_keys_is_asked_and_all_values_of_one_key() -> None:
    (prompt,) = some("multi_key", samples=1)
    symbols = sum(token >= 128 for token in prompt.tokens)
    assert symbols == 5 * 8 and len(prompt.answers) == 1
    (prompt,) = some("multi_value", samples=1)
    key = prompt.tokens[prompt.start - 3 : prompt.start]
    assert sum(prompt.tokens[i : i + 3] == key for i in range(2046)) == 6 and len(prompt.answers) == 3


def test_all_keys_are_asked_in_turn_and_a_passage_is_repeated() -> None:
    (prompt,) = some("multi_query", samples=1)
    tokens, asked = prompt.tokens, sorted(prompt.accepted)
    assert len(asked) == 4 * 5 and asked[0] == prompt.start
    for first in asked[::5]:
        fact = tokens[first - 3 : first + 5]  # a key and its value, as they stand in the text
        assert sum(tokens[i : i + 8] == fact for i in range(len(tokens))) == 2
    (prompt,) = some("copy", samples=1)
    tokens, start = prompt.tokens, prompt.start
    assert len(prompt.accepted) == 5 * 5 and start == len(tokens) - 25
    assert any(tokens[i : i + 30] == tokens[start - 5 :] for i in range(start - 5))


def test_answers_in_any_order_are_right_only_while_they_are_not_listed() -> None:
    prompt = compose_prompt(TEXT, 100, [[5, 6]], 0.5, [9], [[1, 2], [1, 3], [4, 4]], [7], np.random.RandomState(0))
    assert prompt.tokens[-9:] == [9, 1, 2, 7, 1, 3, 7, 4, 4]
    assert [sorted(prompt.accepted[i]) for i in sorted(prompt.accepted)] == [[1, 4], [2, 3], [1, 4], [3], [4], [4]]


def test_a_chain_of_variables_stands_in_its_order() -> None:
    (prompt,) = some("variable_tracking", samples=1)
    value, names = prompt.tokens[prompt.start - 5 : prompt.start], prompt.answers
    text, at = prompt.tokens[: prompt.start - 5], 0
    for statement in ([*value, *names[0]], [*names[0], *names[1]], [*names[1], *names[2]]):
        at = next(i for i in range(at, len(text)) if text[i : i + len(statement)] == statement)


@pytest.mark.parametrize("length", [64, 97, 2048])
def test_the_frequent_words_are_the_most_frequent_of_the_text_that_is_shown(length: int) -> None:
    for prompt in some("frequent_words", length=length, samples=30):
        assert len(prompt.tokens) == length
        text = prompt.tokens[: prompt.start - len(WORDS["symbols"].ask_frequent(3))]
        words = [tuple(text[i : i + 3]) for i in range(0, len(text) - 2, 3)]
        asked = {tuple(answer) for answer in prompt.answers}
        assert min(map(words.count, asked)) > max(map(words.count, {*words} - asked), default=0)


def test_scores_are_the_share_of_right_tokens() -> None:
    given = some("needle", length=300)
    rows = [prompt.tokens for prompt in given]
    assert forced_scores(Oracle(rows), given) == [1.0] * 4  # type: ignore[arg-type]
    assert forced_scores(Oracle(rows, wrong=2), given) == [0.6] * 4  # type: ignore[arg-type]


def test_generated_answers_are_looked_for_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given = some("multi_value", length=300)

    class Written:
        def __init__(self, decoder: Any, asked: list[list[int]], most: int, sampling: Any) -> None:
            texts = [p.tokens[p.start :] for p in given]
            texts[0] = texts[0][:8] + [0] * (len(texts[0]) - 8)  # only the first value
            self.steps = list(zip(*texts, strict=True))
            assert asked == [p.tokens[: p.start] for p in given] and sampling.temperature == 0

        def __iter__(self) -> Iterator[Any]:
            return iter(self.steps)

    monkeypatch.setattr("blockwright.plugins.long_context.reading.measure.Continuations", Written)
    assert generated_scores(None, given) == [pytest.approx(1 / 3), 1, 1, 1]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def decoder(tiny: Callable[..., dict[str, Any]]) -> Any:
    return compose(tiny(vocab_size=257, max_positions=2048), seed=0).eval()


def test_a_real_model_is_read_by_both_scores(decoder: Any) -> None:
    tests = find(["needle", "frequent_words"], "suites")
    found = [read(decoder, test, TEXT, Symbols(), Grid([64, 128], samples=2, generated=True)) for test in tests]
    assert np.shape(found[0].teacher_forced) == np.shape(found[0].generated) == (2, 5)
    assert np.shape(found[1].teacher_forced) == (2, 1) and found[1].depths == []


def test_loss_by_position_scores_the_same_tokens_at_every_distance(decoder: Any) -> None:
    rows: list[Tensor] = []

    class Looking:
        embedding = decoder.embedding

        def hidden(self, tokens: Tensor) -> Any:
            rows.append(tokens)
            return torch.zeros(*tokens.shape, 1), []

        def logits(self, hidden: Tensor) -> Tensor:  # the loss is that of the token itself: 0 … 256 by value
            return torch.linspace(0, 5, 257).expand(len(hidden), 257)

    text = np.random.RandomState(0).randint(0, 256, 5000)
    found = position_loss(Looking(), text, 512, 64)  # type: ignore[arg-type]
    assert found.edges == [8, 16, 32, 64, 128, 256, 512] and len(rows[0][0]) == 512
    assert len(found.stretches) == 4 and np.mean(found.stretches, 0) == pytest.approx(found.losses)
    late = found.losses[3:]
    assert max(late) - min(late) < 1e-5 and abs(found.losses[0] - late[0]) > 1e-4
    assert window_loss(decoder, TEXT, 64) == pytest.approx(np.log(257), abs=0.3)


def test_the_slope_is_in_nats_a_doubling_beyond_the_window_and_its_error_over_stretches_of_the_text() -> None:
    assert PositionLoss([8, 16, 32, 64, 128], [9.0, 9.0, 2.0, 2.1], 32).slope == pytest.approx(0.1)
    assert PositionLoss([8, 16], [3.0], 64).slope is None
    assert PositionLoss([8, 16, 32], [3.0, 2.0], 16, [[3.0, 2.0], [2.0, 1.0]]).slope_error is None
    found = PositionLoss([8, 16, 32], [2.0, 2.2], 8, [[1.0, 1.1], [3.0, 3.3]])
    assert found.slope == pytest.approx(0.2) and found.slope_error == pytest.approx(0.1)
    assert found.as_plain()["slope_error"] == found.slope_error
    assert PositionLoss([8, 16, 32], [1.0, 1.1], 8, [[1.0, 1.1]]).slope_error is None


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_lengths_are_written_with_suffixes() -> None:
    assert lengths_of("512,4k,128K,1m") == [512, 4096, 131072, 2**20] and written(131072) == "128k"
    for wrong in ("", "4q", "k", "0", "-4", "4.5k"):
        with pytest.raises(ConfigError, match="whole numbers"):
            lengths_of(wrong)


def test_another_package_adds_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_tests", dict(base._tests))

    @reading_test("mine")
    class Mine(ReadingTest):
        def prompt(self, length: int, depth: float, text: Any, words: Wording, random: Any) -> Prompt:
            return compose_prompt(text, length, [[200, 201]], depth, [200], [[201]], [], random)

    (test,) = find(["mine"], "suites")
    assert next(prompts(test, 100, 0.5, TEXT, Symbols(), Grid([100]))).tokens[-2:] == [200, 201]
    with pytest.raises(RegistrationError):
        reading_test("needle")(Mine)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("read")
    made = compose(tiny(vocab_size=257, max_positions=256), seed=0)
    weights = {f"decoder.{k}": v for k, v in made.state_dict().items()}
    state = {"tokenizer": Bytes().to_json()}
    model = {"hyper_parameters": {"model": made.config}, "state_dict": weights, "TextDataModule": state}
    torch.save(model, folder / "some.ckpt")
    (folder / "text.txt").write_bytes(TEXT.tobytes())
    return folder


def given(run: Any, *more: str) -> list[str]:
    return [str(run / "some.ckpt"), "--text", str(run / "text.txt"), "--samples", "2", *more]


@pytest.mark.slow
def test_the_command_prints_grids_and_writes_heat_maps(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    asked = ["--suite=needle,frequent_words", "--lengths=64,128", "--generate", "--window=32", "--out", str(tmp_path)]
    main(given(run, *asked, "--position", "{name: yarn, factor: 4, original_positions: 64, pairing: half_split}"))
    out = capsys.readouterr().out
    assert "needle: right tokens" in out and "128" in out and "nats per doubling" in out
    document = json.loads((tmp_path / "reading.json").read_text())
    assert [test["test"] for test in document["tests"]] == ["needle", "frequent_words"]
    assert (tmp_path / "reading-needle.svg").read_text().count("<rect") >= 2 * 5
    main(given(run, *asked[:2], "--json"))
    assert json.loads(capsys.readouterr().out)["tests"][0]["generated"] is None


NEEDLE = ["--suite=needle", "--lengths=64"]
WRONG = [
    (["--suite=nedle", "--lengths=64"], "--suite"),
    (["--suite=,", "--lengths=64"], "--suite"),
    (["--suite=needle", "--lengths=4k"], "--lengths"),  # more positions than the model has
    (["--suite=needle", "--lengths=20"], "--lengths"),  # the fact is more than half of it
    (["--suite=needle", "--lengths=many"], "--lengths"),
    ([*NEEDLE, "--depths=2"], "--depths"),
    ([*NEEDLE, "--depths=deep"], "--depths"),
    ([*NEEDLE, "--samples=0"], "--samples"),
    ([*NEEDLE, "--symbols=128,300"], "--symbols"),
    ([*NEEDLE, "--wording=prose"], "--wording"),
    ([*NEEDLE, "--dtype=int8"], "dtype"),
    ([*NEEDLE, "--position={name: yarn}"], "model.position.pairing"),
    ([*NEEDLE, "--text=nowhere"], "--text"),
]


def test_a_wrong_command_is_one_message(run: Any) -> None:
    for more, path in WRONG:
        with pytest.raises(ConfigError) as caught:
            main(given(run, *more))
        assert caught.value.path == path, more


def test_a_heat_map_names_its_cells() -> None:
    found = Reading("needle", [512, 4096], [0.1, 0.9], [[1.0, 0.5], [0.25, 0.0]])
    svg = standalone(heat_map(found, "x"))
    assert "4,096 tokens, depth 10 %: 0.25" in svg and ">4k<" in svg and ">0.12<" in svg

"""Conversations about pictures held by a model: turns, pictures blanked and shuffled, figures, chart, report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blockwright.blocks.compose import compose
from blockwright.lab.report.svg import standalone
from blockwright.plugins.vision.asking import measure
from blockwright.plugins.vision.asking.callback import Asking, table
from blockwright.plugins.vision.asking.found import FILE, Found, accuracies, sample, sight, sights
from blockwright.plugins.vision.data.pages import Pages
from blockwright.plugins.vision.data.picture_rows import PictureRendering, images_of
from blockwright.registry import ConfigError
from blockwright.training.data.chat.formats import Plain
from blockwright.training.data.tokenizers.tokenizer import Bytes

TOWER = {"name": "siglip", "tile": 16, "patch": 4, "width": 16, "depth": 1, "n_heads": 2, "norm": "layernorm"}
SIGHT: dict[str, Any] = {"vision": {**TOWER, "ffn": {"name": "gelu", "d_ff": 16}}, "projector": "downsample_mlp"}
SIGHT |= {"vocab_size": 258, "max_positions": 256, "images": {"name": "early_fusion", "image_token": 257}}
SIGHT |= {"tiling": "grid_2d"}
PAGES = Pages(train=1, held_out=12, cell=16, where=1.0)


def rendering(model: dict[str, Any]) -> PictureRendering:
    return PictureRendering(images_of(model), PAGES.pictures, Bytes(258), Plain(), 256)


def scripted(change: Callable[[str], str]) -> Any:
    return lambda decoder, rendering, talks: [change(talk.truth) for talk in talks]


def asked(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> list[measure.Answer]:
    monkeypatch.setattr(measure, "_answers", scripted(change))
    return list(measure.ask(None, None, PAGES, list(PAGES.conversations("val"))))  # type: ignore[arg-type]


def test_later_questions_follow_the_models_own_answers(tiny: Callable[..., Any], monkeypatch: Any) -> None:
    model = tiny(**SIGHT)
    made, first = rendering(model), next(iter(PAGES.conversations("val")))
    talk = measure.Talk(0, first, PAGES.pictures(first))
    assert bytes(i for i in made.prompt(first, talk.said) if i < 256) == b"read:"
    talk.reply("wrong")
    assert bytes(i for i in made.prompt(first, talk.said) if i < 256) == b"read:wrongcount:"
    assert talk.truth == first.messages[3]["content"] and talk.open
    for _ in first.messages[3::2]:
        talk.reply("0")
    assert not talk.open and len(talk.said) == len(first.messages)


def test_a_batch_answers_as_each_row_alone(tiny: Callable[..., Any], randomise: Callable[..., None]) -> None:
    model = tiny(**SIGHT)
    decoder = compose(model).eval()
    randomise(decoder, 3, 0.3)
    conversations = list(PAGES.conversations("val"))[:3]
    together, alone = (
        {(a.of, a.question): a.answer for a in measure.ask(decoder, rendering(model), PAGES, conversations, rows=rows)}
        for rows in (3, 1)
    )
    assert together == alone and len(together) > 6 and len(set(together.values())) > 3


def test_pictures_are_blanked_or_those_of_another_page_of_the_same_size() -> None:
    pictures = [PAGES.pictures(each) for each in PAGES.conversations("val")]
    blank, other = (measure._shown(pictures, how) for how in ("blanked", "shuffled"))  # type: ignore[arg-type]
    sizes = [own[0].size for own in pictures]
    for (mine,), (white,), (shown,) in zip(pictures, blank, other, strict=True):
        assert white.size == shown.size == mine.size and np.asarray(white).min() == 255
        assert (shown is not mine) == (sizes.count(mine.size) > 1)
    assert sorted(map(id, (own[0] for own in other))) == sorted(map(id, (own[0] for own in pictures)))


def test_figures_of_every_kind_of_question_with_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    right = {(a.kind, a.figure, a.group): a for a in accuracies(asked(monkeypatch, lambda truth: truth))}
    assert {a.mean for key, a in right.items() if key[1] != "constant"} == {1.0}
    of_where = {("where", "found"), ("where", "overlap"), ("where", "constant")}
    assert {key[:2] for key in right} == {("read", "exact"), ("read", "digits"), ("count", "exact"), *of_where}
    assert 0 < right["where", "constant", ""].mean < 1
    whole = right["read", "exact", ""]
    parts = [a.n for key, a in right.items() if key[:2] == ("read", "exact") and key[2]]
    assert whole.n == sum(parts) == 12 and 0.1 < whole.half < 0.2  # Wilson's: not empty where all are right
    answers = asked(monkeypatch, lambda truth: "9" + truth[1:] if truth[0] != "9" else "8" + truth[1:])
    wrong = {(a.kind, a.figure): a for a in accuracies(answers) if not a.group}
    assert wrong["read", "exact"].mean == wrong["count", "exact"].mean == 0.0
    shares = []
    for a in answers:
        if a.judged.kind == "read" and (digits := sum(map(str.isdigit, a.truth))):
            shares.append(sum(x == y for x, y in zip(a.answer, a.truth, strict=True) if y.isdigit()) / digits)
    assert wrong["read", "digits"].mean == pytest.approx(math.fsum(shares) / len(shares))
    assert 0 < min(filter(None, shares)) < 1
    assert wrong["where", "found"].mean == 1.0  # a bracket less, and still a box


def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    answers = asked(monkeypatch, lambda truth: truth.replace("1", "7"))
    shown = [sample(answers, i, PAGES.pictures(each)) for i, each in enumerate(PAGES.conversations("val"))]
    rows = accuracies(answers)
    return Found({"whole": rows, "blanked": rows}, [each for each in shown if each is not None])


def test_report_shows_pictures_with_question_answer_and_truth(monkeypatch: Any, tmp_path: Path) -> None:
    made = found(monkeypatch)
    (tmp_path / FILE).write_text(json.dumps(made.to_json()))
    assert Found.read(tmp_path / FILE) == made
    text = standalone(sights(made))
    assert text.count("data:image/png;base64") == len(made.samples) == 12
    assert "read: exact" in text and "≠" in text and "count:" in text
    run = SimpleNamespace(seed=0, folder=tmp_path)
    (figure,) = sight(2, SimpleNamespace(name="tiles", runs=[run], values={0: 1.0}))  # type: ignore[arg-type]
    assert figure.file == "pictures-2.svg" and figure.heading == "tiles"
    assert len(table(made).columns) == 6
    (tmp_path / FILE).write_text('{"accuracies": {"whole": [{}]}}')
    assert sight(2, SimpleNamespace(name="tiles", runs=[run], values={0: 1.0})) == []  # type: ignore[arg-type]


def test_unknown_ways_of_showing_and_data_without_pictures_are_refused_before_training(tmp_path: Path) -> None:
    for against in (["blank"], ["blanked", "mixed"]):
        with pytest.raises(ConfigError, match="blanked, shuffled"):
            Asking(str(tmp_path), against=against)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(datamodule=object())
    with pytest.raises(ConfigError, match="data=images"):
        Asking(str(tmp_path)).setup(trainer, None, "fit")  # type: ignore[arg-type]


def test_other_corpora_are_judged_by_the_whole_answer() -> None:
    class Other(Pages):
        judge = Pages.__mro__[1].judge  # type: ignore[attr-defined]

    judged = Other().judge(next(iter(PAGES.conversations("val"))), "?", " yes", "yes")
    assert judged == ("answer", "", {"exact": 1.0})


def test_figures_of_any_corpus_are_declared() -> None:
    declared = Asking(directory="x").figures
    expected = {"read_exact": "more", "where_overlap": "more", "where_constant": None, "blanked_read_exact": None}
    for name, better in expected.items():
        assert next(f.better for f in declared if f.stands_for(f"pictures/{name}")) == better

"""Pictures in prompts and boxes in answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blockwright.blocks.compose import compose
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.lab.chat.conversation import ChatText, Conversation, Manner
from blockwright.lab.chat.talk import Talk
from blockwright.lab.writer import Request, Writer
from blockwright.plugins.vision.attachment import ImageFiles, drawn
from blockwright.plugins.vision.data.picture_conversations import boxes, overlap
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Bytes

TOWER = {"name": "siglip", "tile": 16, "patch": 8, "width": 8, "depth": 1, "n_heads": 2, "norm": "layernorm"}
SIGHT = {"vision": {**TOWER, "ffn": {"name": "gelu", "d_ff": 8}}, "projector": "linear", "tiling": "native"}
SIGHT |= {"images": {"name": "early_fusion", "image_token": 257}}
BOXES: dict[str, list[tuple[float, ...]]] = {
    "<|ref|>a dog<|/ref|><|det|>[[12, 30, 500, 999]]<|/det|>": [(12, 30, 500, 999)],
    "two: [[1,2,3,4], [5, 6, 7, 8]]": [(1, 2, 3, 4), (5, 6, 7, 8)],
    "(10, 20, 30, 40) and [10.5, 20, 30, 40.25]": [(10, 20, 30, 40), (10.5, 20, 30, 40.25)],
    "turned [[50, 60, 10, 20]], outside [[-5, 0, 2000, 10]]": [(10, 20, 50, 60), (0, 0, 999, 10)],
    "cut off [[1, 2, 3, 4": [(1, 2, 3, 4)],
    "none [[1, 2, 3]] [] [[a, b, c, d]] 1, 2, 3, 4 [1, 2, 3, 4, 5]": [],
}


def test_boxes_are_read_from_text_that_need_not_be_well_formed() -> None:
    assert {text: boxes(text) for text in BOXES} == BOXES


def test_overlap_is_intersection_over_union() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 10, 10), (20, 0, 30, 10)) == overlap((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0


def test_boxes_are_drawn_where_they_say() -> None:
    page = Image.new("RGB", (100, 50), "white")
    red = (np.asarray(drawn(page, [(0, 0, 499.5, 999)])) == (255, 0, 0)).all(-1)
    assert red[:, 0].all() and red[0, :50].all() and red[:, 49:51].any(1).all() and not red[:, 52:].any()
    assert not (np.asarray(page) == (255, 0, 0)).all(-1).any()


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(tiny: Callable[..., Any]) -> Writer:
    model = tiny(vocab_size=258, init={"std": 0.3, "depth_scaled": False}, **SIGHT)
    return Writer(compose(model, seed=3).eval(), Bytes(258))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """A black picture and one with a gradient."""
    grey = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    for name, pixels in (("black.png", np.zeros_like(grey)), ("grey.png", grey)):
        Image.fromarray(pixels).convert("RGB").save(tmp_path / name)
    return str(tmp_path / "black.png"), str(tmp_path / "grey.png")


def written(writer: Writer, prompts: list[str], files: tuple[str, ...], **settings: Any) -> list[str]:
    texts = [""] * len(prompts)
    for row, piece in writer.stream(prompts, Request(12, attached=ImageFiles(files), **settings)):
        texts[row] += piece
    return texts


def test_a_picture_takes_its_places_in_a_prompt(writer: Writer, files: tuple[str, ...]) -> None:
    prompts = ["a<image>b", "<image>"]
    ids, media = ImageFiles(files).encode(writer.decoder, prompts, writer.encode)
    assert ids == [[97, 257, 257, 257, 257, 98], [257] * 4]
    assert media["images"].tiles.shape == (2, 3, 16, 16) and media["images"].tiles[0].max() == 0


def test_text_is_written_about_the_pictures_of_its_prompt(writer: Writer, files: tuple[str, ...]) -> None:
    prompts = ["a<image>b", "<image>"]
    together = written(writer, prompts, files)
    alone = [written(writer, [p], (f,), seed=i)[0] for i, (p, f) in enumerate(zip(prompts, files, strict=True))]
    assert together == alone and together != written(writer, prompts, files[::-1])


def test_boxes_of_the_text_are_drawn_into_the_first_picture(files: tuple[str, ...], tmp_path: Path) -> None:
    ImageFiles(files, str(tmp_path / "boxes.png")).finish("[[0, 0, 999, 999]]")
    assert (np.asarray(Image.open(tmp_path / "boxes.png"))[0, 0] == (255, 0, 0)).all()


def test_marks_and_pictures_that_disagree_are_refused(writer: Writer, files: tuple[str, ...]) -> None:
    for prompt, names, path in (("<image>", 0, "--prompt"), ("a", 1, "--image"), ("<image>", 2, "--image")):
        with pytest.raises(ConfigError) as caught:
            writer.stream([prompt], Request(attached=ImageFiles(files[:names]) if names else None))
        assert caught.value.path == path


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tiny: Callable[..., Any]) -> Talk:
    model = tiny(vocab_size=258, max_positions=512, init={"std": 0.3, "depth_scaled": False}, **SIGHT)
    writer = Writer(compose(model, seed=3).eval().double(), Bytes(258))
    conversation = Conversation(writer, ChatText("plain", writer.words), Manner(6, Sampling(0)))
    return Talk(conversation, io.StringIO(), io.StringIO(), terminal=False)


def test_pictures_of_all_turns_are_seen_in_each(talk: Talk, files: tuple[str, ...]) -> None:
    writer, places = talk.conversation.writer, [257] * 4
    prompt: list[int] = []
    for n, (file, text) in enumerate(zip(files, ("what?", "and?"), strict=True), 1):
        talk.take(f"/image {file}")
        talk.take(text)
        prompt += [*places, *text.encode()]
        media = ImageFiles(files[:n]).encode(writer.decoder, ["<image>" * n], writer.encode)[1]
        rows = Continuations(writer.decoder, [prompt], 6, Sampling(0), stop_tokens={256}, media=media)
        expected = writer.words.decode([row[0] for row in rows if row[0] is not None])
        assert talk.conversation.turns[-1].content == expected
        prompt += [*expected.encode(), 256]
    assert [turn.content for turn in talk.conversation.turns[::2]] == ["<image>what?", "<image>and?"]


def test_a_later_picture_does_not_meet_the_caches_of_an_earlier_one(talk: Talk, files: tuple[str, ...]) -> None:
    answers = []
    for file in files:
        talk.take(f"/image {file}")
        talk.take("what?")
        answers.append(talk.conversation.turns[-1].content)
        talk.take("/clear")
    assert answers[0] != answers[1]


def test_conversation_with_pictures_is_saved_with_their_files(
    talk: Talk, files: tuple[str, ...], tmp_path: Path
) -> None:
    talk.take(f"/image {files[0]}")
    talk.take("what is <image>?")
    talk.take(f"/save {tmp_path / 'talk.jsonl'}")
    record = json.loads((tmp_path / "talk.jsonl").read_text())
    assert record["images"] == [files[0]] and record["messages"][0]["content"] == "what is <image>?"


def test_pictures_that_cannot_be_shown_are_refused(talk: Talk, files: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    wrong = {"<image> what?": "message", "/image {0}\n<image> and <image>?": "message", "/image gone.png": "FILE"}
    for lines, path in {**wrong, "/image": "FILE", "/image {2}\nwhat?": "--image"}.items():
        talk.take("/clear")
        with pytest.raises(ConfigError) as refusal:
            for line in lines.format(*files, tmp_path / "no.png").splitlines():
                talk.take(line)
        assert refusal.value.path == path and not talk.conversation.turns, lines

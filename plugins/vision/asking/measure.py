"""Ask a model about pictures: its own likeliest answers, turn by turn, judged by the corpus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.input import Media
from blockwright.plugins.vision.data.picture_conversations import WORD, Judged, PictureCorpus
from blockwright.plugins.vision.data.picture_rows import PictureRendering, grids_of
from blockwright.plugins.vision.data.pictures import tiles_of
from blockwright.plugins.vision.images import Images, Pictures
from blockwright.plugins.vision.tiling import Grid
from blockwright.training.data.chat.formats import Message, answered
from blockwright.training.data.conversations import Conversation

if TYPE_CHECKING:
    from PIL.Image import Image

Shown = Literal["whole", "blanked", "shuffled"]
SPARE = 8  # tokens by which an answer may be longer than the true one


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        of: number of the conversation
        question, answer, truth: texts; the answer is the model's
        judged: by the corpus
    """

    of: int
    question: str
    answer: str
    truth: str
    judged: Judged


class Talk:
    """A conversation as far as it has been held: the questions are given, the answers are the model's."""

    def __init__(self, number: int, conversation: Conversation, pictures: Sequence[Image]) -> None:
        self.number, self.conversation, self.pictures = number, conversation, pictures
        self.said: list[Message] = []
        self.truth = ""
        self._next()

    def reply(self, answer: str) -> None:
        self.said.append({**self.conversation.messages[len(self.said)], "content": answer})
        self._next()

    def _next(self) -> None:
        """Go to where the model answers; no truth if it does no more."""
        rest = self.conversation.messages[len(self.said) :]
        turn = next((i for i, message in enumerate(rest) if answered(message)), None)
        self.open = turn is not None
        self.said += rest[:turn]
        self.truth = "" if turn is None else str(rest[turn]["content"])


@torch.inference_mode()
def ask(
    decoder: Decoder,
    rendering: PictureRendering,
    corpus: PictureCorpus,
    conversations: Sequence[Conversation],
    shown: Shown = "whole",
    rows: int = 64,
) -> Iterator[Answer]:
    """Hold conversations, of each as many turns as the model has positions for.

    Later questions are asked after the model's own earlier answers, which may be wrong: a true one would give away what
    only the picture shows.

    Args:
        decoder: in evaluation mode, with an image side
        rendering: of the conversations
        corpus: of the conversations; judges the answers
        conversations: to hold
        shown: their pictures as they are; ``blanked``, white; ``shuffled``, those of another conversation with pictures
            of the same sizes
        rows: held together
    """
    pictures = _shown([corpus.pictures(each) for each in conversations], shown)
    talks = [Talk(i, *pair) for i, pair in enumerate(zip(conversations, pictures, strict=True))]
    while talks := [talk for talk in talks if talk.open]:
        for at in range(0, len(talks), rows):
            batch = talks[at : at + rows]
            for talk, answer in zip(batch, _answers(decoder, rendering, batch), strict=True):
                question, truth = str(talk.said[-1]["content"]) if talk.said else "", talk.truth
                talk.reply(answer)
                judged = corpus.judge(talk.conversation, question, answer, truth)
                yield Answer(talk.number, question, answer, truth, judged)


def _answers(decoder: Decoder, rendering: PictureRendering, talks: Sequence[Talk]) -> list[str]:
    tokenizer, images = rendering.tokenizer, rendering.images
    prompts = [rendering.prompt(talk.conversation, talk.said) for talk in talks]
    room = decoder.config["max_positions"] - max(map(len, prompts))
    most = [len(tokenizer.encode(talk.truth)) + SPARE for talk in talks]
    ends = rendering.chat.ends(tokenizer)
    media = _cut(images, talks, decoder.embedding.weight.device)
    steps = Continuations(decoder, prompts, min(max(most), room), Sampling(0.0), stop_tokens=ends, media=media)
    ids: list[list[int]] = [[] for _ in talks]
    for tokens in steps:
        for row, token in zip(ids, tokens, strict=True):
            row += [] if token is None else [token]
    return [tokenizer.decode(row[:length]) for row, length in zip(ids, most, strict=True)]


def _cut(images: Images, talks: Sequence[Talk], device: torch.device) -> Media:
    """Those of the turns said so far."""
    grids, tiles = list[Grid](), []
    for talk in talks:
        shown = sum(str(message["content"]).count(WORD) for message in talk.said)
        for picture, grid in list(zip(talk.pictures, grids_of(images, talk.pictures), strict=True))[:shown]:
            grids.append(grid)
            tiles.append(tiles_of(picture, grid, images.vision, images.tiling))
    return {"images": Pictures(torch.from_numpy(np.concatenate(tiles)).to(device), grids)} if tiles else {}


def _shown(pictures: list[Sequence[Image]], shown: Shown) -> list[Sequence[Image]]:
    from PIL import Image

    if shown == "blanked":
        return [[Image.new("RGB", each.size, "white") for each in own] for own in pictures]
    if shown == "shuffled":
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for i, own in enumerate(pictures):
            alike[tuple(each.size for each in own)].append(i)
        other = {i: group[(at + 1) % len(group)] for group in alike.values() for at, i in enumerate(group)}
        return [pictures[other[i]] for i in range(len(pictures))]
    return pictures

"""Pictures in a chat: a request brings them, the model sees them, and hostile ones harm no other request."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Running, running, tiny

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.drafts import Lookup
from blockwright.blocks.generation.sample import Sampling
from blockwright.lab.chat.conversation import ChatText, Conversation, Manner
from blockwright.lab.writer import Writer
from blockwright.plugins.serve.files import MOST, MOST_BYTES
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytest.importorskip("PIL", reason="needs the extra vision")

TOWER = {"name": "siglip", "tile": 16, "patch": 4, "width": 16, "depth": 1, "n_heads": 2, "norm": "layernorm"}
SIGHT: dict[str, Any] = {"vocab_size": 258, "max_positions": 400, "projector": "downsample_mlp", "tiling": "grid_2d"}
SIGHT |= {"images": {"name": "early_fusion", "image_token": 257}}
SIGHT |= {"vision": {**TOWER, "ffn": {"name": "gelu", "d_ff": 16}}}


def png(width: int, height: int, shade: Callable[[int, int], int]) -> bytes:
    """A picture in grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(shade(x, y) for x in range(width)) for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BLACK, SLOPE = png(20, 20, lambda x, y: 0), png(32, 20, lambda x, y: 4 * (x + y))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    decoder = compose({**tiny().config, **SIGHT}, seed=3).double().eval()
    with running(Batch(decoder, 2, 300, drafts=Lookup(3, shortest=1)), decoder) as made:
        yield made


def url(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}}


def asked(*content: Any, **more: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": "what?"}]}]
    return {"model": "tiny", "messages": talk, "max_tokens": 12, "seed": 5, **more}


def seen_alone(decoder: Decoder, folder: Path, *pictures: bytes) -> str:
    """What ``blockwright chat`` answers: the reference."""
    files = [folder / f"{i}.png" for i in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        file.write_bytes(picture)
    words = Bytes()
    conversation = Conversation(Writer(decoder, words), ChatText("plain", words), Manner(12, Sampling(1.0), seed=5))
    return "".join(conversation.say("<image>" * len(files) + "what?", [str(file) for file in files]))


def test_answers_are_those_of_a_chat_that_sees_the_same_pictures(server: Running, tmp_path: Path) -> None:
    texts = []
    for pictures in ((BLACK,), (SLOPE,), (SLOPE, BLACK), ()):
        status, answer = server.ask("/v1/chat/completions", asked(*map(url, pictures)))
        texts.append(answer["choices"][0]["message"]["content"])
        assert status == 200 and texts[-1] == seen_alone(server.decoder, tmp_path, *pictures)
        assert (answer["usage"]["prompt_tokens"] > 10) == bool(pictures)
    assert len(set(texts)) == len(texts)


BAD = {
    "an address": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
    "a path": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    "another kind": url(BLACK, "video/mp4"),
    "no base64": {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}},
    "no picture": url(b"import os"),
    "a picture cut short": url(SLOPE[:60]),
    "an image that is not an object": {"type": "image_url", "image_url": "data:image/png;base64,AAAA"},
    "a detail": {**url(BLACK), "image_url": {**url(BLACK)["image_url"], "detail": "high"}},
    "an unknown field": {**url(BLACK), "sharp": True},
    "sound": {"type": "input_audio", "input_audio": {"data": "AAAA"}},
    "a picture of billions of pixels": url(BLACK[:16] + struct.pack(">II", 2**17, 2**17) + BLACK[24:]),
    "the mark of a picture": {"type": "text", "text": "<image>"},
}


def test_bad_pictures_are_one_refusal_each_without_a_path(server: Running) -> None:
    for name, part in BAD.items():
        status, answer = server.ask("/v1/chat/completions", asked(part))
        assert status == 400 and answer["error"]["param"].startswith("messages"), name
        assert "/tmp" not in answer["error"]["message"] and "blockwright-" not in answer["error"]["message"], name
    for parts in ([url(BLACK)] * (MOST + 1), [url(bytes(MOST_BYTES + 1))]):
        status, answer = server.ask("/v1/chat/completions", asked(*parts))
        assert (status, answer["error"]["code"]) == (400, "request_too_large")
    assert server.ask("/v1/chat/completions", asked(url(bytes(MOST_BYTES * 6 // 5))))[0] == 413


def test_a_model_of_text_alone_sees_no_pictures(echo: Callable[..., Running]) -> None:
    status, answer = echo().ask("/v1/chat/completions", asked(url(BLACK)))
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "messages.0.content.type", "unsupported_parameter")

"""The limits in README.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blockwright.plugins.serve import __main__ as command
from blockwright.plugins.serve import answer, body, engine, files, order, server, serving
from blockwright.registry.limits import MAX_DEPTH
from blockwright.training.data.chat import template_process as template

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MIB = 2**20
# What is written with a number in place of each {}: the numbers.
LIMITS: dict[str, tuple[float, ...]] = {
    "leaves {} tokens unread, and those of {} steps more": (answer.UNREAD, 2 * engine.AHEAD),
    "reads nothing of what waits for it for {} seconds": (server.STALLED,),
    "head of a request arrives within {} seconds": (server.STALLED,),
    "Bodies have at most {} MiB and {} bytes for each token of the room": (body.LEAST / MIB, body.OF_A_TOKEN),
    "and {} MiB more where the model sees": (round(files.MOST_BYTES / 3 * 4 / MIB),),
    "They arrive within {} seconds": (body.SECONDS,),
    "are JSON of at most {} levels": (MAX_DEPTH,),
    "at most {} a request, of {} MiB together": (files.MOST, files.MOST_BYTES / MIB),
    "renders in a process of its own, for at most {} seconds of computing, within {}, and in {} GiB": (
        template.SECONDS,
        template.WITHIN,
        template.MEMORY / 2**30,
    ),
    "(at most {}), `stream`": (order.MOST_STOPS,),
    "texts computed at once, default {};": (serving.ROWS,),
    "together; default {}, or what": (serving.ROOM,),
    "wait for a row, default {};": (command.QUEUE,),
    "default 127.0.0.1, port {},": (command.PORT,),
    "after SIGTERM or Ctrl-C, default {}.": (command.GRACE,),
}


@pytest.mark.parametrize("written", LIMITS)
def test_a_limit_is_that_of_the_code(written: str) -> None:
    text = " ".join(README.split())
    found = re.search(r"([\d,]+)".join(map(re.escape, written.split("{}"))), text)
    assert found, "the README does not have it"
    assert tuple(int(number.replace(",", "")) for number in found.groups()) == LIMITS[written]


def test_every_number_of_the_limits_is_compared_or_no_limit() -> None:
    limits = README.partition("## Limits")[2].partition("\n## ")[0]
    others = {"400", "403", "499", "500", "503", "8"}  # statuses, and UTF-8
    known = {f"{int(number):,}" for numbers in LIMITS.values() for number in numbers}
    assert set(re.findall(r"(?<![\w.])[\d,]*\d(?!\w)", limits)) <= known | others

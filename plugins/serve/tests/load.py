"""Many clients at once, of which some hang up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a client got.

    text: None of one that hung up
    seconds: of the whole answer
    status: 0 of one that hung up before it
    """

    text: str | None
    seconds: float
    status: int


async def ask(port: int, body: dict[str, Any], hang_up: int | None) -> Outcome:
    """A streamed completion by a client that hangs up after so many bytes of the answer; None: that reads all."""
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({"model": "tiny", "stream": True, **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    if hang_up is not None:
        if hang_up:
            await reader.read(hang_up)
        writer.transport.abort()
        return Outcome(None, time.monotonic() - start, 0)
    answer = await reader.read()
    writer.close()
    lines = answer.decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert not events or "data: [DONE]" in lines, answer[-500:]
    return Outcome(
        "".join(event["choices"][0]["text"] for event in events), time.monotonic() - start, int(lines[0].split()[1])
    )


def run(port: int, bodies: list[dict[str, Any]], seed: int = 0) -> list[Outcome]:
    """All of them at once; every third client hangs up: before the answer, at its beginning, or within it."""
    generator = random.Random(seed)

    async def many() -> list[Outcome]:
        hang_ups = [generator.choice((0, 1, 300, 2000)) if i % 3 == 0 else None for i in range(len(bodies))]
        return await asyncio.gather(*(ask(port, body, n) for body, n in zip(bodies, hang_ups, strict=True)))

    return asyncio.run(many())


def percentile(outcomes: list[Outcome], share: float) -> float:
    """Seconds that a share of the answered clients has waited at most."""
    seconds = sorted(outcome.seconds for outcome in outcomes if outcome.text is not None)
    return seconds[min(len(seconds) - 1, int(share * len(seconds)))]

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import Echo, Running, real, running, tiny

from blockwright.blocks.decoder import Decoder


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return tiny()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """A server of the tiny model with four rows."""
    batch = real()
    with running(batch, batch.decoder) as made:
        yield made


@pytest.fixture
def echo(decoder: Decoder) -> Iterator[Callable[..., Running]]:
    """Starts a server whose texts are their prompts."""
    started: list[Running] = []

    def start(queue: int = 256, key: Any = None, buffer: int = 0, grace: float = 5, **options: Any) -> Running:
        started.append(Running(Echo(**options), decoder, queue, key, buffer, grace))
        return started[-1]

    yield start
    for each in started:
        each.batch.open.set()
        each.close()

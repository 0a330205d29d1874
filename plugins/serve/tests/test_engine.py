"""The thread that decodes, and the loop that asks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from running import Echo

from blockwright.blocks.generation.job import Job
from blockwright.plugins.serve.engine import AHEAD, Engine, News
from blockwright.plugins.serve.refusal import RefusedError


async def read(engine: Engine, jobs: list[Job], unread: int | None = None) -> list[News]:
    async with asyncio.timeout(30):
        with engine.run(jobs, unread) as listener:
            return [news async for some in listener for news in some]


@pytest.mark.parametrize("several", [1, 2, 7])
def test_each_job_ends_once_and_with_its_last_token(several: int) -> None:
    engine = Engine(Echo(rows=2, several=several), 10)
    jobs = [Job(list(range(1, 2 + n)), 5) for n in range(7)]
    news = asyncio.run(read(engine, jobs))
    engine.close()
    for job in jobs:
        own = [(token, why) for each, token, why in news if each is job]
        assert [token for token, _ in own if token is not None] == list(job.prompt)[:5]
        assert [why for _, why in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1][1] == ("length" if len(job.prompt) >= 5 else "end")


def test_jobs_beyond_the_queue_are_refused_and_leave_nothing() -> None:
    engine = Engine(batch := Echo(rows=1), 2)
    batch.open.clear()

    async def fill() -> None:
        first = asyncio.create_task(read(engine, [Job([1]), Job([2])]))
        await asyncio.sleep(0)
        with pytest.raises(RefusedError) as refused:
            await read(engine, [Job([3])] * 2)
        assert refused.value.status == 429
        assert engine.waiting == 2
        last = asyncio.create_task(read(engine, [Job([4])]))
        batch.open.set()
        await asyncio.gather(first, last)

    asyncio.run(fill())
    engine.close()
    assert engine.waiting == engine.running == 0


def test_the_thread_waits_for_a_loop_that_is_behind() -> None:
    engine = Engine(batch := Echo(), 10)

    async def busy() -> list[News]:
        with engine.run([Job([1] * 150)]) as listener:
            time.sleep(0.2)  # the loop does something else
            assert batch.steps <= AHEAD + 1
            return [news async for some in listener for news in some]

    assert len(asyncio.run(busy())) == 151
    engine.close()


def test_a_listener_that_reads_too_slowly_loses_its_jobs_and_no_other_does() -> None:
    engine = Engine(batch := Echo(), 10)

    async def both() -> None:
        with engine.run([Job([1] * 150)], 20) as slow:
            assert len(await read(engine, [Job([2] * 150)])) == 151
            with pytest.raises(RefusedError, match="slow_reader"):
                await anext(aiter(slow))
            assert engine.waiting == engine.running == 0

    asyncio.run(both())
    engine.close()
    assert not batch.busy


def test_all_jobs_end_where_the_server_ends() -> None:
    engine = Engine(batch := Echo(pause=0.01), 10)

    async def cut() -> None:
        asyncio.get_running_loop().call_later(0.05, engine.end)
        with pytest.raises(RefusedError) as refused:
            await read(engine, [Job([1] * 150)])
        assert refused.value.status == 503
        while engine.running:
            await asyncio.sleep(0.01)

    asyncio.run(cut())
    engine.close()
    assert not batch.busy


def test_closing_ends_a_thread_at_work() -> None:
    engine = Engine(batch := Echo(pause=0.001), 10)

    async def leave() -> AsyncIterator[None]:
        with engine.run([Job([1] * 150)]):
            await asyncio.sleep(0.02)

    asyncio.run(leave())
    engine.close()
    assert batch.steps < 150

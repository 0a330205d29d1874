"""The thread that decodes, and how an event loop asks it.

One thread owns the batch. The loop asks it through a queue, and learns of tokens by ``call_soon_threadsafe``, once
a step. The thread waits for the loop where that is a few steps behind, so tokens pile up for slow clients alone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from blockwright.blocks.generation.batch import Batch
from blockwright.blocks.generation.job import Job
from blockwright.plugins.serve.body import RefusedError, refused
from blockwright.registry import BlockError

AHEAD = 4  # steps whose tokens the loop has not seen yet
LOG = logging.getLogger("blockwright.serve")

News = tuple[Job, int | None, str | None]  # a job, a token of it, why it has ended
Report = tuple[Job, int | None, str | BlockError | None]  # the same, or why a job cannot run


class Listener:
    """The news of the jobs of one request: an asynchronous iterator over what is new since the last look.

    Args:
        jobs: of the request
        unread: tokens that may wait to be read; None for any number

    Attributes:
        error: what has ended it before its jobs
    """

    def __init__(self, jobs: Sequence[Job], unread: int | None) -> None:
        self.jobs, self._left, self._unread = jobs, len(jobs), unread
        self.error: RefusedError | None = None
        self._news: list[News] = []
        self._some = asyncio.Event()

    def hear(self, news: News) -> None:
        """Keep news until they are read."""
        if self.error is None:
            self._news.append(news)
            self._some.set()
        if self._unread is not None and len(self._news) > self._unread:
            self._news.clear()
            self.fail(RefusedError(408, "The client reads too slowly", code="slow_reader"))

    def fail(self, error: RefusedError) -> None:
        """End the iteration with an error, after the news that came before it."""
        self.error = self.error or error
        self._some.set()

    async def __aiter__(self) -> AsyncIterator[list[News]]:
        while self._left:
            await self._some.wait()
            self._some.clear()
            news, self._news = self._news, []
            self._left -= sum(why is not None for _, _, why in news)
            if news:
                yield news
            if self.error is not None and not self._news:
                raise self.error


class Engine:
    """Runs jobs for the requests of one event loop.

    Args:
        batch: used by no other thread from then on
        queue_length: jobs that may wait for a row

    Attributes:
        places: jobs that can run or wait at once
        failed: what has ended the thread; None while it works
    """

    def __init__(self, batch: Batch, queue_length: int) -> None:
        self.batch, self.places = batch, batch.rows + queue_length
        self.failed: Exception | None = None
        self._jobs: dict[Job, Listener] = {}  # the loop's
        self._begun: set[Job] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ahead = threading.Semaphore(AHEAD)
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs that have a token."""
        return len(self._begun)

    @property
    def waiting(self) -> int:
        """Jobs that have none yet."""
        return len(self._jobs) - len(self._begun)

    @contextmanager
    def run(self, jobs: Sequence[Job], unread: int | None = None) -> Iterator[Listener]:
        """Run the jobs of a request, within the event loop. Those that have not ended with the block are cancelled.

        Args:
            jobs: of the request
            unread: tokens that may wait to be read before the request fails, beside those of the steps that the thread
                is ahead by, which come at once; None for any number

        Raises:
            RefusedError: too many jobs wait, or the thread has failed; from the listener: a job cannot run, or failed
        """
        if self.failed is not None:
            raise _failure(503)
        if len(self._jobs) + len(jobs) > self.places:
            raise RefusedError(429, "Too many requests wait. Try again later", code="rate_limit_exceeded")
        self._loop = asyncio.get_running_loop()
        if unread is not None:
            unread += 2 * AHEAD * len(jobs) * (1 + self.batch.drafted_at_most)
        listener = Listener(jobs, unread)
        for job in jobs:
            self._jobs[job] = listener
            self._calls.put(lambda job=job: self._add(job))  # type: ignore[misc]
        try:
            yield listener
        finally:
            self._cancel_all(jobs)

    def cancel(self, job: Job) -> None:
        """End a job; nothing if it has ended."""
        if job in self._jobs:
            self._calls.put(lambda: self._cancel(job))

    def end(self) -> None:
        """End all jobs, within the event loop: their requests fail."""
        for listener in set(self._jobs.values()):
            listener.fail(RefusedError(503, "The server ends. Try again later", code="shutting_down"))
            self._cancel_all(listener.jobs)

    def close(self) -> None:
        """End the thread, after the step that it is at."""
        self._calls.put(None)
        self._ahead.release()
        self._thread.join()

    # --- in the event loop ---

    def _cancel_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.cancel(job)

    def _hear(self, reports: Sequence[Report]) -> None:
        for job, token, why in reports:
            listener = self._jobs[job] if why is None else self._jobs.pop(job)
            (self._begun.add if why is None else self._begun.discard)(job)
            if isinstance(why, BlockError):
                listener.fail(refused(why, why.parameter))
            elif why == "failed":
                listener.fail(_diverged())
            else:
                listener.hear((job, token, why))
            if listener.error is not None:
                self._cancel_all(listener.jobs)

    def _hear_step(self, reports: Sequence[Report]) -> None:
        self._ahead.release()
        self._hear(reports)

    def _fail(self, error: Exception) -> None:
        self.failed = error
        for listener in self._jobs.values():
            listener.fail(_failure(500))
        self._jobs.clear()
        self._begun.clear()

    # --- in the thread ---

    def _run(self) -> None:
        try:
            while self._answer_calls():
                self._ahead.acquire()
                # The news of a step: a job may have several tokens in it, and ends with the last of
                # them
                step = self.batch.step()
                last = {job: i for i, (job, _) in enumerate(step)}
                ends = [(job, token, job.ended if last[job] == i else None) for i, (job, token) in enumerate(step)]
                self._report(self._hear_step, ends)
        except Exception as error:
            LOG.exception("decoding has failed: requests are answered with 500 and 503 from now on")
            self._report(self._fail, error)

    def _answer_calls(self) -> bool:
        """Do what the loop asks, and wait for more while there is no job. False: close."""
        while not self.batch.busy or not self._calls.empty():
            call = self._calls.get()
            if call is None:
                return False
            call()
        return True

    def _add(self, job: Job) -> None:
        try:
            self.batch.add(job)
        except BlockError as error:
            job.ended = "cancelled"
            self._report(self._hear, [(job, None, error)])

    def _cancel(self, job: Job) -> None:
        if job.ended is None:
            self.batch.cancel(job)
            self._report(self._hear, [(job, None, "cancelled")])

    def _report(self, hear: Callable[..., None], news: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(hear, news)


def _diverged() -> RefusedError:
    rule = "The logits of the text are not finite: the model has diverged, or overflows the server's --dtype"
    return RefusedError(500, rule, code="not_finite")


def _failure(status: int) -> RefusedError:
    return RefusedError(status, "The model has failed. The server must be started again", code="model_failed")

from __future__ import annotations

import multiprocessing
import os
import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from blockwright.training.answering import AnswerError, Answering, Overdue, StartError, time_limit

LIMITS: dict[str, Any] = {"seconds": 30.0, "within": 60.0, "start": 60.0, "longest": 1000}


@pytest.fixture(scope="module")
def made() -> Iterator[Answering]:
    answering = Answering("doing_as_asked:prepare", "hello", **LIMITS)
    yield answering
    answering.close()


def test_one_process_answers_every_question_and_threads_get_their_own_answers(made: Answering) -> None:
    one, two = made.ask("a"), made.ask("b")
    assert (one["text"], two["text"]) == ("hello a", "hello b") and one["process"] == two["process"]
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: made.ask(i)["text"], range(64)))
    assert texts == [f"hello {i}" for i in range(64)]


def test_the_process_imports_what_answers_alone(made: Answering) -> None:
    assert [made.ask({"imported": name})["text"] for name in ("torch", "numpy", "__mp_main__")] == ["False"] * 3


def test_a_fork_asks_a_process_of_its_own(made: Answering) -> None:
    ours, theirs = made.ask("a")["process"], multiprocessing.get_context("fork").SimpleQueue()
    fork = multiprocessing.get_context("fork").Process(target=lambda: theirs.put(made.ask("b")["process"]))
    fork.start()
    assert theirs.get() != ours and made.ask("c")["process"] == ours
    fork.join()


@pytest.mark.parametrize(
    ("question", "why"),
    [
        pytest.param({"sleep": 60}, "longer than 1 seconds$", marks=pytest.mark.slow),
        ({"never": 1}, "longer than 0.5 seconds of computing"),
        ({"end": 1}, "ended"),
        pytest.param({"long": 1000}, "bytes", marks=pytest.mark.slow),
        ({"list": 1}, "something else"),
    ],
)
def test_the_process_is_replaced_where_it_does_not_answer(
    question: Any, why: str, made: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made.ask("a")["process"]
    with monkeypatch.context() as patch:
        patch.setattr(made, "seconds", 0.5)
        patch.setattr(made, "within", 1.0 if "sleep" in question else 60.0)
        with pytest.raises(AnswerError, match=why):
            made.ask(question)
    assert made.ask("a")["process"] != before


def test_the_answer_to_an_interrupted_question_is_not_the_next_ones(made: Answering) -> None:
    """Ctrl-C, or the limit of time of who asks."""
    with pytest.raises(Overdue), time_limit(0.2):
        made.ask({"sleep": 0.5})
    assert made.ask("a")["text"] == "hello a"


def test_a_question_that_cannot_be_sent_is_an_error_of_its_own(made: Answering) -> None:
    before = made.ask("a")["process"]
    with pytest.raises(AnswerError):
        made.ask(object())
    assert made.ask("a")["process"] == before


def test_a_process_that_cannot_prepare_is_an_error_of_the_start() -> None:
    made = Answering("doing_as_asked:refuse", **LIMITS)
    with pytest.raises(StartError):
        made.ask("a")
    made.close()


def test_a_slow_start_is_waited_for_and_not_begun_anew() -> None:
    made = Answering("doing_as_asked:wait", "1", **{**LIMITS, "start": 0.01})
    with pytest.raises(StartError):
        made.ask("a")
    made.begin()
    one = made.ask("a")
    assert one["text"] == "slow a"
    made.close()


def test_a_process_that_waits_has_its_computing_counted_alone(made: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose processors others take."""
    monkeypatch.setattr(made, "seconds", 0.5)
    assert [made.ask({"sleep": 0.6})["text"][:5] for _ in range(2)] == ["hello"] * 2


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="sees the end of a process that is no child by Linux's calls")
def test_a_process_ends_that_nobody_is_left_to_end() -> None:
    """Its questioner may have been killed, and it may wait for something."""
    fork = multiprocessing.get_context("fork")
    pids = fork.SimpleQueue()

    def ask() -> None:
        made = Answering("doing_as_asked:prepare", "hello", **{**LIMITS, "within": 0.5})
        made.begin()
        pids.put(made.pid)
        made.ask({"sleep": 600})

    asking = fork.Process(target=ask)
    asking.start()
    answering = os.pidfd_open(pids.get())
    time.sleep(0.3)
    asking.kill()
    asking.join()
    poll = select.poll()
    poll.register(answering, select.POLLIN)
    assert poll.poll(60_000)
    os.close(answering)


def test_close_ends_a_question_that_waits() -> None:
    made = Answering("doing_as_asked:prepare", "hello", **LIMITS)
    made.ask("a")
    errors = list[AnswerError]()

    def ask() -> None:
        try:
            made.ask({"sleep": 60})
        except AnswerError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)
    made.close()
    asking.join(10)
    assert len(errors) == 1 and not asking.is_alive()

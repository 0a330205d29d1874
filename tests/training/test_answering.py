from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from doing_as_asked import prepare, refuse

from blockwright.training.answering import AnswerError, Answering


@pytest.fixture(scope="module")
def made() -> Iterator[Answering]:
    answering = Answering(prepare, "hello", seconds=30.0, start=60.0, longest=1000)
    yield answering
    answering.close()


def test_one_process_answers_every_question(made: Answering) -> None:
    one, two = made.ask("a"), made.ask("b")
    assert (one["text"], two["text"]) == ("hello a", "hello b") and one["process"] == two["process"]


def test_threads_get_their_own_answers(made: Answering) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: made.ask(i)["text"], range(64)))
    assert texts == [f"hello {i}" for i in range(64)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "why"),
    [
        ({"sleep": 60}, "longer"),
        ({"end": 1}, "ended"),
        ({"long": 1000}, "message"),
        ({"list": 1}, "something else"),
    ],
)
def test_the_process_is_replaced_where_it_does_not_answer(
    question: Any, why: str, made: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made.ask("a")["process"]
    with monkeypatch.context() as patch:
        patch.setattr(made, "seconds", 0.5)
        with pytest.raises(AnswerError, match=why):
            made.ask(question)
    assert made.ask("a")["process"] != before


def test_a_process_that_cannot_prepare_is_an_error() -> None:
    made = Answering(refuse, seconds=30.0, start=60.0, longest=1000)
    with pytest.raises(AnswerError, match="ended"):
        made.ask("a")
    made.close()


def test_close_ends_a_question_that_waits() -> None:
    made = Answering(prepare, "hello", seconds=60.0, start=60.0, longest=1000)
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

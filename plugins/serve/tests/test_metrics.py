"""Metrics and the log: figures of requests, in Prometheus' form, and none of their text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
from running import Running

from blockwright.plugins.serve.metrics import Histogram

SAMPLE = re.compile(r'blockwright_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+')


def values(server: Running) -> dict[str, float]:
    status, text = server.ask("/metrics")
    assert status == 200 and text.endswith("\n")
    lines = text.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(sample) for sample in samples)
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 9
    assert all(re.sub(r"(_bucket|_sum|_count)?(\{.*)? .*", "", s) in families for s in samples)
    return {sample.rpartition(" ")[0]: float(sample.rpartition(" ")[2]) for sample in samples}


def test_requests_and_tokens_are_counted(echo: Callable[..., Running]) -> None:
    server = echo(rows=2)
    for n in (3, 2):
        server.ask("/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": n, "n": n})
    server.ask("/v1/completions", {"model": "other"})
    server.ask("/v1/elsewhere?key=secret")
    found = values(server)
    assert found["blockwright_prompt_tokens_total"] == 6
    assert found["blockwright_new_tokens_total"] == 13
    assert found['blockwright_requests_total{route="/v1/completions",status="200"}'] == 2
    assert found['blockwright_requests_total{route="/v1/completions",status="404"}'] == 1
    assert found['blockwright_requests_total{route="other",status="404"}'] == 1
    assert found["blockwright_first_token_seconds_count"] == found["blockwright_request_seconds_count"] == 2
    assert found["blockwright_steps_total"] == server.batch.steps and found["blockwright_rows"] == 2


def test_jobs_at_work_and_in_the_queue_are_shown(echo: Callable[..., Running]) -> None:
    server = echo(rows=2, pause=0.02)
    asked = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 100, "n": 5}
    connection = server.send("/v1/completions", asked)
    server.until(lambda: server.engine.running == 2)
    found = values(server)
    assert (found["blockwright_jobs_running"], found["blockwright_jobs_waiting"]) == (2, 3)
    connection.close()
    server.idle()
    found = values(server)
    assert (found["blockwright_jobs_running"], found["blockwright_jobs_waiting"]) == (0, 0)


def test_a_line_of_the_log_has_figures_and_no_text(
    echo: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blockwright.serve")
    server = echo()
    server.ask("/v1/completions", {"model": "tiny", "prompt": "SECRET", "user": "SECRET"}, Authorization="SECRET")
    server.ask("/v1/completions", {"model": "SECRET", "prompt": "SECRET"})
    server.ask("/%0aSECRET", {"SECRET": "SECRET"})
    server.ask("/health")

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "blockwright.serve"]

    server.until(lambda: len(lines()) == 3)
    assert "SECRET" not in caplog.text and "\n" not in "".join(lines())
    pattern = r"request=\w{32} route=/v1/completions status=200 prompt=6 new=6 first=0\.\d+ seconds=0\.\d+ ended=stop"
    assert re.fullmatch(pattern, lines()[0])


def test_a_histogram_counts_values_up_to_each_bound() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 9):
        histogram.add(value)
    assert list(histogram.samples("a"))[:3] == ['a_bucket{le="1"} 2', 'a_bucket{le="2"} 4', 'a_bucket{le="+Inf"} 5']
    assert histogram.mean == 2.8 and Histogram().mean == 0

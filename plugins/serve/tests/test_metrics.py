"""Metrics and the log: figures of requests, in Prometheus' form, and none of their text."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
from running import Running

from blockwright.plugins.serve.observing import Histogram

SAMPLE = re.compile(r'blockwright_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+')


def values(server: Running) -> dict[str, float]:
    status, text = server.ask("/metrics")
    assert status == 200 and text.endswith("\n")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(sample) for sample in samples)
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 9
    assert all(re.sub(r"(_bucket|_sum|_count)?(\{.*)? .*", "", s) in families for s in samples)
    return {sample.rpartition(" ")[0]: float(sample.rpartition(" ")[2]) for sample in samples}


def test_requests_tokens_and_jobs_are_counted(echo: Callable[..., Running]) -> None:
    server = echo(rows=2, pause=0.01)
    for n in (3, 2):
        server.ask("/v1/completions", {"model": "tiny", "prompt": "abc", "max_tokens": n, "n": n})
    server.ask("/v1/completions", {"model": "other"})
    server.ask("/v1/elsewhere?key=secret")
    found = values(server)
    expected = {"prompt_tokens_total": 6, "new_tokens_total": 13, 'requests_total{route="other",status="404"}': 1}
    expected |= {f'requests_total{{route="/v1/completions",status="{s}"}}': n for s, n in ((200, 2), (404, 1))}
    expected |= {"first_token_seconds_count": 2, "request_seconds_count": 2, "rows": 2}
    expected |= {"steps_total": server.batch.steps, "jobs_running": 0, "jobs_waiting": 0}
    assert {name: found[f"blockwright_{name}"] for name in expected} == expected
    connection = server.send({"prompt": "a" * 100, "max_tokens": 100, "n": 5})
    server.until(lambda: server.engine.running == 2)
    found = values(server)
    assert (found["blockwright_jobs_running"], found["blockwright_jobs_waiting"]) == (2, 3)
    connection.close()
    server.idle()


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

"""Counters and histograms as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "blockwright_"


class Histogram:
    """How many values are at most each bound.

    Args:
        bounds: in order
    """

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    @property
    def mean(self) -> float:
        """Of the values; 0 for none."""
        return self._sum / max(1, sum(self._counts))

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, name: str) -> Iterator[str]:
        """The lines of its samples."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server has done since its start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # route and status
        self.prompt_tokens = self.new_tokens = 0
        self.first_token, self.request = Histogram(), Histogram()

    def text(self, state: Mapping[str, tuple[str, str, float]]) -> str:
        """All of it.

        Args:
            state: name → kind, help and value of what is measured now
        """
        lines = _head("requests_total", "counter", "HTTP requests by route and status; 499: the client hung up")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{route="{route}",status="{status}"}} {count}')
        totals = {
            "prompt_tokens_total": ("counter", "Tokens of prompts", self.prompt_tokens),
            "new_tokens_total": ("counter", "Tokens of answers", self.new_tokens),
        }
        for name, (kind, about, value) in {**totals, **state}.items():
            lines += [*_head(name, kind, about), f"{PREFIX}{name} {value}"]
        for name, about, histogram in (
            ("first_token_seconds", "From a request to its first token", self.first_token),
            ("request_seconds", "From a request to the end of its answer, of requests with tokens", self.request),
        ):
            lines += [*_head(name, "histogram", about), *histogram.samples(PREFIX + name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]

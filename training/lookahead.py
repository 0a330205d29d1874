"""Read the remaining micro-batches of an optimizer step ahead of time.

Only a step's own micro-batches are read ahead, and all of them are trained on before the step ends, so a checkpoint
between steps finds the loaders at the right position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning as L


class Lookahead(Iterator[Any]):
    """An iterator whose next items can be inspected without consuming them."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items
        self._held: deque[Any] = deque()

    def __next__(self) -> Any:
        return self._held.popleft() if self._held else next(self.items)

    def ahead(self, number: int) -> list[Any]:
        """The next ``number`` items, or fewer at the end."""
        while len(self._held) < number:
            try:
                self._held.append(next(self.items))
            except StopIteration:
                break
        return list(self._held)[:number]


def micro_batches_to_come(trainer: L.Trainer) -> list[Any]:
    """The step's batches after the current one, as returned by the loader, on the CPU."""
    loop = trainer.fit_loop
    done, size = loop.epoch_loop.batch_progress.current.ready, trainer.accumulate_grad_batches
    left = min(-done % size, loop.max_batches - done)  # the last step of an epoch may have fewer
    fetcher: Any = loop._data_fetcher
    if left <= 0 or fetcher is None:
        return []
    fetched = list(getattr(fetcher, "batches", []))  # prefetched by Lightning from a loader without a length
    if not isinstance(fetcher.iterator, Lookahead):  # a new one every epoch
        fetcher.iterator = Lookahead(fetcher.iterator)
    items = [*fetched, *fetcher.iterator.ahead(int(left) - len(fetched))]
    return [batch for batch, *_ in items[: int(left)]]

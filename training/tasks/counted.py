"""What a task counts over its training."""

from __future__ import annotations

from collections import Counter


class Counted:
    """Counts as of the last optimizer step. They are stored in checkpoints, and the only numbers of a task that grow.

    What a micro-batch adds counts when its step ends, before anything can write a checkpoint. So a checkpoint holds the
    counts of its own step, whichever hook writes it.
    """

    def __init__(self) -> None:
        self._until = Counter[str]()  # the last step
        self._since = Counter[str]()

    def add(self, name: str, number: int) -> None:
        """Count something of a training micro-batch."""
        self._since[name] += number

    def end_step(self) -> None:
        self._until += self._since
        self._since.clear()

    def forget_step(self) -> None:
        """Drop what has been added since the last step, which will be computed again."""
        self._since.clear()

    def __getitem__(self, name: str) -> int:
        return self._until[name]

    def state_dict(self) -> dict[str, int]:
        return dict(self._until)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._until = Counter(state)

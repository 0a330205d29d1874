"""The contract of ``data``: where the batches of a run come from."""

from __future__ import annotations

import lightning as L

from blockwright.registry import Composable, family
from blockwright.training.data.tokenizers.base import Tokenizer


@family("data", root="", context=("model",))
class DataModule(Composable, L.LightningDataModule):
    """A Lightning data module whose training batches are a function of the step, so that a run resumes in the middle.

    Registered as ``@register("data", NAME)`` it is the option ``data=NAME``; its constructor is its schema, as a
    block's is. A constructor may also take ``model``, the composition of the run's model. It reads no large file.

    Attributes:
        tokenizer: of its texts; None for data without text
        eval_windows: at most so many rows are evaluated during training; None for all, as in the final figures
    """

    tokenizer: Tokenizer | None = None
    eval_windows: int | None = None

    def check(self) -> None:
        """Refuse, before a run, what cannot work; nothing is written, and no large text is read.

        Raises:
            ConfigError: at ``data.<key>``
        """

    @property
    def positions(self) -> int:
        """The number of positions that a model needs for the training batches; 0 if that does not depend on them."""
        return 0

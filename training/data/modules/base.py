"""The contract of ``data``: where the batches of a run come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import lightning as L

from blockwright.registry import Composable, family
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.figure import Figure


@family("data", root="", context=("model",))
class DataModule(Composable, L.LightningDataModule):
    """A Lightning data module whose training batches are a function of the step, so that a run resumes in the middle.

    Registered as ``@register("data", NAME)`` it is the option ``data=NAME``; its constructor is its schema, as a
    block's is. A constructor may also take ``model``, the composition of the run's model. It reads no large file.

    Attributes:
        tokenizer: of its texts; None for data without text
        eval_windows: at most so many rows are evaluated during training; None for all, as in the final figures
        figures: what ``figures_at`` gives, and what is measured of each of several validation loaders, with units
    """

    figures: ClassVar[tuple[Figure, ...]] = ()
    tokenizer: Tokenizer | None = None
    eval_windows: int | None = None

    def check(self) -> None:
        """Refuse, before a run, what cannot work; nothing is written, and no large text is read.

        Raises:
            ConfigError: at ``data.<key>``
        """

    def check_run(self, batches: int | None) -> None:  # by default a run of any length is possible
        """Refuse, before a run and after ``check``, a training of another length than the data allows.

        Args:
            batches: micro-batches of the run; None if it has no number of steps

        Raises:
            ConfigError: at ``data.<key>`` or ``trainer.<key>``
        """

    @property
    def val_weights(self) -> Mapping[str, float]:
        """Name of each validation loader, if there are several, in order → its weight in ``val/loss``.

        ``val/<name>/loss`` and ``val/<name>/bits_per_byte`` are logged too. Empty for one loader, which needs no name.
        """
        return {}

    def figures_at(self, batch: int) -> Mapping[str, float]:
        """Figures of the data itself after so many batches of training, by logged name.

        They are logged with the loss of training and at each validation.

        Args:
            batch: global batches that training has begun
        """
        return {}

    def overview(self, batches: int | None) -> Sequence[Mapping[str, str]]:
        """Rows of a table of what the data is made of, by column; needs ``setup``. Override it where there is one.

        Args:
            batches: micro-batches of the run; None if it has no number of steps
        """
        return ()

    def samples(self, n: int) -> Sequence[tuple[str, str]]:
        """The part of the data and the text of n samples of each part; needs ``setup``."""
        return ()

    @property
    def positions(self) -> int:
        """The number of positions that a model needs for the training batches; 0 if that does not depend on them."""
        return 0

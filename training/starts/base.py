"""The contract of ``start``: where weights of a run come from, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.registry import Composable, family
from blockwright.training.configuration import conf

Text = Callable[[], Iterable[Mapping[str, Tensor]]]  # gives batches of the run's training text


@family("start", root="*", context=("model", "init_from", "seed"))
class Start(Composable):
    """Weights of a decoder, or of a part of it, or parameters that are added to it.

    Registered as ``@register("start", NAME)`` it is the setting NAME at the root of a configuration, null by default,
    whose options are files: ``NAME=OPTION`` chooses conf/NAME/OPTION.yaml. Its constructor is its schema, as a block's
    is; it may also take ``model``, the composition of the run, ``init_from`` and ``seed``.

    A run builds its decoder by the initialisation rule; then each start attaches what it adds, and fills what it has.
    A resumed run attaches, but reads no start: all its weights are in its checkpoint. A strategy that shards the
    decoder has every part filled by itself.

    Attributes:
        derives: whether it makes all weights from those of ``init_from``, which are copied otherwise
        detachable: whether the decoder computes as without it under ``blocks.lora.switched_off``
        trained: the run, checkpoint or imported folder whose weights it reads or derives all others from; else None
    """

    derives: ClassVar[bool] = False
    detachable: ClassVar[bool] = False
    trained: str | None = None

    def compare(self, there: Mapping[str, Any], here: Mapping[str, Any], allowed: bool) -> list[str]:
        """Compare the composition that ``init_from`` was trained in with that of the run, without weights.

        Args:
            there: complete composition of the trained model
            here: that of the run
            allowed: whether weights may come to mean something else

        Returns:
            lines to print

        Raises:
            ConfigError: its weights cannot start this model
        """
        return []

    def check(self, model: Mapping[str, Any]) -> list[str]:
        """Refuse, before a run that reads it, what is missing or does not fit, reading no weights.

        Args:
            model: complete composition of the run

        Returns:
            lines to print

        Raises:
            ConfigError: at its setting
        """
        return []

    def attach(self, decoder: Decoder) -> None:
        """Add parameters without values, and freeze others; the decoder may be on the meta device.

        Raises:
            ConfigError: at its setting
        """

    def check_sharded(self, decoder: Decoder) -> None:
        """Refuse to train it in shards, with what it has attached; on the meta device.

        Raises:
            ConfigError: at its setting
        """

    def fill(self, decoder: Decoder, text: Text) -> None:
        """Put its weights into a whole decoder, initialised, in place.

        Raises:
            ConfigError: they are damaged or do not fit
        """
        self.fill_part(decoder, "")

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        """Put those of its weights whose names begin with the prefix into a part of a decoder.

        Args:
            part: initialised; its names lack the prefix
            prefix: such as ``layers.3.``

        Raises:
            ConfigError: it needs a whole decoder
        """

    def origin(self) -> dict[str, Any]:
        """The origin of its weights (blocks/checkpoint/folder.py), for the checkpoints of the run; empty if unknown."""
        return {}

    def record(self) -> dict[str, Any]:
        """What a checkpoint stores so that its weights can be read without this start, as plain types."""
        return {}

    def recipe(self) -> list[Any]:
        """What decides the weights that it derives, beyond the model, the seed and ``init_from``, as plain types."""
        return []


# --- which starts to write for what a run lacks, for the remedies of refusals ---


def options(suits: Callable[[type[Start]], bool]) -> list[str]:
    """``NAME=OPTION`` of every registered start whose class suits."""
    classes = {name: registry.lookup("start", name).cls for name in registry.names("start")}
    return [f"{name}={option}" for name, cls in classes.items() if suits(cls) for option in conf.options(name)]  # type: ignore[arg-type]

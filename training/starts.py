"""Where weights of a run come from, before its first step.

``init_from=RUN`` copies those of a run, a checkpoint or an imported folder;
``adapter=lora adapter.targets=[attention] adapter.rank=8`` adds low-rank adapters.
``outline`` is the model with what its starts attach, on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.checkpoint.source import check_init, load_part, load_weights, read_origin, read_start
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.linear import adaptable, attach, is_adapter
from blockwright.registry import Composable, ConfigError, family, plugins, register
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.schema import Place
from blockwright.training.checkpoints.record import Change, listed, past_of, weight_changes
from blockwright.training.configuration import conf
from blockwright.training.patterns import matching

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
        """The origin of its weights (blocks/checkpoint/manifest.py), for checkpoints of the run; empty if unknown."""
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


# --- changes of the model: positions alone are accepted ---------------------------------------------------------------


POSITION = "position"
SHAPE_OF_ROTATION = ("pairing", "rotary_fraction")  # which numbers of a query are rotated together


def check_swaps(there: Mapping[str, Any], here: Mapping[str, Any], start: str, allowed: bool) -> list[str]:
    """Compare the composition that weights were trained in with the one that they are put into.

    Another rotary position block is an extension of the context, and accepted; so is another base (``theta``) for
    ``rope`` itself. What a stretching block counts from, its base, must be the trained one, and the dimensions that are
    rotated together must stay, or the weights mean nothing.

    Args:
        there: complete composition of the weights
        here: that of the model they start
        start: where the weights come from, as written
        allowed: whether other changes were asked for: then they are warned about

    Returns:
        lines about what changes

    Raises:
        ConfigError: at the position's parameter, or at ``init_from`` for any other change
    """
    lines: list[str] = []
    others: list[Change] = []
    for change in weight_changes(there, here):
        pair = _position(change.path, there, here)
        if pair is None:
            others.append(change)
        else:
            lines += _judge(*pair)
    if others and not allowed:
        rule = f"was trained with a model to which its weights mean something else: {listed(others)}"
        remedy = "Add model=pretrained to take the composition from there, or write resume.changed=allow"
        raise ConfigError("init_from", start, rule, remedy)
    if others:
        lines.append(f"the weights of {start} mean something else here: {listed(others, most=8)}")
    return list(dict.fromkeys(lines))


def _position(path: str, there: Any, here: Any) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The path and the nodes of the position block that a change is in; None for any other change."""
    parts = path.split(".")
    if POSITION not in parts:
        return None
    parts = parts[: parts.index(POSITION) + 1]
    old, new = (_at(tree, parts[1:]) for tree in (there, here))
    if old is None or new is None:
        return None
    return ".".join(parts), old, new


def _at(tree: Any, keys: list[str]) -> dict[str, Any] | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    node = {"name": tree} if isinstance(tree, str) else tree
    return _complete(node) if isinstance(node, Mapping) and "name" in node else None


def _complete(node: Mapping[str, Any]) -> dict[str, Any]:
    """A position's node with its defaults."""
    schema = registry.lookup(POSITION, node["name"]).schema
    return {**{name: p.default for name, p in {**schema.parameters, **schema.fixed}.items()}, **node}


def _judge(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    names = f"{old['name']} → {new['name']}"
    rotary = [all(key in node for key in ("theta", *SHAPE_OF_ROTATION)) for node in (old, new)]
    if not all(rotary):
        yield f"{path} was {old['name']}, is {new['name']}: the weights have never seen such positions"
        return
    for key in SHAPE_OF_ROTATION:
        if old[key] != new[key]:
            rule = f"is {old[key]} in the trained weights, whose queries and keys would be rotated in other pairs"
            raise ConfigError(f"{path}.{key}", new[key], rule, f"Write {path}.{key}={old[key]}")
    if old["theta"] != new["theta"] and new["name"] != "rope":
        rule = f"is {old['theta']:g} in the trained weights, and {new['name']} stretches from that base"
        remedy = f"Write {path}.theta={old['theta']:g}; to change the base itself use model/position=rope"
        raise ConfigError(f"{path}.theta", new["theta"], rule, remedy)
    base = "" if old["theta"] == new["theta"] else f", theta {old['theta']:g} → {new['theta']:g}"
    factor = f", factor {new['factor']:g}" if "factor" in new else ""
    yield f"positions: {names}{base}{factor}"


def changed_window(model: Mapping[str, Any], trained: Any) -> str | None:
    """A warning where a position block stretches from another length than that of training.

    Args:
        model: composition, of which the model's own position block is looked at
        trained: tokens of a window of the training that the weights come from, if known
    """
    node = _at(model, [POSITION])
    told = node.get("original_positions") if node else None
    if not isinstance(trained, int) or told is None or told == trained:
        return None
    return f"warning: model.position.original_positions is {told}, but the weights were trained on windows of {trained}"


@register("start", "init_from")
class Trained(Start):
    """The weights of a trained model whose composition has the same names and shapes."""

    def __init__(self, init_from: str) -> None:
        self.trained, self.folder = init_from, Path(init_from)

    def compare(self, there: Mapping[str, Any], here: Mapping[str, Any], allowed: bool) -> list[str]:
        lines = check_swaps(there, here, str(self.trained), allowed)
        return [f"starts from {self.trained}; " + "; ".join(lines)] if lines else []

    def check(self, model: Mapping[str, Any]) -> list[str]:
        try:
            check_init(self.folder, model)
        except ConfigError as error:
            raise ConfigError(error.path, error.value, error.rule, f"{error.remedy}{_or_derive()}") from None
        if not (checkpoint := read_start(self.folder)):
            return []
        trained = (past_of(checkpoint).settings.get("data") or {}).get("sequence_length")
        line = changed_window(model, trained)
        return [f"starts from {self.trained}; {line}"] if line else []

    def fill(self, decoder: Decoder, text: Text) -> None:
        load_weights(decoder, self.folder)

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        load_part(part, self.folder, prefix)

    def origin(self) -> dict[str, Any]:
        return read_origin(self.folder)


def _or_derive() -> str:
    """What else to write where weights do not fit: the starts that derive them."""
    return "".join(f", or {option} to derive these weights" for option in options(lambda start: start.derives))


@register("start", "adapter")
class Lora(Start):
    """Trains B A of W + alpha / rank · B A, and nothing else: Hu et al. 2021, arXiv 2106.09685 (blocks/linear.py).

    Every linear layer and stack of experts whose name matches is adapted; embeddings, norms and gates never are. Unlike
    PEFT, there is no dropout, and a name is a pattern of this project's parameter names.

    Args:
        targets: patterns of parameter names (training/patterns.py): ``attention``, ``experts``, ``layers.0.ffn``
        rank: r, width of A's output
        alpha: the update is scaled by alpha / rank
        start: folder of an adapter in PEFT's layout to start from; null for a new one
        model: composition of the run, with which that adapter is compared
        init_from: the trained model that is adapted
    """

    detachable = True

    def __init__(
        self,
        targets: Sequence[str] = ("attention",),
        rank: Count = 8,
        alpha: Positive = 16.0,
        start: Place | None = None,
        model: Mapping[str, Any] | None = None,
        init_from: str | None = None,
    ) -> None:
        self.targets, self.rank, self.alpha, self.start = list(targets), rank, float(alpha), start
        self.model, self.init_from = model, init_from

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    def check(self, model: Mapping[str, Any]) -> list[str]:
        if self.init_from is None:
            rule = "an adapter is trained on a model that stays as it is, and this one would be random"
            remedy = "Name its weights: init_from=RUN, or the OUT of blockwright import"
            raise ConfigError("init_from", None, rule, remedy)
        _ = self.values
        return []

    def attach(self, decoder: Decoder) -> None:
        names = matching(adaptable(decoder), self.targets, "adapter.targets", "linear layer or stack of experts")
        attach(decoder, names, self.rank, self.scale)

    def check_sharded(self, decoder: Decoder) -> None:
        if not any(p.requires_grad for p in decoder.layers.parameters()):
            rule = "adapts no layer, and sharded weights get gradients through layers only"
            raise ConfigError("adapter.targets", "head", rule, "Add a target in the layers, or write trainer=ddp")

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        own = part.state_dict()
        with torch.no_grad():
            for name, tensor in self.values.items():
                if name.startswith(prefix) and name.removeprefix(prefix) in own:
                    own[name.removeprefix(prefix)].copy_(tensor)

    def record(self) -> dict[str, Any]:
        settings = {"scale": self.scale, "rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return {"adapter": settings}

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """The values to start from, by name; empty if new.

        Raises:
            ConfigError: the adapter at ``start`` is none, or another
        """
        if self.start is None:
            return {}
        decoder = compose(self.model, device="meta")
        self.attach(decoder)
        theirs, scale = plugins.offered(plugins.ADAPTERS, "peft", "adapter.start")(Path(self.start), decoder)
        ours = {name: tuple(p.shape) for name, p in decoder.named_parameters() if is_adapter(name)}
        unlike = [
            name for name in {**ours, **theirs} if name not in theirs or ours.get(name) != tuple(theirs[name].shape)
        ]
        if unlike or abs(scale - self.scale) > 1e-6 * scale:
            rule = f"holds another adapter: {unlike[0] if unlike else f'its alpha / rank is {scale:g}'}"
            remedy = "Write its own targets, rank and alpha, from adapter_config.json"
            raise ConfigError("adapter.start", self.start, rule, remedy)
        return theirs


def outline(model: Mapping[str, Any], starts: Iterable[Start], frozen: Sequence[str] | None) -> Decoder:
    """The decoder on the meta device, with what its starts attach and its frozen parts, which a checkpoint must fit.

    Raises:
        ConfigError: a pattern matches nothing
    """
    decoder = compose(model, device="meta")
    for start in starts:
        start.attach(decoder)
    freeze(decoder, frozen or ())
    return decoder


def freeze(decoder: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters that match any pattern from training.

    Raises:
        ConfigError: a pattern matches no parameter
    """
    parameters = dict(decoder.named_parameters())
    for name in matching(parameters, patterns, "task.frozen"):
        parameters[name].requires_grad_(False)

"""What is tried on a GPU that is not here: every block, every preset, every way that attention may score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blockwright import registry
from blockwright.blocks.compose import preset
from blockwright.blocks.conformance.hyperparameters import switched_on
from blockwright.blocks.conformance.setting import Setting
from blockwright.registry import presets
from tests.gpu.blocks_at_work import PARTS

# Of real models, in place of what the conformance kit gives a block by the same names.
WIDTHS = {
    "vocab_size": 32768,
    "d_model": 2048,
    "max_positions": 4096,
    "d_ff": 1408,
    "n_heads": 16,
    "n_kv_heads": 4,
    "n_experts": 64,
    "window": 1024,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 128,
    "width": 512,  # of a latent that experts work in
    "levels": 12,
}
OF_DOCUMENTS = ("attention/", "position/", "scores/")  # blocks that several documents in a row make a difference to


OF_PICTURES = ("images", "vision", "projector", "tiling")  # not tried yet: a step of them needs pictures


def block_names() -> list[str]:
    """``KIND/NAME`` of each block of this project that reads tokens."""
    kinds = [kind for kind in registry.kinds() if kind not in OF_PICTURES]
    found = [(kind, name) for kind in kinds for name in registry.names(kind)]
    return ["/".join(f) for f in found if registry.lookup(*f).cls.__module__.startswith("blockwright.blocks.")]


def compiled_names() -> list[str]:
    """The same without tables of rows: the compiler asks the device for memory to trace a sparse gradient."""
    return [name for name in block_names() if not name.startswith("memory/")]


def compiled_presets() -> list[str]:
    """The presets without such tables."""
    return [name for name in presets.names() if "memory" not in published(name)]


def block(name: str) -> dict[str, Any]:
    """A decoder of one layer that holds a block, with its options on."""
    setting = Setting(*name.split("/"))
    node = {k: v for k, v in switched_on(setting).items() if k != "dropping"}  # tried by itself
    return widened(setting.model(node, n_layers=1))


def widened(node: Any) -> Any:
    """A configuration at the widths of real models."""
    if not isinstance(node, Mapping):
        return node
    return {k: WIDTHS.get(k, v) if type(v) is int else widened(v) for k, v in node.items()}


def published(name: str) -> dict[str, Any]:
    """A preset at its own widths; those that leave the vocabulary to the data get one."""
    return {"vocab_size": WIDTHS["vocab_size"], **preset(name)}


@dataclasses.dataclass(frozen=True)
class Attention:
    """Heads, and how their scores are formed.

    Args:
        widths: of keys, and of values
        heads: of queries, and of keys and values
        parts: of ``Scoring``, beside the window; ``slopes`` and ``band`` for a bias that is not computed
        window: how many tokens a token sees
        length: of the rows, in tokens
    """

    widths: tuple[int, int]
    heads: tuple[int, int]
    parts: tuple[str, ...] = ()
    window: int | None = None
    length: int = 2048


ATTENTIONS = {
    "mla, documents": Attention((192, 128), (16, 16), ("segments",)),
    "gqa 128, documents": Attention((128, 128), (32, 8), ("segments",)),
    "gqa 128, window": Attention((128, 128), (32, 8), window=1024),
    "gqa 128, window, documents": Attention((128, 128), (32, 8), ("segments",), window=1024),
    "256, soft cap": Attention((256, 256), (16, 8), ("softcap",)),
    "256, bias": Attention((256, 256), (16, 8), ("bias",)),
    "256, alibi": Attention((256, 256), (16, 8), ("slopes",)),
    "256, soft cap, window, documents": Attention((256, 256), (16, 8), ("softcap", "segments"), window=4096),
    "64, sinks, window": Attention((64, 64), (64, 8), ("sinks",), window=128),
    "64, sinks, documents": Attention((64, 64), (64, 8), ("sinks", "segments")),
    "mha 128, bias": Attention((128, 128), (32, 32), ("bias",)),
    "mha 128, bias, documents": Attention((128, 128), (32, 32), ("bias", "segments")),
    "mha 128, alibi": Attention((128, 128), (32, 32), ("slopes",)),
    "mha 128, alibi, documents": Attention((128, 128), (32, 32), ("slopes", "segments")),
    "gqa 128, band": Attention((128, 128), (32, 8), ("band",)),
    "gqa 128, band, window, documents": Attention((128, 128), (32, 16), ("band", "segments"), window=512),
    "values wider than keys": Attention((64, 128), (16, 16), ("segments",)),
    "a length of no whole block": Attention((128, 128), (32, 8), window=64, length=200),
}

# Kernel, bits of the codes, rows of a head: triton_products.py pads them to 16 at least, and takes 64 at most.
CODED = {
    f"{kernel}, {bits} bits, {rows} rows": (kernel, bits, rows)
    for kernel in ("scores", "averages")
    for bits in (8, 6, 4)
    for rows in (16, 32, 64)
}

NAMES: dict[str, Callable[[], Iterable[str]]] = {  # check → what it tries
    "block": block_names,
    "preset": presets.names,
    "launches": compiled_presets,
    "decode": presets.names,
    "attending": presets.names,
    "graphs": presets.names,
    "compiled": compiled_names,
    "compiled_preset": compiled_presets,
    "attention": lambda: ATTENTIONS,
    "coded": lambda: CODED,
    "timed": lambda: PARTS,
}

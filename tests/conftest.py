"""What tests of several folders share: small blocks and models, and registrations that end with the test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch import nn

import registry
from registry import Node, Scope, catalogue

MOE = {
    "ffn": {"name": "moe", "n_experts": 6, "shared": {"name": "swiglu", "d_ff": 20}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert", "alpha": 0.01}},
    "experts": {"name": "swiglu", "d_ff": 12},
}


def _randomise(module: nn.Module, seed: int, scale: float) -> None:
    """Every parameter random, gains and biases too: a block that forgets one must not pass by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            gain = p.ndim < 2 and not name.endswith("bias")
            p.copy_(1 + 0.2 * draw if gain else draw * scale / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    return lambda module, seed=0, scale=1.0: _randomise(module, seed, scale)


@pytest.fixture(scope="session")
def make_block() -> Callable[..., Any]:
    """Builds ``kind`` from a node, with its children found in ``around`` and every parameter random."""

    def make(
        kind: str,
        node: Any,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        around: dict[str, Any] | None = None,
        **context: Any,
    ) -> Any:
        nodes = {"position": "none", "norm": "rmsnorm", **(around or {})}
        scope = Scope(
            {k: Node(v, f"model.{k}") for k, v in nodes.items()},
            {"d_model": 48, "n_layers": 2, "layer_idx": 0, "max_positions": 64, **context},
        )
        block = registry.build(kind, Node(node, f"model.{kind}"), scope).to(dtype)
        for buffer in block.buffers():
            buffer.zero_()
        _randomise(block, seed, 1.0)
        return block

    return make


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """A small valid model; ``moe=True`` gives it routed and shared experts from layer 1 on."""

    def make(moe: bool = False, **changes: Any) -> dict[str, Any]:
        model: dict[str, Any] = {
            "vocab_size": 61,
            "d_model": 48,
            "n_layers": 2,
            "max_positions": 64,
            "init": {"std": 0.05, "depth_scaled": False},
            "attention": {"name": "gqa"},
            "position": {"name": "rope"},
            "ffn": {"name": "swiglu", "d_ff": 40},
            "norm": {"name": "rmsnorm"},
            "residual": {"name": "prenorm"},
        }
        if moe:
            dense = {"variants": {"ffn": {"dense": model["ffn"]}}, "layout": {"ffn": "dense*1 ffn*"}}
            model |= {**copy.deepcopy(MOE), **dense}
        return {**model, **copy.deepcopy(changes)}

    return make


@pytest.fixture
def temporary_blocks() -> Iterator[None]:
    """Whatever the test registers is gone afterwards, from the catalogue and from Hydra's store."""
    registry.load()
    entries = {kind: dict(found) for kind, found in catalogue._entries.items()}
    families = dict(catalogue._families)
    store = ConfigStore.instance()
    repo = copy.deepcopy({kind: set(store.repo.get("model", {}).get(kind, {})) for kind in store.repo.get("model", {})})
    yield
    for found, before in ((catalogue._entries, entries), (catalogue._families, families)):
        found.clear()
        found.update(before)
    for kind in list(store.repo.get("model", {})):
        group = store.repo["model"][kind]
        for name in [n for n in group if n not in repo.get(kind, ())]:
            del group[name]
        if not group:
            del store.repo["model"][kind]

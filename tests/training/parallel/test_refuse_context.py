"""Settings of ``trainer.strategy.context`` that cannot be right are refused before a process starts, each by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.attention.grouped import GQA
from blockwright.blocks.balance import ExpertBalance
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.softmax import SoftmaxTopK
from blockwright.registry import ConfigError, register

CP = ("trainer=[fsdp_cp,sim]", "data.sequence_length=64", "model.max_positions=64")
PLUGIN = Path(__file__).parents[2] / "plugin"


class Forgetful(GQA):
    def new_cache(self, *given: Any, **more: Any) -> Cache:
        raise NotImplementedError


class Own:
    """No cache of the contract."""


class WithOwn(GQA):
    def new_cache(self, *given: Any, **more: Any) -> Cache:
        return Own()  # type: ignore[return-value]


class Twice(GQA):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        y = super().forward(x, given)
        return super().forward(y, given)


class Never(GQA):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given._replace(cache=None))


class Peeking(GQA):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        assert given.cache is None or given.cache.stores["k"]
        return super().forward(x, given)


class Unsplit(ExpertBalance):
    splits = False


class AcrossTokens(SoftmaxTopK):
    causal = False


@pytest.fixture(autouse=True)
def plug_ins(temporary_blocks: None) -> None:
    for cls in (Forgetful, WithOwn, Twice, Never, Peeking):
        register("attention", cls.__name__.lower())(cls)
    register("balance", "unsplit")(Unsplit)
    register("gating", "across_tokens")(AcrossTokens)


# path of the value at fault → overrides beside CP, each line a mistake
MISTAKES: dict[str, list[list[str]]] = {
    "trainer.strategy.context": [
        ["trainer.strategy.context=0"], ["trainer.strategy.context=1.5"], ["trainer.strategy.context=auto"],
        ["trainer.strategy.context=4"], ["trainer.devices=3"], ["trainer.dry_run=true", "trainer.world=1023"],
    ],
    "trainer.strategy.shard": [["trainer.strategy.shard=2"]],
    "trainer.strategy.expert": [["trainer.strategy.expert=4"]],
    "data.sequence_length": [["data.sequence_length=62"]],
    "data.eval_batch_size": [["trainer.devices=6", "data.batch_size=3", "data.eval_batch_size=4"]],
    "model.mtp.depth": [["+model.mtp={depth: 16}"]],
    "trainer.compile": [["trainer.compile=true"]],
    "model.gating": [["model/gating=expert_choice"], ["model/gating=sinkhorn"], ["model/gating=across_tokens"]],
    "model.ffn.dropping|model.dropping": [["+model/dropping=device_budget", "model.dropping.n_devices=1"]],
    "model.gating.balance": [["model/gating=softmax_topk", "model.gating.balance={name: unsplit}"]],
    "model.attention": [
        ["model/attention=forgetful"], ["model/attention=withown"], ["model/attention=twice"],
        ["model/attention=never"], ["model/attention=peeking"],
    ],
    "model.memory": [["+model/memory=engram", "model.memory.rows=50", "model.memory.taps=6"]],
    "task": [["task=preference", "data=chat"]],
}  # fmt: skip


@pytest.mark.slow
def test_mistake_is_refused_where_it_is_written(checked, monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    for path, mistakes in MISTAKES.items():
        for given in mistakes:
            with pytest.raises(ConfigError) as caught:
                checked(*CP, *given)
            assert re.match(path, caught.value.path), (given, caught.value.path, str(caught.value))


def test_what_is_refused_with_context_passes_without(checked: Callable[..., dict[str, Any]]) -> None:
    checked(*CP, "data.sequence_length=62", "trainer.strategy.context=1")


@pytest.mark.slow
def test_built_in_blocks_pass(checked: Callable[..., dict[str, Any]]) -> None:
    for attention, position in (("mla", "rope"), ("sliding_window", "alibi")):
        checked(*CP, f"model/attention={attention}", f"model/position={position}")
    assert torch.get_default_dtype() is torch.float32

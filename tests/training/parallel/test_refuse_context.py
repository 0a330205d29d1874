"""Settings of ``trainer.strategy.context`` that cannot be right are refused before a process starts, each by itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.balance.expert import ExpertBalance
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.softmax_topk import SoftmaxTopK
from blockwright.registry import ConfigError, register

CP = ("trainer=[fsdp_cp,sim]", "data.sequence_length=64", "model.max_positions=64")
MTP = "+model.mtp={depth: 16}"
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


# overrides beside CP → the path of the value at fault, and what the message says
MISTAKES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "no ranks": (("trainer.strategy.context=0",), "trainer.strategy.context", "positive number of ranks"),
    "half a rank": (("trainer.strategy.context=1.5",), "trainer.strategy.context", "positive number of ranks"),
    "all that are left": (("trainer.strategy.context=auto",), "trainer.strategy.context", "positive number of ranks"),
    "more than there are": (("trainer.strategy.context=4",), "trainer.strategy.context", "world of 2"),
    "no divisor of the world": (
        ("trainer.devices=3",),
        "trainer.strategy.context",
        "replicate × context × tensor = 2 ranks do not divide the world of 3",
    ),
    "shards that overfill the world": (
        ("trainer.strategy.shard=2",),
        "trainer.strategy.shard",
        "replicate × shard × context × tensor = 4 ranks do not fill the world of 2",
    ),
    "imagined world": (
        ("trainer.dry_run=true", "trainer.world=1023"),
        "trainer.strategy.context",
        "do not divide the world of 1023",
    ),
    "experts": (("trainer.strategy.expert=4",), "trainer.strategy.expert", "shard × context.*Choose one of 1, 2"),
    "window of odd length": (
        ("data.sequence_length=62",),
        "data.sequence_length",
        "two of 4 equal chunks.*Set data.sequence_length=64",
    ),
    "evaluation that cannot be shared": (
        ("trainer.devices=6", "data.batch_size=3", "data.eval_batch_size=4"),
        "data.eval_batch_size",
        "3 of them share the data evenly",
    ),
    "prediction beyond a chunk": ((MTP,), "model.mtp.depth", "less than the 16 tokens of a chunk"),
    "compiled layers": (("trainer.compile=true",), "trainer.compile", "exchanges keys"),
    "experts that choose tokens": (("model/gating=expert_choice",), "model.gating", "among all tokens"),
    "assignment of a batch": (("model/gating=sinkhorn",), "model.gating", "among all tokens.*softmax_topk"),
    "budget of a batch": (
        ("+model/dropping=device_budget", "model.dropping.n_devices=1"),
        "model.ffn.dropping|model.dropping",
        "among all tokens",
    ),
    "plug-in's gate across tokens": (("model/gating=across_tokens",), "model.gating", "among all tokens"),
    "balance of whole windows": (
        ("model/gating=softmax_topk", "model.gating.balance={name: unsplit}"),
        r"model\.gating\.balance",
        "over_sequence",
    ),
    "attention without a cache": (("model/attention=forgetful",), r"model\.attention", "keeps no cache"),
    "attention with a cache of its own": (("model/attention=withown",), r"model\.attention", "keeps a Own in place"),
    "attention that appends twice": (("model/attention=twice",), r"model\.attention", "2 times in a pass"),
    "attention that never appends": (("model/attention=never",), r"model\.attention", "0 times in a pass"),
    "attention that reads its cache": (("model/attention=peeking",), r"model\.attention", "does not run.*KeyError"),
    "memory that reaches beyond a chunk": (
        ("+model/memory=engram", "model.memory.rows=50", "model.memory.taps=6"),
        r"model\.memory",
        "17 tokens before each.*are of 16",
    ),
    "task of whole windows": (
        ("task=preference", "data=chat"),
        "task",
        "splits = True.*write trainer.strategy.context=1",
    ),
}


@pytest.mark.slow
def test_mistake_is_refused_where_it_is_written(
    checked: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))
    for name, (given, path, says) in MISTAKES.items():
        with pytest.raises(ConfigError) as caught:
            checked(*CP, *given)
        error = caught.value
        assert re.match(rf"({path})", error.path), (name, error.path, str(error))
        assert re.search(says, f"{error.rule} {error.remedy}", re.DOTALL), (name, str(error))


def test_what_is_refused_with_context_passes_without(checked: Callable[..., dict[str, Any]]) -> None:
    checked(*CP, *MISTAKES["window of odd length"][0], "trainer.strategy.context=1")


@pytest.mark.slow
def test_built_in_blocks_pass(checked: Callable[..., dict[str, Any]]) -> None:
    for attention, position in (("mla", "rope"), ("sliding_window", "alibi")):
        checked(*CP, f"model/attention={attention}", f"model/position={position}")
    assert torch.get_default_dtype() is torch.float32

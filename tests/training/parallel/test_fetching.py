"""Weights are gathered before they are reached: those of a layer's experts while the layer before it computes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from many_ranks import MOE, read_model, spawn


def record() -> list[str]:
    """The order in which groups of weights are gathered, and feed-forward blocks reached."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    sharding = Sharding(make_meshes(Sizes(shard=2, expert=1), "cpu"), torch.bfloat16)
    decoder: Any = build(read_model(MOE.replace("n_layers: 2", "n_layers: 3")), 0, sharding)
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder.hidden(tokens)[0].square().sum().backward()  # the first pass sets FSDP2 up
    events: list[str] = []
    unshard = FSDPParamGroup.unshard

    def gather(self: Any, async_op: bool = False) -> Any:
        events.append(f"gather {self._module_fqn}")
        return unshard(self, async_op)

    for i, layer in enumerate(decoder.layers):
        layer.ffn.register_forward_pre_hook(lambda *_, i=i: events.append(f"reach {i}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", gather)
        decoder.hidden(tokens)[0].square().sum().backward()
    return events


@pytest.mark.slow
def test_gates_of_the_next_layer_are_gathered_before_this_one_reaches_its_own() -> None:
    for events in spawn(2, record):
        for i in range(2):
            ahead = events.index(f"gather layers.{i + 1}.ffn.gating")
            assert ahead < events.index(f"reach {i}"), events
        assert [e for e in events if e.startswith("gather layers.0.ffn")], events


def test_checkpoint_is_a_folder_where_many_ranks_share_and_one_large_file_is_refused() -> None:
    from blockwright.registry import ConfigError
    from blockwright.training.parallel.sizes import Sizes
    from blockwright.training.parallel.strategy import refuse_large_file, writes_folder

    assert [writes_folder(None, Sizes(shard=n)) for n in (1, 8, 16)] == [False, False, True]
    assert writes_folder(True, Sizes(shard=2)) and not writes_folder(False, Sizes(shard=16))
    with torch.device("meta"):
        small, large = (torch.nn.Linear(10**5, n, bias=False) for n in (50_000, 54_000))
    refuse_large_file(small)
    with pytest.raises(ConfigError, match=r"65 GB.*sharded_checkpoints=true"):
        refuse_large_file(large)


def test_strategy_settles_what_a_checkpoint_is_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockwright.registry import ConfigError
    from blockwright.training.parallel.sizes import Sizes
    from blockwright.training.parallel.strategy import Parallel

    set_up: list[Any] = []
    monkeypatch.setattr(ModelParallelStrategy, "setup", lambda self, trainer: set_up.append(trainer))
    monkeypatch.setattr(Parallel, "_setup_distributed", lambda self: None)
    with torch.device("meta"):
        large = torch.nn.Linear(10**5, 54_000, bias=False)
    for ranks, callbacks, refused in ((8, [1], True), (8, [], False), (16, [1], False)):
        strategy = Parallel()
        strategy._lightning_module = SimpleNamespace()
        strategy.meshes = SimpleNamespace(dense=None, sizes=Sizes(shard=ranks))
        strategy.setup_environment()
        assert strategy._save_distributed_checkpoint == (ranks > 8)
        with pytest.raises(ConfigError) if refused else nullcontext():
            strategy.setup(SimpleNamespace(checkpoint_callbacks=callbacks, lightning_module=large))
    assert len(set_up) == 2

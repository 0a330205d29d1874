"""A checkpoint that ranks share: digested by the rank that wrote, one refusal where a disk is full, gathered ahead."""

from __future__ import annotations

import resource
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from many_ranks import DENSE, MOE, read_model, spawn, train

from blockwright.blocks.checkpoint import manifest
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.atomic import check_together, seal
from blockwright.training.checkpoints.saving import save


def work(folder: Path) -> dict[str, Any]:
    rank, told = dist.get_rank(), {}
    read: list[str] = []
    digest = manifest._sha256
    manifest._sha256 = lambda path, *rest: (read.append(path.name), digest(path, *rest))[1]
    (folder / f"__{rank}_0.distcp").write_bytes(bytes([rank]) * 100)
    dist.barrier()
    digests = seal(folder)
    told["sealed"], told["named"] = sorted(read), sorted(digests)
    if rank == 0:
        manifest.seal_folder(folder, digests)
    dist.barrier()
    told["read at the sealing"] = sorted(read)
    read.clear()
    manifest._remembered_sha256.cache_clear()
    check_together(folder)
    told["checked"] = sorted(read)
    dist.barrier()
    if rank == 0:
        (folder / "__1_0.distcp").write_bytes(bytes([7]) * 100)
    dist.barrier()
    try:
        check_together(folder)
    except manifest.Damaged as error:
        told["damaged"] = error.reason
    return told


def test_a_rank_reads_only_what_it_wrote_and_damage_that_one_finds_is_told_to_all(tmp_path: Path) -> None:
    for name in (".metadata", "meta.pt"):
        (tmp_path / name).write_bytes(b"x")
    ranks = spawn(2, work, tmp_path)
    for what in ("sealed", "read at the sealing", "checked"):
        shards = [[name for name in told[what] if name.startswith("__")] for told in ranks]
        assert shards == [["__0_0.distcp"], ["__1_0.distcp"]]
        assert sorted(ranks[0][what] + ranks[1][what]) == ranks[0]["named"] == ranks[1]["named"]
        assert len(ranks[0]["named"]) == 4
    assert all("__1_0.distcp" in told["damaged"] for told in ranks)


def fill_up(folder: Path) -> dict[str, Any]:
    """For each limit on the size of files, and each rank that has it or all: what ``save`` raises, and what is left."""

    def then(trainer: Any, task: Any) -> dict[str, Any]:
        path, found = folder / "checkpoints" / "last.ckpt", {}
        save(trainer, path)
        largest = max(file.stat().st_size for file in path.iterdir())
        for limit in (500, largest // 2):
            for ranks in ({0}, {1}, {0, 1}):
                if dist.get_rank() in ranks:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    save(trainer, path)
                    raised = None
                except BaseException as error:
                    raised = type(error)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                dist.barrier()  # the first rank has removed what it had begun
                left = sorted(each.name for each in path.parent.iterdir() if each.name != "last.previous.ckpt")
                found[limit, tuple(ranks)] = raised, left, manifest.check(path)
                dist.barrier()
        return found

    return train(DENSE, strategy={"sharded_checkpoints": True}, devices=2, steps=1, then=then)["extra"]


@pytest.mark.slow
def test_every_rank_refuses_and_nothing_is_left_beside_the_old_one(tmp_path: Path) -> None:
    for each in spawn(2, fill_up, tmp_path):
        assert {kind for kind, _, _ in each.values()} == {ConfigError}
        assert all(left == ["last.ckpt"] and whole for _, left, whole in each.values())


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

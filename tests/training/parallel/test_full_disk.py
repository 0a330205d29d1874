"""A full disk on any rank is one refusal of all ranks, whatever file it comes at: the old checkpoint stays, alone."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from many_ranks import DENSE, spawn, train

from blockwright.blocks.checkpoint import manifest
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.saving import save


def work(folder: Path) -> dict[str, Any]:
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, work, tmp_path_factory.mktemp("full"))


@pytest.mark.slow
def test_every_rank_refuses_and_nothing_is_left_beside_the_old_one(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert {kind for kind, _, _ in each.values()} == {ConfigError}
        assert all(left == ["last.ckpt"] and whole for _, left, whole in each.values())

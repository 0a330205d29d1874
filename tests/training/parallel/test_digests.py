"""Each rank digests the shards that it wrote, and a folder is still verified as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from many_ranks import spawn

from blockwright.blocks.checkpoint import manifest
from blockwright.training.checkpoints import together


def work(folder: Path) -> dict[str, Any]:
    rank, told = dist.get_rank(), {}
    read: list[str] = []
    digest = manifest._sha256
    manifest._sha256 = lambda path, *rest: (read.append(path.name), digest(path, *rest))[1]
    (folder / f"__{rank}_0.distcp").write_bytes(bytes([rank]) * 100)
    dist.barrier()
    digests = together.seal(folder)
    told["sealed"], told["named"] = sorted(read), sorted(digests)
    if rank == 0:
        manifest.seal_folder(folder, digests)
    dist.barrier()
    told["read at the sealing"] = sorted(read)
    read.clear()
    manifest._remembered_sha256.cache_clear()
    together.check(folder)
    told["checked"] = sorted(read)
    dist.barrier()
    if rank == 0:
        (folder / "__1_0.distcp").write_bytes(bytes([7]) * 100)
    dist.barrier()
    try:
        together.check(folder)
    except manifest.Damaged as error:
        told["damaged"] = error.reason
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    for name in (".metadata", "meta.pt"):
        (folder / name).write_bytes(b"x")
    return spawn(2, work, folder)


def test_a_rank_reads_only_what_it_wrote_and_together_they_read_all(ranks: list[dict[str, Any]]) -> None:
    for what in ("sealed", "read at the sealing", "checked"):
        shards = [[name for name in told[what] if name.startswith("__")] for told in ranks]
        assert shards == [["__0_0.distcp"], ["__1_0.distcp"]]
        assert sorted(ranks[0][what] + ranks[1][what]) == ranks[0]["named"] == ranks[1]["named"]
        assert len(ranks[0]["named"]) == 4


def test_damage_that_one_rank_finds_is_told_to_all(ranks: list[dict[str, Any]]) -> None:
    assert {told["damaged"] for told in ranks} == {"is damaged: the bytes of __1_0.distcp do not match its digest"}

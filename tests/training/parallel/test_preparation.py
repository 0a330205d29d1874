"""Several ranks prepare one corpus: one of each node reads it, all hear of a failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from many_ranks import spawn

from blockwright.registry.errors import ConfigError
from blockwright.training.data import packing
from blockwright.training.data.corpus import TextFiles
from blockwright.training.data.modules.text import Batching, TextDataModule
from blockwright.training.data.tokenizers.tokenizer import Chars
from tests.training.parallel.quiet import quiet_trainer


class Counted(TextFiles):
    """Text files that count how often they are read as a whole."""

    n_fingerprints = 0

    def fingerprint(self) -> str:
        Counted.n_fingerprints += 1
        return super().fingerprint()


class Broken(TextFiles):
    def documents(self, split: Any) -> Any:
        raise NotImplementedError

    def streams(self, split: Any) -> Any:
        raise OSError("the disk is gone")


class Nothing(L.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def fit(corpus: TextFiles, cache: Path) -> TextDataModule:
    data = TextDataModule(Batching(Chars(64), 8, 4, corpus=corpus, cache_dir=str(cache)))
    nodes = {"devices": 2, "num_nodes": 2, "strategy": "ddp"}
    trainer = quiet_trainer(**nodes, max_steps=1, limit_val_batches=0)
    trainer.fit(Nothing(), data)
    return data


def refusal(corpus: TextFiles, cache: Path) -> str:
    try:
        fit(corpus, cache)
    except ConfigError as error:
        return str(error)
    return "none"


def work(folder: Path) -> dict[str, Any]:
    """Four ranks on two nodes that have disks of their own, then on two that share one."""
    rank = dist.get_rank()
    node = rank // 2
    os.environ.update(LOCAL_RANK=str(rank % 2), GROUP_RANK=str(node), LOCAL_WORLD_SIZE="2")
    built, told = [], {}
    publish = packing._write
    packing._write = lambda *given: (built.append(1), publish(*given))[1]
    for disk, cache in (("own", folder / f"cache{node}"), ("shared", folder / "cache")):
        Counted.n_fingerprints = 0
        built.clear()
        data = fit(Counted(str(folder / "same.txt")), cache)
        told[disk] = (Counted.n_fingerprints, len(built), data.state_dict()["corpus"], data.tokenizer.to_json())
    told["missing"] = refusal(Counted(str(folder / "missing.txt")), folder / "cache")
    told["one node"] = refusal(Counted(str(folder / f"only{node}.txt")), folder / "cache")
    told["different"] = refusal(Counted(str(folder / f"node{node}.txt")), folder / "cache")
    told["broken"] = refusal((Broken if rank == 0 else TextFiles)(str(folder / "same.txt")), folder / "other")
    return told


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(f"line {i}\n" for i in range(60))
    for name in ("same", "node0", "only0"):
        (folder / f"{name}.txt").write_text(lines)
    (folder / "node1.txt").write_text(lines.upper())
    return spawn(4, work, folder)


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["own", "shared"])
def test_one_rank_of_a_node_reads_the_corpus_and_the_others_map_it(four: list[dict[str, Any]], disk: str) -> None:
    reads, builds, fingerprints, vocabularies = zip(*(told[disk] for told in four), strict=True)
    assert reads == (1, 0, 1, 0)
    assert sum(builds) == (2 if disk == "own" else 1) and builds[1] == builds[3] == 0
    assert len(set(fingerprints)) == 1 and all(each == vocabularies[0] for each in vocabularies)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["missing", "one node", "different", "broken"])
def test_a_failure_to_prepare_reaches_every_rank(four: list[dict[str, Any]], case: str) -> None:
    messages = {told[case] for told in four}
    assert len(messages) == 1, messages
    assert messages != {"none"}

"""An image side under every strategy, and killed and resumed: the losses and weights of one process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks import BATCHES, DEEPSEEK, LENGTH, WINDOWS, Descent, Tokens, far, spawn, train
from warm import Running, Warm

from blockwright.blocks.kernels.cross_entropy import IGNORED

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("image_ranks")]  # its fixture trains on two ranks, once

IMAGE = 39
SIGHT = f"""
images: {{name: early_fusion, image_token: {IMAGE}}}
vision:
  {{name: siglip, tile: 8, patch: 4, width: 16, depth: 2, n_heads: 2, norm: layernorm, ffn: {{name: gelu, d_ff: 24}}}}
projector: downsample_mlp
tiling: grid_2d
"""
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": {}, "fsdp_ep": {"expert": 2}, "tp": {"tensor": 2, "shard": 1}}
GRIDS = ((1, 1), (2, 1))  # places: 5 and 6, tiles: 1 and 3


class Sights(Tokens):
    """Windows of which some begin with a picture; of every other batch, none of the second half, which rank 1 reads."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.tokens %= IMAGE
        self.tiles = torch.randint(256, (WINDOWS * BATCHES, 3, 3, 8, 8), generator=draw, dtype=torch.uint8)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        batch = super().__getitems__(rows)
        seen = [i for i, row in enumerate(rows) if row // WINDOWS % 2 or row % WINDOWS < WINDOWS // 2]
        grids = [GRIDS[rows[i] % 2] for i in seen]
        for i, (columns, _) in zip(seen, grids, strict=True):
            batch["tokens"][i, : 4 + columns], batch["targets"][i, : 3 + columns] = IMAGE, IGNORED
            batch["targets"][i, LENGTH - 1] = 1  # something is scored
        tiles = [self.tiles[rows[i], : 1 if grid == (1, 1) else 3] for i, grid in zip(seen, grids, strict=True)]
        blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        return {**batch, "images.tiles": torch.cat(tiles or [blank]), "images.grids": torch.tensor(grids).view(-1, 2)}


def run(**how: Any) -> dict[str, Any]:
    return train(DEEPSEEK + SIGHT, **{"steps": 3, "optimizer": Descent(), "data": Sights(), **how})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")

    def all_() -> dict[str, Any]:
        found = {name: run(strategy=how, devices=2) for name, how in STRATEGIES.items()}
        recomputed = {"activation_checkpointing": "full"}
        return {**found, "recomputed": run(strategy={}, devices=2, task=recomputed)}

    first = str(folder / "first.ckpt")
    run(steps=2, save=first)
    return {**spawn(2, all_)[0], "resumed": run(ckpt_path=first), "alone": run()}


@pytest.mark.parametrize("strategy", [*STRATEGIES, "recomputed"])
def test_losses_and_weights_are_those_of_one_process(runs: Any, strategy: str) -> None:
    losses, weights = far(runs[strategy], runs["alone"])
    assert losses < 1e-5 and weights < 1e-4


def test_resumed_training_is_bit_identical(runs: Any) -> None:
    alone, resumed = runs["alone"], runs["resumed"]
    assert resumed["losses"] == alone["losses"][2:]
    assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in alone["weights"].items())
    seen = {name for name in alone["weights"] if name.startswith("images.")}
    assert len(seen) > 20


ROOT = Path(__file__).resolve().parents[3]
STEPS = 12
GIVEN = [
    *("experiment=vl2_small", "callbacks=default", "test=false"),
    *("data.corpus.train=200", "data.corpus.held_out=12", "data.batch_size=4", "data.num_workers=2"),
    *("data.sequence_length=96", "model.max_positions=128", "model.d_model=32", "model.vision.width=32"),
    *("model.vision.depth=1", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "scheduler.warmup=2"),
]


@pytest.fixture
def start(warm: Warm, environment: dict[str, str], tmp_path: Path) -> Callable[..., Running]:
    def call(*given: str) -> Running:
        command = [str(ROOT / "train.py"), *GIVEN, f"paths.data_dir={tmp_path}/data", *given]
        return warm.start(*command, cwd=tmp_path, env=environment, merge=True)

    return call


def ends_well(process: Running) -> None:
    said, _ = process.communicate(600)
    assert process.returncode == 0, said


def weights(run: Path) -> tuple[int, dict[str, Any]]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


@pytest.mark.slow
def test_killed_run_resumes_bit_identical(start: Callable[..., Running], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ends_well(start(f"hydra.run.dir={whole}"))
    process = start(f"hydra.run.dir={cut}")
    limit = time.monotonic() + 600
    while not (cut / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < limit, process.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the loader processes too, as a machine that loses power
    process.communicate()
    step, _ = weights(cut)
    assert 0 < step < STEPS
    ends_well(start(f"hydra.run.dir={cut}", "ckpt_path=last"))
    (last, found), (expected, wanted) = weights(cut), weights(whole)
    assert last == expected == STEPS
    assert any(name.startswith("decoder.images.vision.") for name in wanted)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)

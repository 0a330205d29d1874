"""A run on pictures, killed in the middle of an epoch and resumed, is the run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12
GIVEN = [
    *("experiment=vl2_small", "callbacks=default", "test=false"),
    *("data.corpus.train=200", "data.corpus.held_out=12", "data.batch_size=4", "data.num_workers=2"),
    *("data.sequence_length=96", "model.max_positions=128", "model.d_model=32", "model.vision.width=32"),
    *("model.vision.depth=1", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "scheduler.warmup=2"),
]


def start(folder: Path, *given: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), *GIVEN, f"paths.data_dir={folder}/data", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)


def weights(run: Path) -> tuple[int, dict[str, Any]]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["global_step"], checkpoint["state_dict"]


@pytest.mark.slow
def test_killed_run_resumes_bit_identical(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(tmp_path, f"hydra.run.dir={whole}").wait(600) == 0, (tmp_path / "said.txt").read_text()
    process = start(tmp_path, f"hydra.run.dir={cut}")
    limit = time.monotonic() + 600
    while not (cut / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < limit, (tmp_path / "said.txt").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the loader processes too, as a machine that loses power
    process.wait()
    step, _ = weights(cut)
    assert 0 < step < STEPS
    assert start(tmp_path, f"hydra.run.dir={cut}", "ckpt_path=last").wait(600) == 0, (tmp_path / "said.txt").read_text()
    (last, found), (expected, wanted) = weights(cut), weights(whole)
    assert last == expected == STEPS
    assert any(name.startswith("decoder.images.vision.") for name in wanted)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)

"""A step of training waits for a GPU once, where it is judged, and where it logs: all of Lightning and callbacks too.

Whatever reads a number of a tensor, or makes a tensor whose size depends on numbers, makes the host wait until a GPU
has computed all that was asked of it, and the GPU wait for the host afterwards: 10 to 50 µs, and the overlap of both.
On a CPU the same operators are called, by the same lines.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.training.cadence import logs_now
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import OWN
from blockwright.training.entry.preflight import preflight
from tests.training.test_half_precision import CALLBACKS, SMALL, TEXT

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave")
COPIES = ("tolist", "cpu", "numpy")  # of which nothing is dispatched for a tensor that is on the CPU already
# Lines that may wait at a step that logs, one in log_every_n_steps, or saves; and why.
NOW_AND_THEN = {
    "training/metrics.py": "whether any token was counted since the last log, by which its mean is divided",
    "training/tasks/routing.py": "the shares of experts, which are drawn",
    "training/callbacks/experts.py": "a warning of experts that get nothing",
    "training/callbacks/throughput.py": "the tokens of all ranks",
    "training/callbacks/progress.py": "the line, or what the bar shows",
    "lab/run_report.py": "the curves of the report",
    "lightning/fabric/utilities/apply_func.py": "the figures for loggers",
    "training/checkpoints/saving.py": "that a checkpoint is finite",
}
AT_EVERY_STEP = {
    "training/callbacks/guard.py": "the loss and the gradient's norm, at once, before the step is taken or skipped",
    # and of callbacks that a run asks for
    "training/callbacks/step_end.py": "whether a score is beyond the bound, without which all weights would be scaled",
    "lightning/pytorch/callbacks/weight_averaging.py": "torch counts the averages in a tensor, and looks at it twice",
}


class Reads(TorchDispatchMode):
    """Lines of ours or Lightning's that read numbers, by whether the step logs, or is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: L.Trainer | None = None  # in a step of training
        self.found: set[tuple[bool, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        if self.trainer is not None:
            frames = [frame.filename for frame in reversed(traceback.extract_stack())]
            place = next(f for f in frames if "/blockwright/" in f or "/lightning/" in f)
            place = place.rpartition("/site-packages/")[2].rpartition("/blockwright/")[2]
            last = self.trainer.global_step == self.trainer.max_steps
            self.found.add((last or logs_now(self.trainer), place))


class Steps(L.Callback):
    """Last of the callbacks, so that those of the others are looked at."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.reads.trainer = trainer

    def on_validation_start(self, *_: Any) -> None:
        self.reads.trainer = None

    on_train_end = on_validation_start


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    with Reads() as reads:
        for name in COPIES:
            copy = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *given, copy=copy: (reads.note(), copy(*given))[1])
        yield reads


def test_a_step_waits_only_where_it_logs(reads: Reads, corpus_file: Path, tmp_path: Path) -> None:
    text = [word.format(corpus=corpus_file) for word in TEXT]
    own = [*SMALL, *text, "trainer.max_steps=5", "trainer.val_check_interval=null", "trainer.log_every_n_steps=2"]
    own += [
        f"paths.data_dir={tmp_path}/data",
        "task.kernels.experts=grouped",
        f"callbacks=[default,{','.join(CALLBACKS)}]",
    ]
    plain = preflight(compose_config(own, output_dir=str(tmp_path)))
    ours = {k: v for k, v in plain["trainer"].items() if k not in ("_target_", "default_root_dir", "plugins", *OWN)}
    callbacks = [instantiate(node, f"callbacks.{key}") for key, node in plain["callbacks"].items()]
    callbacks.append(Steps(reads))
    trainer = L.Trainer(**{**ours, "logger": CSVLogger(tmp_path)}, default_root_dir=tmp_path, callbacks=callbacks)
    trainer.fit(parts.build("task", plain), parts.build("data", plain))
    always = {place for now_and_then, place in reads.found if not now_and_then}
    assert always == set(AT_EVERY_STEP)
    assert {place for _, place in reads.found} - always == set(NOW_AND_THEN)

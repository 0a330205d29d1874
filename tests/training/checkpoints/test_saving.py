"""Whatever the strategy, a save is whole, in its place on all ranks, and never of weights that are no numbers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from blockwright.blocks.checkpoint import manifest
from blockwright.blocks.checkpoint.read import read_file
from blockwright.registry import ConfigError
from blockwright.training.checkpoints import saving
from blockwright.training.checkpoints.atomic import write_file
from blockwright.training.checkpoints.saving import Keeper, SealedCheckpoints, all_finite, carry, save
from blockwright.training.figure import OF_TEXT, Figure

Fit = Callable[..., L.Trainer]


class Sharding(SingleDeviceStrategy):
    """A strategy that writes a folder of its own making, as those that shard do."""

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        Path(filepath).mkdir()
        torch.save(checkpoint["global_step"], Path(filepath) / "shard.pt")


def test_folder_of_a_strategy_is_sealed_and_takes_its_place_whole(fit: Fit, tmp_path: Path) -> None:
    trainer = fit("trainer.max_steps=1", strategy=Sharding("cpu"))
    for _ in range(2):
        save(trainer, tmp_path / "saved" / "last.ckpt")
    assert sorted(os.listdir(tmp_path / "saved")) == ["last.ckpt", "last.previous.ckpt"]
    assert manifest.check(tmp_path / "saved" / "last.ckpt")


def test_file_is_sealed_and_weights_that_are_no_numbers_are_not_saved_over_good_ones(fit: Fit, tmp_path: Path) -> None:
    callback = Keeper(tmp_path, "best", every_n_train_steps=1)
    trainer = fit("trainer.max_steps=2", callbacks=[callback], enable_checkpointing=True)
    assert save(trainer, tmp_path / "x.ckpt") and manifest.check(tmp_path / "x.ckpt")
    weight = next(trainer.lightning_module.parameters())
    good = read_file(tmp_path / "best.ckpt")["global_step"]
    with torch.no_grad():
        weight.view(-1)[3] = torch.nan
    with pytest.warns(UserWarning, match="not saved: some weights are not finite"):
        assert not save(trainer, tmp_path / "best.ckpt")
        trainer.checkpoint_callback._save_checkpoint(trainer, str(tmp_path / "best.ckpt"))
    assert read_file(tmp_path / "best.ckpt")["global_step"] == good == 2


def test_finiteness_looks_at_every_floating_tensor() -> None:
    good = [torch.ones(3), torch.tensor([1, 2]), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(good) and all_finite([])
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert not all_finite([*good, torch.tensor([0.0, value], dtype=dtype)])


def test_asynchronous_save_holds_the_state_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), saving.write_file
    monkeypatch.setattr(saving, "write_file", lambda *given: (may_write.wait(20), write(*given)))
    io, weight = SealedCheckpoints(asynchronous=True), torch.zeros(3)
    io.save_checkpoint({"weight": weight, "step": 1}, tmp_path / "last.ckpt")
    weight.fill_(7)
    assert not (tmp_path / "last.ckpt").exists()
    may_write.set()
    assert torch.equal(io.load_checkpoint(tmp_path / "last.ckpt")["weight"], torch.zeros(3))  # it waits
    io.teardown()


def test_asynchronous_failure_is_told_at_the_next_save_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    io = SealedCheckpoints(asynchronous=True)
    io.save_checkpoint({}, tmp_path / "file" / "last.ckpt")  # no folder can be there
    with pytest.raises(ConfigError, match="cannot be written"):
        io.save_checkpoint({}, tmp_path / "last.ckpt")
    io.save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    with pytest.raises(ConfigError, match="cannot be written"):
        io.teardown()


def test_plugin_reads_data_only_whatever_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": Hostile()}, tmp_path / "evil.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="cannot be loaded safely"):
        SealedCheckpoints().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    with pytest.raises(ConfigError, match="is a URL"):
        SealedCheckpoints().load_checkpoint("https://host/evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def keeper(folder: Path, **more: Any) -> Keeper:
    return Keeper(folder, "best", monitor="val/loss", every_n_train_steps=None, **more)


def test_task_that_measures_another_figure_keeps_no_best_checkpoint_and_trains_on(tmp_path: Path) -> None:
    """The note before the run said so; Lightning would end it after its second validation."""
    loop: Any = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=SimpleNamespace(_has_run=True)))
    for figures, refused in (((Figure("reward", "", "more"),), False), (OF_TEXT, True)):
        task = SimpleNamespace(figures=figures)
        trainer: Any = SimpleNamespace(lightning_module=task, callbacks=[], fit_loop=loop)
        with pytest.raises(MisconfigurationException) if refused else nullcontext():
            keeper(tmp_path)._save_topk_checkpoint(trainer, {"val/reward": torch.tensor(1.0)})


EACH: dict[str, Any] = {"enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 1}


@pytest.fixture
def stopped(fit: Fit, tmp_path: Path) -> Path:
    """A run of two steps with a validation after each, its state saved as last.ckpt beside its best.ckpt."""
    trainer = fit("trainer.max_steps=2", callbacks=[keeper(tmp_path / "old")], **EACH)
    save(trainer, tmp_path / "old" / "last.ckpt")
    return tmp_path / "old" / "last.ckpt"


def resume(fit: Fit, last: Path, callback: L.Callback) -> L.Trainer:
    worse = ("trainer.max_steps=4", "optimizer.lr=3.0", "scheduler=constant")
    return fit(*worse, callbacks=[callback], ckpt_path=last, **EACH)


@pytest.mark.slow
def test_best_checkpoint_and_its_score_survive_a_resume_in_another_folder(
    fit: Fit, stopped: Path, tmp_path: Path
) -> None:
    best = read_file(stopped.with_name("best.ckpt"))
    callback = keeper(tmp_path / "new")
    resume(fit, stopped, callback)
    assert read_file(tmp_path / "new" / "best.ckpt")["global_step"] == best["global_step"] == 2
    (old,) = best["callbacks"].values()
    assert callback.best_model_score == callback.kth_value == old["best_model_score"]
    assert callback.best_model_path == str(tmp_path / "new" / "best.ckpt")
    assert read_file(stopped.with_name("best.ckpt"))["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["missing", "later"])
def test_best_checkpoint_that_is_not_of_the_past_is_left_out_with_a_warning(
    what: str, fit: Fit, stopped: Path, tmp_path: Path
) -> None:
    best = stopped.with_name("best.ckpt")
    if what == "missing":
        best.unlink()
    else:
        write_file({**read_file(best), "global_step": 3}, best)
    callback = keeper(tmp_path / "new")
    with pytest.warns(UserWarning, match=r"best\.ckpt (cannot be read|is of step 3): the best .* from step 2 on"):
        resume(fit, stopped, callback)
    assert read_file(tmp_path / "new" / "best.ckpt")["global_step"] == 3  # the first after the resume


def test_carried_checkpoint_is_whole_also_where_there_are_no_links(tmp_path: Path, monkeypatch: Any) -> None:
    def refuses(*_: Any) -> None:
        raise OSError("no links here")

    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "folder.ckpt" / "shard").write_text("x")
    write_file({"step": 1}, tmp_path / "file.ckpt")
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", refuses)
        for name in ("folder.ckpt", "file.ckpt"):
            carry(tmp_path / name, tmp_path / str(links) / name)
        assert (tmp_path / str(links) / "folder.ckpt" / "shard").read_text() == "x"
        assert read_file(tmp_path / str(links) / "file.ckpt") == {"step": 1}
        assert sorted(os.listdir(tmp_path / str(links))) == ["file.ckpt", "folder.ckpt"]
    carry(tmp_path / "file.ckpt", tmp_path / "file.ckpt")
    assert read_file(tmp_path / "file.ckpt") == {"step": 1}


@pytest.mark.parametrize("name", ["last", "last.previous"])
def test_best_checkpoint_does_not_have_the_name_of_the_newest(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="take the place of the best"):
        Keeper(dirpath=tmp_path, filename=name)
    Keeper(dirpath=tmp_path, filename="best")

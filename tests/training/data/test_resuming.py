"""A resumed run sees the batches that the uninterrupted run would have seen: with the real Trainer, killed once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pairwise import each

from blockwright.registry.errors import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars
from tests.training.data.recording import Recorder, fit

pytestmark = pytest.mark.xdist_group("resuming")  # its fixture runs a whole program, once


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that is never killed, once for each setting of the trainer."""
    runs: dict[str, Recorder] = {}

    def run(make_module, **trainer) -> Recorder:
        if repr(trainer) not in runs:
            runs[repr(trainer)] = fit(make_module(), tmp_path_factory.mktemp("whole"), **trainer)
        return runs[repr(trainer)]

    return run


def every(n: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=n, save_top_k=-1)


@pytest.mark.parametrize(
    ("step", "trainer"), each([1, 16, 20, 32], [{"max_steps": 40}, {"max_steps": -1, "max_epochs": 3}]), ids=str
)
def test_a_killed_run_resumes_with_the_same_batches(make_module, tmp_path, step, trainer, uninterrupted):
    # An epoch has 16 batches: 16 and 32 are the last batches of theirs.
    whole = uninterrupted(make_module, **trainer)
    killed = fit(make_module(), tmp_path, [every(step, tmp_path)], dies_at=step + 2, **trainer)
    resumed = fit(make_module(), tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **trainer)
    assert len(killed.seen) == step + 2
    assert killed.seen[:step] + resumed.seen == whole.seen
    assert resumed.epochs == whole.epochs[step:]


@pytest.mark.slow
def test_workers_prefetch_over_the_epochs_and_their_number_may_change(make_module, tmp_path, uninterrupted):
    whole = uninterrupted(make_module)
    killed = fit(make_module(num_workers=2), tmp_path, [every(14, tmp_path)], dies_at=19, max_steps=20)
    assert killed.seen == whole.seen[:19]  # an epoch has 16 batches
    for after in (0, 1):
        resumed = fit(make_module(num_workers=after), tmp_path, ckpt_path=tmp_path / "step=14.ckpt", max_steps=20)
        assert resumed.seen == whole.seen[14:20]


@pytest.mark.parametrize(
    "validating",
    [pytest.param({"val_check_interval": 4}, marks=pytest.mark.slow), {"check_val_every_n_epoch": 1}],
    ids=str,
)
def test_a_checkpoint_written_after_validation_resumes_right(make_module, tmp_path, validating, uninterrupted):
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1, **validating}
    whole = uninterrupted(make_module, **settings)
    after_validation = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(make_module(), tmp_path, [after_validation], dies_at=38, **settings)
    checkpoints = {int(path.stem.partition("=")[2]): path for path in tmp_path.glob("step=*.ckpt")}
    for step in (16, 32):
        resumed = fit(make_module(), tmp_path, ckpt_path=checkpoints[step], **settings)
        assert resumed.seen == whole.seen[step:]


def test_a_finished_run_continues_when_it_is_given_more_steps(make_module, tmp_path, uninterrupted):
    whole = uninterrupted(make_module)
    fit(make_module(), tmp_path, [ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=10)], max_steps=20)
    resumed = fit(make_module(), tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=40)
    assert resumed.seen == whole.seen[20:]


def test_a_run_that_is_resumed_twice_still_sees_every_batch_once(make_module, tmp_path, uninterrupted):
    whole = uninterrupted(make_module)
    fit(make_module(), tmp_path, [OnExceptionCheckpoint(tmp_path, "crash")], dies_at=10)
    again = fit(make_module(), tmp_path, [every(25, tmp_path)], tmp_path / "crash.ckpt", dies_at=20)
    last = fit(make_module(), tmp_path, ckpt_path=tmp_path / "step=25.ckpt")
    assert whole.seen[:10] + again.seen[:15] + last.seen == whole.seen


def test_gradient_accumulation_counts_batches_and_not_steps(make_module, tmp_path, uninterrupted):
    settings = {"accumulate_grad_batches": 3, "max_steps": 12}
    whole = uninterrupted(make_module, **settings)
    killed = fit(make_module(), tmp_path, [every(4, tmp_path)], dies_at=14, **settings)
    resumed = fit(make_module(), tmp_path, ckpt_path=tmp_path / "step=4.ckpt", **settings)
    assert killed.seen[:12] + resumed.seen == whole.seen


@pytest.mark.parametrize("limit", [6, 0.4])
def test_short_epochs_of_the_trainer_continue_through_the_text_and_resume_right(
    make_module, tmp_path, limit, uninterrupted
):
    whole = uninterrupted(make_module)
    settings = {"limit_train_batches": limit, "max_steps": -1, "max_epochs": 4}
    killed = fit(make_module(), tmp_path, [every(9, tmp_path)], dies_at=10, **settings)
    resumed = fit(make_module(), tmp_path, ckpt_path=tmp_path / "step=9.ckpt", **settings)
    assert killed.epochs == [0] * 6 + [1] * 4
    assert resumed.epochs == [1] * 3 + [2] * 6 + [3] * 6
    assert killed.seen[:9] + resumed.seen == whole.seen[:24]


def test_reloaded_loaders_change_no_batch_and_overfitting_repeats_them(make_module, tmp_path, uninterrupted):
    assert fit(make_module(), tmp_path, reload_dataloaders_every_n_epochs=1).seen == uninterrupted(make_module).seen
    seen = fit(make_module(), tmp_path, overfit_batches=3, max_steps=9).seen
    assert seen[:3] * 3 == seen


def test_a_new_run_on_a_used_data_module_begins_at_the_beginning(make_module, tmp_path):
    data = make_module()
    first = fit(data, tmp_path, [every(5, tmp_path)], max_steps=7)
    fit(data, tmp_path, ckpt_path=tmp_path / "step=5.ckpt", max_steps=10)
    assert fit(data, tmp_path, max_steps=7).seen == first.seen


def test_resuming_on_other_data_warns_of_the_change_alone(make_module, memory, small_corpus, tmp_path):
    fit(make_module(), tmp_path, [every(5, tmp_path)], max_steps=7)
    other = memory([*small_corpus.texts["train"], "and more"], small_corpus.texts["val"])
    for change in ({}, {"seed": 1}, {"batch_size": 2}, {"sequence_length": 8}, {"corpus": other}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = fit(make_module(**change), tmp_path, ckpt_path=tmp_path / "step=5.ckpt", max_steps=7)
        found = [text for text in map(str, (each.message for each in caught)) if "other data" in text]
        assert len(found) == len(change) and all(name in text for name, text in zip(change, found, strict=True))
        assert len(resumed.seen) == 2 and not [each for each in caught if "not resumable" in str(each.message)]


def test_resuming_with_another_vocabulary_is_refused_and_the_state_is_plain(make_module, tmp_path):
    fit(make_module(tokenizer=Chars(64)), tmp_path, [every(5, tmp_path)], max_steps=7)
    with pytest.raises(ConfigError) as refused:
        fit(make_module(tokenizer=Bytes()), tmp_path, ckpt_path=tmp_path / "step=5.ckpt", max_steps=7)
    assert refused.value.path == "data.tokenizer"
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["TextDataModule"]
    assert state["batches"] == 5
    assert state["seed"] == 0 and state["sequence_length"] == 16 and state["batch_size"] == 4
    assert state["tokenizer"]["characters"] == "\n ,.abcdefgh"

"""Data to copy: what a row holds, what of it is scored, that it depends on the step alone, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockwright.registry.errors import ConfigError
from blockwright.training.data.modules.fresh import CopyingDataModule, CopyRows, Strings
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars
from tests import built


def module(**changes) -> CopyingDataModule:
    usual = {"tokenizer": Chars(66), "sequence_length": 24, "batch_size": 4, "shortest": 5, "longest": 11}
    data = built.data("copying", **{**usual, **changes})
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: CopyingDataModule, n: int) -> list[dict[str, torch.Tensor]]:
    return [batch for batch, _ in zip(data.train_dataloader(), range(n), strict=False)]


def periods(batch: dict[str, torch.Tensor]) -> list[int]:
    """The least n such that each row repeats every n tokens."""
    rows = torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1).tolist()
    return [next(n for n in range(1, len(row)) if row[n:] == row[:-n]) for row in rows]


def test_a_row_is_one_string_again_and_again_and_what_is_scored_was_seen_a_period_before():
    seen = {n for batch in batches(module(), 40) for n in periods(batch)}
    assert seen == set(range(5, 12))
    assert {n for batch in batches(module(shortest=7, longest=7), 5) for n in periods(batch)} == {7}
    for batch in batches(module(), 10):
        for tokens, targets, n in zip(batch["tokens"].tolist(), batch["targets"].tolist(), periods(batch), strict=True):
            scored = [t for t, target in enumerate(targets) if target != -100]
            assert scored == list(range(n, len(tokens)))
            assert all(targets[t] == tokens[t + 1 - n] and tokens[t] == tokens[t - n] for t in scored)


@pytest.mark.slow
def test_symbols_are_drawn_evenly_and_are_ids_of_the_tokenizer():
    strings = Strings(np.arange(2, 10), 64, 32, 32, seed=0)
    counts = np.bincount(np.concatenate([strings.row("train", r)[0][:32] for r in range(2000)]), minlength=10)
    expected = 2000 * 32 / 8
    assert not counts[:2].any() and (abs(counts[2:] - expected) < 5 * expected**0.5).all()
    data = module(symbols=16, tokenizer=Bytes())
    assert set(data.tokenizer.decode(batches(data, 1)[0]["tokens"].flatten())) <= set(map(chr, range(33, 49)))


def test_rows_are_a_function_of_seed_and_step_and_held_out_rows_are_the_same_under_every_seed():
    one, again, other = (batches(module(seed=seed), 3) for seed in (1, 1, 2))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["tokens"], one[1]["tokens"]) and not torch.equal(one[0]["tokens"], other[0]["tokens"])
    held_out = [next(iter(module(seed=seed).val_dataloader()))["tokens"] for seed in (1, 2)]
    assert torch.equal(*held_out)
    assert not torch.equal(held_out[0], next(iter(module().test_dataloader()))["tokens"])


def test_ranks_share_every_batch_and_a_short_last_batch_of_evaluation_is_filled():
    whole = batches(module(), 2)
    order = module().order
    assert [rows.tolist() for _, rows in order.batches(0, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    empty = CopyRows(Strings(np.arange(8), 24, 5, 11, 0), "train").__getitems__([2, -1])
    assert (empty["targets"][1] == -100).all() and not empty["n_bytes"][1]
    assert whole[0]["n_bytes"].tolist() == (whole[0]["targets"] != -100).sum(1).tolist()
    data = module()  # and a resumed run gets the batches that follow
    straight = batches(data, 5)
    resumed = module()
    resumed.load_state_dict({**data.state_dict(), "batches": 3})
    assert torch.equal(batches(resumed, 1)[0]["tokens"], straight[3]["tokens"])


def test_what_cannot_be_copied_is_refused():
    settings = [{"shortest": 9, "longest": 8}, {"longest": 24}, {"symbols": 1}, {"symbols": 95}, {"shortest": 0}]
    paths = ["data.longest", "data.longest", "data.symbols", "data.symbols", "data.shortest"]
    for changes, path in zip([*settings, {"tokenizer": Chars(20)}], [*paths, "data.tokenizer.vocab_size"], strict=True):
        with pytest.raises(ConfigError) as refused:
            module(**changes)
        assert refused.value.path == path


@pytest.mark.slow
def test_a_model_of_two_layers_learns_to_copy_and_one_without_positions_does_not(train_py, tmp_path):
    accuracies = []
    for name, more in {"rope": [], "none": ["model/position=none"]}.items():
        words = ["experiment=copying", "trainer.max_steps=100", "callbacks.report.sample_tokens=0", "logger=none"]
        done = train_py(*words, f"hydra.run.dir={tmp_path / name}", *more)
        assert done.returncode == 0, done.stderr
        from blockwright.training.result import Result

        result = Result.read(tmp_path / name)
        accuracies.append(result.value("val/accuracy"))
        assert result.figures["val/accuracy"].better == "more"
        assert result.value("test/accuracy") is not None
    assert accuracies[0] > 0.9 and accuracies[1] < 0.2

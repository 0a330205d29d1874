"""The data module of a mixture: the same batches after any resume and for every number of processes; its refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from blockwright.registry.errors import ConfigError
from blockwright.training.data.mixture.module import MixtureDataModule
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars
from tests import built
from tests.training.data.conftest import Memory, some_text
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents
from tests.training.data.recording import fit

T, B, STEPS = 16, 4, 30
TWO = [{"shares": {"code": 0.3, "web": 0.7}, "batches": 12}, {"shares": {"code": 0.5, "plays": 0.25, "web": 0.25}}]
LETTERS = {"web": b"abcdefgh .\n", "code": b"0123456789 =", "plays": b"ABCDEFGH .\n"}  # which tell the source of a row


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Nodes of three sources: shards that hold out tokens, one with a file to validate on, and a corpus."""
    for i in range(3):
        formats.raw(tmp_path / f"web_{i}.bin", documents(60, i, LETTERS["web"]))
    formats.npy(tmp_path / "code.npy", documents(80, 5, LETTERS["code"]))
    formats.npy(tmp_path / "code_val.npy", documents(8, 6, LETTERS["code"]))
    capitals = [some_text(150, i).upper() for i in range(7)]
    return {
        "web": {"files": str(tmp_path / "web_*.bin"), "dtype": "uint16", "val_tokens": 300},
        "code": {"files": str(tmp_path / "code.npy"), "val": str(tmp_path / "code_val.npy")},
        "plays": {"corpus": Memory(capitals, [some_text(80, 9).upper()])},
    }


@pytest.fixture
def make(tmp_path: Path, sources: dict[str, Any]):
    def build(**changes: Any) -> MixtureDataModule:
        usual = {"sources": sources, "stages": TWO, "sequence_length": T, "batch_size": B, "most_epochs": None}
        settings = {"tokenizer": Bytes(), "cache_dir": str(tmp_path / "cache"), **usual, **changes}
        corpora = {n: node for n, node in settings["sources"].items() if "corpus" in node}
        from blockwright.training.data.mixture.sources import CorpusSource

        ready = {name: CorpusSource(**node) for name, node in corpora.items()}
        return built.data("mixture", **{**settings, "sources": {**settings["sources"], **ready}})

    return build


def ready(data: MixtureDataModule, n: int = STEPS) -> MixtureDataModule:
    data.prepare_data()
    data.setup()
    data.check_run(n)
    return data


def batches(data: MixtureDataModule, n: int = STEPS) -> list[dict[str, torch.Tensor]]:
    return list(ready(data, n).train_dataloader())


@pytest.mark.parametrize(("dies_at", "accumulated"), [(12, 1), (17, 3)])
def test_a_killed_run_resumes_with_the_batches_it_would_have_had(make, tmp_path, dies_at, accumulated):
    how = {"accumulate_grad_batches": accumulated, "max_steps": STEPS // accumulated}
    saver = ModelCheckpoint(tmp_path / "killed", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit(make(), tmp_path, **how).seen
    first = fit(make(), tmp_path, [saver], dies_at=dies_at, **how).seen
    saved = dies_at // accumulated
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resuming on other data")
        rest = fit(make(), tmp_path, ckpt_path=tmp_path / "killed" / f"step={saved}.ckpt", **how).seen
    assert len(whole) == STEPS and first == whole[:dies_at] and rest == whole[saved * accumulated :]


def test_ranks_together_read_the_batches_of_one(make, monkeypatch):
    whole = batches(make())
    parts = []
    for rank in range(2):
        data = make()
        monkeypatch.setattr(data, "_share", lambda rank=rank: (rank, 2))
        parts.append(batches(data))
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one["tokens"], torch.cat([first["tokens"], second["tokens"]]))


@pytest.mark.slow
def test_loader_processes_read_the_same_batches(make):
    here, there = batches(make()), batches(make(num_workers=2))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(here, there, strict=True))


def test_rows_are_of_the_shares(make):
    def of(batch: dict[str, torch.Tensor], name: str) -> int:
        kinds = [set(row.tolist()) - {256, ord(" "), ord("."), ord("\n")} for row in batch["tokens"]]
        return sum(bool(kind & set(LETTERS[name])) for kind in kinds)

    served = batches(make())
    for name, first, second in (("web", 0.7, 0.25), ("code", 0.3, 0.5), ("plays", 0, 0.25)):
        assert abs(sum(of(batch, name) for batch in served[:12]) - first * 12 * B) <= 1.5
        assert abs(sum(of(batch, name) for batch in served[12:]) - second * 18 * B) <= 1.5


def test_targets_are_the_next_tokens_within_a_document(make):
    for batch in batches(make(), 13):
        inner = batch["tokens"][:, 1:]
        scored = batch["targets"][:, :-1] >= 0
        assert (batch["targets"][:, :-1][scored] == inner[scored]).all()
        ended = batch["tokens"] == 256
        assert (batch["targets"][ended] == -100).all()  # what follows begins another document
        assert (batch["n_bytes"] == ((batch["targets"] >= 0) & (batch["targets"] != 256)).sum(1)).all()
    batch = batches(make(documents="joined"), 13)[0]
    assert "segments" not in batch and (batch["targets"] >= 0).all()


def test_each_source_is_validated_by_itself(make, tmp_path):
    data = make()
    data.prepare_data()
    data.setup()
    assert [*data.val_weights] == ["code", "plays", "web"] and data.test_dataloader() == []
    assert sum(data.val_weights.values()) == pytest.approx(1)
    for name, loader in zip(data.val_weights, data.val_dataloader(), strict=True):
        seen = torch.cat([batch["tokens"].flatten() for batch in loader])
        assert set(seen.tolist()) <= {*LETTERS[name], *b" .,\n", 256}
    code = np.load(tmp_path / "code_val.npy")
    assert next(iter(data.val_dataloader()[0]))["tokens"][0].tolist() == code[:T].tolist()
    by_name = make(val_shares={"web": 0.25, "code": 0.75})
    by_name.prepare_data()
    by_name.setup()
    assert by_name.val_weights == {"code": 0.75, "plays": 0, "web": 0.25}
    # held-out tokens are the last documents, and not trained on
    opened = data._opened["web"]
    ids = np.concatenate([np.fromfile(tmp_path / f"web_{i}.bin", np.uint16) for i in range(3)])
    assert opened.train.n_tokens + opened.val.n_tokens == len(ids)
    assert 240 < opened.val.n_tokens <= 300 and ids[opened.train.n_tokens - 1] == 256


def test_tokens_and_epochs_of_each_source_are_known_at_any_batch(make):
    data = make()
    ready(data)
    figures = data.figures_at(12)
    assert figures["data/web/tokens"] + figures["data/code/tokens"] == 12 * B * T
    assert figures["data/plays/tokens"] == 0 and figures["data/stage"] == 1
    assert data.figures_at(13)["data/stage"] == 2 and data.figures_at(0)["data/web/tokens"] == 0
    windows = data._opened["code"].train.n_tokens // T
    assert data.figures_at(30)["data/code/epochs"] == pytest.approx(
        data.figures_at(30)["data/code/tokens"] / T / windows
    )


def test_shares_follow_the_sizes_without_stages(make):
    data = make(stages=None)
    ready(data)
    epochs = {name: value for name, value in data.figures_at(30).items() if name.endswith("epochs")}
    assert max(epochs.values()) - min(epochs.values()) < 0.1


def test_a_run_that_stands_for_a_longer_one_repeats_as_that_does(make):
    short = make(stages=[{**TWO[0], "batches": 3}, TWO[1]], stands_for=120 * B * T)
    ready(short, 30)
    scaled = make(stages=[{**TWO[0], "batches": 12}, TWO[1]])
    ready(scaled, 120)
    for name in ("web", "code"):
        assert short.figures_at(30)[f"data/{name}/epochs"] == pytest.approx(
            scaled.figures_at(120)[f"data/{name}/epochs"], rel=0.15
        )


def test_another_stage_to_come_is_the_same_run_and_another_past_is_warned_of(make, monkeypatch):
    state = make_state(make, monkeypatch, 10)
    later = make(stages=[TWO[0], {"shares": {"web": 0.9, "code": 0.05, "plays": 0.05}}])
    ready(later)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later.load_state_dict(state)
    past = make(stages=[{**TWO[0], "shares": {"web": 0.6, "code": 0.4}}, TWO[1]])
    ready(past)
    with pytest.warns(UserWarning, match="shares"):
        past.load_state_dict(state)


def make_state(make, monkeypatch, at: int, **changes) -> dict[str, Any]:
    data = make(**changes)
    ready(data)
    monkeypatch.setattr(data, "_consumed", lambda: at)
    return data.state_dict()


def refused_at(data: MixtureDataModule, state: dict[str, Any]) -> str:
    ready(data)
    with pytest.raises(ConfigError) as refused:
        data.load_state_dict(state)
    return refused.value.path


@pytest.mark.filterwarnings("ignore:Resuming on other data")
def test_a_source_that_was_read_may_not_change_and_one_that_was_not_may(make, monkeypatch, sources, tmp_path):
    state = make_state(make, monkeypatch, 10)
    without = {name: node for name, node in sources.items() if name != "code"}
    left_out = make(sources=without, stages=[{"shares": {"web": 0.5, "plays": 0.5}}])
    assert refused_at(left_out, state) == "data.sources.code"
    other = make(sources={**sources, "plays": {"corpus": Memory([some_text(300).upper()])}})
    ready(other)
    other.load_state_dict(state)
    formats.raw(tmp_path / "web_3.bin", documents(60, 3, LETTERS["web"]))
    assert refused_at(make(), state) == "data.sources.web"


def test_other_contents_are_seen_where_all_are_read(make, monkeypatch, tmp_path):
    state = make_state(make, monkeypatch, 10, digests="contents")
    ids = np.load(tmp_path / "code.npy")
    ids[3], ids[4] = ids[4], ids[3]
    np.save(tmp_path / "code.npy", ids)
    by_size = make()
    ready(by_size)
    by_size.load_state_dict(state)
    assert refused_at(make(digests="contents"), state) == "data.sources.code"


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no such file": ("data.sources.web.files", {"web": {"files": "/nowhere/*.bin"}}),
    "no file": ("data.sources.web.files", {"web": {"files": []}}),
    "another dtype": ("data.sources.web.dtype", {"web": {"dtype": "uint8"}}),
    "other documents": ("data.sources.web.documents", {"web": {"documents": "lines"}}),
    "all held out": ("data.sources.web.val_tokens", {"web": {"val_tokens": 10**9}}),
    "two validations": ("data.sources.code.val_tokens", {"code": {"val_tokens": 9}}),
    "validation among training": ("data.sources.code.val", {"code": {"val": "{tmp}/code.npy"}}),
    "a file twice": ("data.sources.web.files", {"web": {"files": ["{tmp}/web_0.bin", "{tmp}/code.npy"]}}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_before_a_run(make, sources, tmp_path, name):
    path, changes = BAD[name]
    filled = json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path)))
    nodes = {source: {**node, **filled.get(source, {})} for source, node in sources.items()}
    with pytest.raises(ConfigError) as refused:
        make(sources=nodes).check()
    assert refused.value.path == path and refused.value.remedy
    assert not (tmp_path / "cache").exists()


ONE = {"shares": {"web": 0.5, "code": 0.25, "plays": 0.25}}
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "shares above 1": ("data.stages.0.shares", {"stages": [{"shares": {"web": 0.8, "code": 0.3, "plays": 0.1}}]}),
    "a share below 0": ("data.stages.0.shares.web", {"stages": [{"shares": {"web": -1, "code": 1, "plays": 1}}]}),
    "an unknown source": ("data.stages.0.shares.wed", {"stages": [{"shares": {"wed": 1}}]}),
    "a source in no stage": ("data.sources.plays", {"stages": [{"shares": {"web": 0.5, "code": 0.5}}]}),
    "an unknown key": ("data.stages.0.steps", {"stages": [{**ONE, "steps": 3}]}),
    "no shares": ("data.stages.0.shares", {"stages": [{"batches": 3}]}),
    "no stage": ("data.stages", {"stages": []}),
    "no end": ("data.stages.0.batches", {"stages": [ONE, ONE]}),
    "an end of the last": ("data.stages.0.batches", {"stages": [{**ONE, "batches": 3}]}),
    "half a batch": ("data.stages.0.batches", {"stages": [{**ONE, "batches": 1.5}, ONE]}),
    "epochs of an unknown source": ("data.most_epochs.wed", {"most_epochs": {"wed": 3}}),
    "epochs that are none": ("data.most_epochs.web", {"most_epochs": {"web": "many"}}),
    "an unknown measured source": ("data.val_shares.wed", {"val_shares": {"wed": 1}}),
    "measured by size": ("data.val_shares", {"val_shares": "sizes"}),
    "no source": ("data.sources", {"sources": {}, "stages": None}),
    "a name with a slash": ("data.sources", {"sources": {"a/b": {"files": "a.bin"}}, "stages": None}),
    "a tokenizer to be fitted": ("data.tokenizer", {"tokenizer": Chars(64)}),
    "an unknown digest": ("data.digests", {"digests": "none"}),
}


def test_a_wrong_setting_is_refused_before_anything_is_read(make):
    for name, (path, changes) in WRONG.items():
        with pytest.raises(ConfigError) as refused:
            make(**changes)
        assert refused.value.path == path and refused.value.remedy, name


@pytest.mark.parametrize(
    ("changes", "steps", "path"),
    [
        ({}, None, "trainer.max_steps"),
        ({}, 12, "data.stages.1"),
        ({"most_epochs": 4}, 2000, "data.most_epochs"),
        ({"most_epochs": {"code": 0.1, "web": 100, "plays": 100}}, STEPS, "data.most_epochs"),
        ({"stands_for": 10}, STEPS, "data.stands_for"),
        ({"val_shares": {"web": 1}, "sources": "code alone", "stages": None}, STEPS, "data.val_shares.web"),
        ({"sequence_length": 2000}, STEPS, "data.sequence_length"),
        ({"batch_size": 2**20}, 10**6, "trainer.max_steps"),
    ],
)
def test_a_run_that_the_sources_do_not_allow_is_refused(make, tmp_path, changes, steps, path):
    if "sources" in changes:
        changes = {**changes, "sources": {"web": {"files": str(tmp_path / "code.npy")}}}
    with pytest.raises(ConfigError) as refused:
        ready(make(**changes), steps)
    assert refused.value.path == path and refused.value.remedy


def test_the_wrong_tokenizer_and_ids_beyond_the_vocabulary_are_refused_before_a_run(make, sources, tmp_path):
    ids = np.load(tmp_path / "code.npy")
    np.save(tmp_path / "far.npy", np.where(ids == 256, 256, ids + 40_000))
    formats.npy(tmp_path / "other.npy", documents(80, 5, bytes(range(128, 256))))
    for name in ("far", "other"):
        with pytest.raises(ConfigError) as refused:
            make(sources={**sources, "code": {"files": f"{tmp_path}/{name}.npy"}}).check()
        assert refused.value.path == "data.sources.code.files"


def test_a_gap_in_numbered_shards_is_warned_of(make, sources, tmp_path):
    (tmp_path / "web_1.bin").rename(tmp_path / "web_3.bin")
    with pytest.warns(UserWarning, match="1 is missing"):
        make().check()

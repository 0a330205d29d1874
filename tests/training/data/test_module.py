"""The data module: what a batch holds, what evaluation counts, how processes share, and each mistake by its path."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf
from pairwise import each

from blockwright.registry.errors import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.data.modules.text import TextDataModule
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars
from tests.training.parallel.quiet import quiet_trainer

EOS = 256


@pytest.fixture
def ready(make_module):
    """A data module after setup, as in a process of its own."""

    def make(**changes) -> TextDataModule:
        data = make_module(**changes)
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def as_rank(data: TextDataModule, rank: int, world_size: int, uses_lightnings_sampler: bool = False) -> TextDataModule:
    """The data module as one of several data-parallel processes sees it."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        overfit_batches=0,
        limit_train_batches=1.0,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=uses_lightnings_sampler),
    )
    return data


def test_a_batch_holds_windows_of_the_stream(ready):
    batch = next(iter(ready().train_dataloader()))
    assert set(batch) >= {"tokens", "targets", "n_bytes"}
    for name in ("tokens", "targets"):
        assert batch[name].shape == (4, 16) and batch[name].dtype == torch.int64
    counted = batch["targets"] != -100
    assert (batch["tokens"][:, 1:][counted[:, :-1]] == batch["targets"][:, :-1][counted[:, :-1]]).all()
    for batch in ready().train_dataloader():
        has_two = (batch["tokens"][:, :-1] == EOS).any()
        assert ("segments" in batch) == ("positions" in batch) == has_two


def test_an_epoch_covers_the_train_split_and_every_epoch_is_as_long(ready):
    loader = ready().train_dataloader()
    epochs = [list(loader), list(loader)]
    assert [len(batches) for batches in epochs] == [len(loader)] * 2 == [16, 16]
    assert not torch.equal(epochs[0][0]["tokens"], epochs[1][0]["tokens"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_train_on_the_batches_of_one(ready, world_size):
    ranks = [as_rank(ready(), rank, world_size).train_dataloader() for rank in range(world_size)]
    for whole, *shares in zip(ready().train_dataloader(), *ranks, strict=True):
        assert torch.equal(whole["tokens"], torch.cat([part["tokens"] for part in shares]))
        assert torch.equal(whole["targets"], torch.cat([part["targets"] for part in shares]))


def test_evaluation_counts_each_token_of_the_split_once(ready, small_corpus):
    batches = list(ready().val_dataloader())
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    texts = list(small_corpus.documents("val"))
    assert targets[targets != -100].tolist() == [t for text in texts for t in [*text.encode()[1:], EOS]]
    assert sum(batch["n_bytes"].sum() for batch in batches) == sum(len(text) - 1 for text in texts)
    last = batches[-1]
    assert last["tokens"].shape[1] == 16 and last["tokens"][-1, -1] == EOS and last["targets"][-1, -1] == -100
    assert last["segments"][-1, -1] == -1 != last["segments"][-1, 0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_evaluate_the_split_once_in_equally_many_batches(ready, world_size):
    def counted(data: TextDataModule) -> tuple[int, list[int]]:
        batches = list(data.val_dataloader())
        return len(batches), sorted(t for b in batches for t in b["targets"][b["targets"] != -100].tolist())

    n_batches, alone = counted(ready(eval_batch_size=6))
    ranks = [counted(as_rank(ready(eval_batch_size=6), rank, world_size)) for rank in range(world_size)]
    assert [n for n, _ in ranks] == [n_batches] * world_size
    assert sorted(t for _, targets in ranks for t in targets) == alone
    assert sum(len(batch["tokens"]) for batch in ready(eval_windows=5).val_dataloader()) == 5
    assert sum(len(batch["tokens"]) for batch in ready(eval_windows=1000).val_dataloader()) == 11


def test_the_tokenizer_is_fitted_by_the_first_rank_and_read_by_the_rest(make_module, memory):
    for tokenizer in (lambda: Chars(64), lambda: BPE(300)):
        first, second = make_module(tokenizer=tokenizer()), make_module(tokenizer=tokenizer())
        first.prepare_data()
        assert first.tokenizer.fitted and not second.tokenizer.fitted
        second.setup("fit")
        assert second.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    tokenizer = Chars(64)  # one that is fitted is kept
    tokenizer.fit(["abcdefgh ,.\nxyz"])
    data = make_module(tokenizer=tokenizer)
    data.prepare_data()
    data.setup()
    assert "xyz" in data.tokenizer.characters


def test_the_state_needs_no_trainer(ready):
    data = ready()
    state = data.state_dict()
    assert state["batches"] == 0 and state["tokenizer"] == {"kind": "bytes", "vocab_size": 257}
    data.load_state_dict({**state, "batches": 17})
    assert data.state_dict()["batches"] == 17
    expected = data.order.epoch(1)[1:].tolist()
    assert list(data.train_dataloader().batch_sampler) == expected


class Counter(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.counts = {"fit": 0, "val": 0, "test": 0}

    def training_step(self, batch, batch_idx):
        self.counts["fit"] += 1
        return self.number * 1.0

    def validation_step(self, batch, batch_idx):
        self.counts["val"] += int((batch["targets"] != -100).sum())

    def test_step(self, batch, batch_idx):
        self.counts["test"] += int((batch["targets"] != -100).sum())

    def predict_step(self, batch, batch_idx):
        return batch["tokens"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer() -> L.Trainer:
    return quiet_trainer(max_epochs=1, num_sanity_val_steps=0)


def test_fit_validate_test_and_predict_run_and_warn_of_nothing(make_module, memory, small_corpus):
    model = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*`srun` command is available.*")  # on a machine of Slurm
        trainer().fit(model, make_module())
        trainer().validate(model, make_module(), verbose=False)
        trainer().test(model, make_module(), verbose=False)
        predictions = trainer().predict(model, make_module())
    assert model.counts == {"fit": 16, "val": 320, "test": 80}
    assert sum(len(tokens) for tokens in predictions) == 5
    model = Counter()  # and without held-out text
    trainer().fit(model, make_module(corpus=memory(list(small_corpus.documents("train")))))
    assert model.counts == {"fit": 16, "val": 0, "test": 0}


def refused_at(data: TextDataModule, stage: str = "fit") -> str:
    with pytest.raises(ConfigError) as refused:
        data.setup(stage)
    return refused.value.path


def test_a_batch_that_the_processes_cannot_share_and_lightnings_own_sampler_are_refused(ready):
    data = as_rank(ready(), 0, 3)
    assert refused_at(data) == "data.batch_size"
    data.batch_size = 6
    assert refused_at(data) == "data.eval_batch_size"
    data.batch_size, data.eval_batch_size = 4, 3
    data.setup("test")  # an evaluation asks nothing of the training batch
    assert refused_at(as_rank(ready(), 0, 2, uses_lightnings_sampler=True)) == "trainer.use_distributed_sampler"


def test_a_split_shorter_than_a_sequence_or_a_batch_is_refused(make_module, memory):
    for split in ("train", "val", "test"):
        texts = {"train": ["x" * 90], "val": ["x" * 90], "test": ["x" * 90], split: ["x" * 15]}
        make_module(corpus=memory(**texts), sequence_length=15, batch_size=1).setup()
        assert refused_at(make_module(corpus=memory(**texts), batch_size=1), None) == "data.sequence_length"
    make_module(batch_size=66).setup("fit")
    assert refused_at(make_module(batch_size=67)) == "data.batch_size"


@pytest.mark.slow
def test_the_cli_takes_corpus_and_tokenizer_by_class_path(tmp_path):
    (tmp_path / "a.txt").write_text("line of text\n" * 200)
    arguments = ["fit", "--data.batching.corpus=blockwright.training.data.corpus.TextFiles"]
    arguments += [f"--data.batching.corpus.files={tmp_path}/a.txt", f"--data.batching.cache_dir={tmp_path}/cache"]
    arguments += ["--data.batching.tokenizer=blockwright.training.data.tokenizers.tokenizer.Bytes"]
    arguments += ["--data.batching.sequence_length=16", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.{off}=false" for off in ("logger", "enable_checkpointing", "enable_progress_bar")]
    cli = LightningCLI(Counter, TextDataModule, args=arguments, save_config_callback=None)
    assert cli.datamodule.corpus.files == [f"{tmp_path}/a.txt"]
    assert cli.model.counts["fit"] == 2


def test_bits_a_byte_compare_across_tokenizers(ready, small_corpus):
    # The same text has the same bytes, whatever the tokens, but for the first token of each document.
    n_bytes = {}
    for tokenizer in (Bytes(), Chars(64)):
        data = ready(tokenizer=tokenizer)
        n_bytes[tokenizer.kind] = int(sum(batch["n_bytes"].sum() for batch in data.val_dataloader()))
    assert n_bytes["bytes"] == n_bytes["chars"] == 158


CONF = Path(__file__).parents[3] / "conf"
CHARS = {"_target_": "blockwright.training.data.tokenizers.tokenizer.Chars", "vocab_size": 5}
NUMBERS: list[tuple[str, Any]] = [
    *(("sequence_length", value) for value in (1, None, 2.5, "256")),
    *(("batch_size", 0), ("batch_size", True), ("eval_batch_size", 0), ("eval_windows", 0)),
    *(("num_workers", -1), ("seed", -1)),
]
# Path of the value → the value
OTHERS: list[tuple[str, Any]] = [
    ("batchsize", 4),
    ("corpus.separater", "x"),
    ("corpus.files", "???"),
    ("corpus.files", "TMP/b.txt"),
    ("corpus.val_fraction", 1.5),
    ("tokenizer.vocab_size", 256),
    ("name", "txet"),
    *each(
        ["corpus", "tokenizer"],
        [None, "x", {}, {"_target_": "blockwright.training.data.nowhere.Corpus"}, {"_target_": "pathlib.Path"}],
    ),
]


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("a line of text\n" * 200)
    return {
        "name": "text",
        "corpus": {"_target_": "blockwright.training.data.corpus.TextFiles", "files": f"{tmp_path}/a.txt"},
        "tokenizer": {"_target_": "blockwright.training.data.tokenizers.tokenizer.Bytes", "vocab_size": 257},
        "sequence_length": 32,
        "batch_size": 4,
        "eval_batch_size": None,
        "eval_windows": None,
        "num_workers": 0,
        "seed": 0,
        "cache_dir": f"{tmp_path}/cache",
    }


def check(node: dict[str, Any]) -> None:
    parts.build("data", {"data": node}).check()


def mistaken_at(node: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(node)
    assert caught.value.remedy
    return caught.value.path


@pytest.mark.parametrize(("path", "value"), [*NUMBERS, *OTHERS])
def test_a_mistake_is_refused_by_its_path(node: dict[str, Any], tmp_path: Path, path: str, value: Any) -> None:
    wrong = copy.deepcopy(node)
    *around, last = path.split(".")
    (wrong[around[0]] if around else wrong)[last] = (
        value.replace("TMP", str(tmp_path)) if value == "TMP/b.txt" else value
    )
    assert mistaken_at(wrong) in (f"data.{path}", f"data.{path}._target_")


def test_a_missing_value_a_small_vocabulary_and_a_class_in_place_of_a_name_are_refused(node: dict[str, Any]) -> None:
    assert mistaken_at({**node, "tokenizer": CHARS}) == "data.tokenizer.vocab_size"
    del node["corpus"]["files"]
    assert mistaken_at(node) == "data.corpus.files"
    assert mistaken_at({"_target_": "their.DataModule", "rows": 3}) == "data._target_"


def composed(*overrides: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(overrides=["+seed=3", "+paths.data_dir=/data", *overrides])
    return OmegaConf.to_container(config.data, resolve=True)


def test_text_asks_for_its_files(tmp_path: Path) -> None:
    assert mistaken_at(composed("+data=text")) == "data.corpus.files"
    (tmp_path / "a.txt").write_text("a line of text\n" * 2000)
    check(composed("+data=text", f"data.corpus.files={tmp_path}/a.txt", "data.corpus.val_fraction=0.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]  # checking leaves nothing on disk

"""Mistakes of users: one message with path, value, rule and remedy, exit code 64, at once, and no traceback.

Rules have their tests where they are; here is what the command line makes of each kind of mistake.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Outcome, run_all
from warm import Warm

pytestmark = pytest.mark.xdist_group("programs")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parent.parent

# Overrides, between which is " & " → path of the value at fault, and a pattern that rule and remedy together match.
# {tmp} is a folder with the files of ``_files``, {conf} one more folder of configurations.
# In the model, the optimizer or the trainer, or of Hydra's grammar: Lightning is not even imported.
EARLY = {
    "task=grpo & data=prompts & task/reward=regex_format": ("task.reward.pattern", "value is required"),
    "optimizer.lr=last": ("optimizer.lr", "names no run"),
    "init_from={tmp}": ("init_from", "nor checkpoints/last.ckpt"),
    "-m & seed=0,1 & task_name=5": ("task_name", "must be a string"),
    # keys
    "model.attention.n_haeds=4": ("model.attention.n_haeds", "'n_heads'"),
    "+nothing=1": ("nothing", "no such setting"),
    "+model.attention.widow=3": ("model.attention.widow", "no parameter 'widow'"),
    "++model.attention.widow=3": ("model.attention.widow", "no parameter 'widow'"),
    "+model.ffn.shared.widow=3": ("model.ffn.shared.widow", "no parameter 'widow'"),
    "+optimizer.widow=3": ("optimizer.widow", "no argument 'widow'"),
    "{conf} & model/attention=misspelt": ("model.attention.n_haeds", "misspelt.yaml"),
    "{conf} & experiment=misspelt": ("model.d_modle", "Did you mean 'd_model'"),
    "+model.variants.ffn.odd={name: swiglu, widow: 1}": ("model.variants.ffn.odd.widow", "no parameter"),
    "model/attention=mha & model.attention.kv_lora_rank=4": ("model.attention.kv_lora_rank", "MHA"),
    "model/attention=mqa & model.attention.n_kv_heads=2": ("model.attention.n_kv_heads", "fixes n_kv_heads to 1.*gqa"),
    "+model/qk_norm=per_head": ("model.qk_norm", r"model\.qk_norm=null.*gqa\|"),
    "trainer.max_stepz=4": ("trainer.max_stepz", "Did you mean 'max_steps'"),
    "trainer.limit_val_batches=3": ("trainer.limit_val_batches", r"\+trainer\.limit_val_batches=3"),
    "callbacks.report.sample_tokenz=4": ("callbacks.report.sample_tokenz", "Did you mean 'sample_tokens'"),
    "{conf} & experiment=broken": ("…/broken.yaml:3", "is not YAML"),
    # names
    "model/atention=mla": ("model/atention", "Did you mean 'model/attention'"),
    "++model.attention.name=mla2": ("model.attention.name", "Did you mean 'mla'"),
    "~logger": ("logger", "every run has this setting"),
    "~model.attention": ("model.attention", r"\+model/attention=<[^>]*\|gated_delta\|"),
    # presets
    "{conf} & model=misspelt": ("model.d_modle", "Did you mean 'd_model'"),
    "{conf} & model=listed": ("model", r"must be a mapping .*listed\.yaml"),
    "{conf} & model=foreign": ("model.attention._target_", r"dotted path .*foreign\.yaml"),
    "{conf} & model=broken": ("model", r"line 2: .*broken\.yaml.*Fix"),
    "model.format=3": ("model.format", "unknown to this version.*its own: 2"),
    "+model.attention._target_=os.system": ("model.attention._target_", "never a class by its dotted path"),
    # values
    "model.d_model=${nope}": ("model.d_model", "'nope' not found"),
    "model.n_layers=2.5": ("model.n_layers", "must be an integer"),
    "model.d_model=???": ("model.d_model", "is required"),
    "model/experts=swiglu": ("model.experts.d_ff", "hidden width"),
    "model.gating.top_k=99": ("model.gating.top_k", "more experts"),
    "model.layout.ffn='dense*2 ffn'": ("model.layout.ffn", "but this one names 3"),
    "model.ffn.experts=null": ("model.ffn.experts", "requires a block of kind"),
    "model.ffn=null": ("model.layout.ffn", "the model has none.*model/ffn=NAME"),
    "task.frozen=[gatign]": ("task.frozen", "matches no.*Did you mean 'gating'"),
    "task.frozen=embedding": ("task.frozen", r"a list.*task\.frozen=\[embedding\]"),
    "+adapter={name: init_from}": ("adapter.name", "a setting of its own"),
    "callbacks.report=3": ("callbacks.report", "must be a mapping"),
    "model.mtp=false": ("model.mtp", "must be a mapping"),
    "optimizer.multipliers={attention: -1}": ("optimizer.multipliers.attention", "above 0.*task.frozen"),
    "task.frozen=[attention] & optimizer.multipliers={attention: 0.1}": ("optimizer.multipliers", "no trained param"),
    "optimizer=muon & optimizer.adamw_names=[heads]": ("optimizer.adamw_names", "trained.*Did you mean 'head'"),
    "optimizer.multipliers=[1]": ("optimizer.multipliers", "must be a mapping"),
    "model/attention=sliding_window & +model/selector=dsa": ("model.selector", "takes this selector.*attention .*gqa"),
    "model.norm.eps=null": ("model.norm.eps", "must have a value.*Leave out model.norm.eps=null"),
    "scheduler.warmup=7": ("scheduler.warmup", "Write at most 6"),
    "task.activation_checkpointing=some": ("task.activation_checkpointing", "none, selective, full"),
    "data.corpus.files=???": ("data.corpus.files", "a value is required"),
    "logger=wandb": ("logger.wandb", r"pip install 'blockwright\[wandb\]'"),
    # many processes
    "trainer=fsdp": ("trainer.accelerator", r"no GPU.*trainer=\[fsdp,sim\]"),
    "trainer=[ddp_sim,sim] & ~trainer._target_": ("trainer", r"'trainer=\[fsdp,sim\]'"),
    "trainer.strategy=fsdp": ("trainer.strategy", "older FSDP.*trainer=fsdp"),
    "trainer=deepspeed": ("trainer.strategy", r"blockwright\[deepspeed\]"),
    "trainer=[fsdp,sim] & trainer.strategy.shard=3": ("trainer.strategy.shard", "do not fill the world of 2"),
    "trainer=[hsdp,sim] & trainer.devices=3": ("trainer.strategy.replicate", "do not divide the world of 3"),
    "trainer=[fsdp,sim] & trainer.strategy.tensor=0": ("trainer.strategy.tensor", "positive number"),
    "trainer=[fsdp_tp,sim] & model/attention=mha & model.attention.n_heads=1 & trainer.devices=2": (
        *("model.attention.n_heads", r"trainer\.strategy\.tensor = 2.*tensor be one of 1"),
    ),
    "trainer=[fsdp_tp,sim] & model/attention=gqa & model.attention.n_kv_heads=1": (
        *("model.attention.n_kv_heads", "divisible"),
    ),
    "trainer=[fsdp_ep,sim] & model.ffn.n_experts=5": ("model.ffn.n_experts", "expert × tensor be one of 1, 5"),
    "trainer=[fsdp,sim] & trainer.strategy.expert=4": ("trainer.strategy.expert", "Choose one of 1, 2"),
    "trainer=[fsdp_ep,sim] & model/ffn=swiglu": ("trainer.strategy.expert", "no layer of this model has any"),
    "trainer=[fsdp_ep,sim] & model.ffn.n_experts=6 & model/gating=group_limited & model.gating.n_groups=3": (
        *("model.gating.n_groups", "Use a multiple of 2"),
    ),
    "trainer=[fsdp_ep,sim] & +model/dropping=device_budget & model.dropping.n_devices=4 & model.ffn.n_experts=4": (
        *("model.dropping.n_devices", r"Write model\.dropping\.n_devices=2"),
    ),
    "trainer=[fsdp,sim] & trainer.precision=16-mixed": ("trainer.precision", "bf16-mixed"),
    "trainer=[fsdp,sim] & trainer.strategy.cpu_offload=true": ("trainer.strategy.cpu_offload", "Leave it out"),
    "trainer=[fsdp,sim] & data.batch_size=3": ("data.batch_size", "Set data.batch_size=4"),
    # grammar
    "gqa": ("command line", "Write key=value"),
    "a=b=c": ("command line", "cannot be read as an override"),
}
# In the data or the task, whose classes import Lightning, of what is read after them, or of an argument's own class.
LATER = {
    "-m & model/attention=mha,nope": ("model/attention", "is not an option"),
    "-m & hydra/sweeper=optuna & model/attention=choice(mla,gqaa)": ("model/attention", "Did you mean 'gqa'"),
    "data=shakespear": ("data", "Did you mean 'shakespeare'"),
    "task=causal_ml": ("task", "Did you mean 'causal_lm'"),
    "trainer=null": ("trainer", "Known: ddp, ddp_sim, deepspeed, default, fsdp"),
    "task=grpo & data=prompts & task/penalty=null": ("task/penalty", "~task/penalty"),
    "task=grpo & data=prompts & task/surrogate=cispo": ("task.surrogate.low", "leave it out: ~task/objective"),
    "+data.transforms.x._target_=blockwright.training.data.corpus.TextFiles": (
        *("data.transforms.x._target_", "is not a Transform"),
    ),
    "data.lengths=[{shares:{32:0.6,16:0.3}}]": ("data.lengths.0.shares", "sum to 0.9"),
    "data.documents=glued": ("data.documents", "apart"),
    "data.min_length=1": ("data.min_length", "at least 2"),
    "data.min_length=100000": ("data.min_length", "the longest has"),
    "data.cache_dir=null": ("data.cache_dir", "must be a path"),
    "data.batch_size=5000": ("data.batch_size", "has only"),
    "callbacks.checkpoint.monitor=val/lss": ("callbacks.checkpoint.monitor", "Did you mean 'val/loss'"),
    "-m & seed=0,1 & optimized_metric=test/loss & test=false": ("optimized_metric", "because of test=false"),
    "-m & hydra/sweeper=optuna & optimizer.lr=choice(0.1,0.2) & data.corpus.val_fraction=0": (
        *("optimized_metric", r"because of data\.corpus\.val_fraction=0"),
    ),
    "callbacks=[default,early_stopping] & +trainer.limit_val_batches=0": (
        *("callbacks.early_stopping.monitor", r"because of trainer\.limit_val_batches=0"),
    ),
    "model.vocab_size=100": ("model.vocab_size", "= 257"),
    "data.tokenizer.vocab_size=10": ("data.tokenizer.vocab_size", "need 257"),
    "model.mtp={depth: 2} & data.sequence_length=2": ("model.mtp.depth", "sequence_length = 2.*Predict fewer"),
    "data.sequence_length=65": ("data.sequence_length", "raise model.max_pos"),
    "trainer=[fsdp_cp,sim] & data.sequence_length=30": ("data.sequence_length", "Set data.sequence_length=32"),
    "data.corpus.files={tmp}/pipe": ("data.corpus.files", "no ordinary file"),
    "data.corpus.files=" + "a" * 5000: ("path", "name too long"),
    "data.corpus.files={tmp}/empty.txt": ("data.corpus.files", "hold no text"),
    "data.corpus.files={tmp}/short.txt & data.corpus.val_fraction=0 & data.corpus.test_fraction=0": (
        *("data.sequence_length", "has 25 tokens.*more text"),
    ),
    "data.corpus.files={tmp}/latin.txt": ("data.corpus.files", "0xe9 at offset 3.*iconv"),
    "ckpt_path=nope.ckpt": ("ckpt_path", "no such file"),
    "ckpt_path={tmp}/evil.ckpt": ("ckpt_path", r"\(.*system.*\)"),
    "ckpt_path={tmp}/cut.ckpt": ("ckpt_path", "cannot be loaded safely"),
    "ckpt_path=last & task_name=absent": ("ckpt_path", "has left a last.ckpt"),
    "train=false & test=false": ("ckpt_path", "init_from=OUT"),
    "trainer.max_steps=abc": ("trainer.max_steps", "must be an integer"),
    "+trainer.max_stepz=4": ("trainer.max_stepz", "Did you mean 'max_steps'"),
    "trainer.precision=17": ("trainer.precision", "bf16-mixed"),
    "callbacks.report.sample_tokens=many": ("callbacks.report.sample_tokens", "int"),
    "callbacks.report.temperature=-1 & extras.print_config=true": ("callbacks.report.temperature", "at least 0"),
    "+callbacks.x._target_=nope.Nope": ("callbacks.x._target_", "No module named 'nope'"),
    "task.z_loss=-0.1": ("task.z_loss", "at least 0"),
    "+task.lr=3": ("task.lr", "no parameter 'lr'"),
}
# What shows only when training has begun: still no traceback.
TOO_LATE = {
    "callbacks.checkpoint.monitor=val/accuracy": ("callbacks.checkpoint.monitor", "declared by no task"),
    "callbacks=[default,early_stopping] & callbacks.early_stopping.monitor=val/accuracy": (
        *("callbacks.early_stopping.monitor", "declared by no task"),
    ),
    "trainer.check_val_every_n_epoch=1 & trainer.val_check_interval=100000": (
        *("trainer.val_check_interval", "check_val_every_n_epoch=null"),
    ),
}
ALL = {**EARLY, **LATER, **TOO_LATE}
EVIL = "ckpt_path={tmp}/evil.ckpt"
FEW = ("model.attention.n_haeds=4", "a=b=c", EVIL)

PRESETS = {
    "misspelt": "inherits: tiny\nd_modle: 64\n",
    "listed": "- d_model\n",
    "foreign": "inherits: tiny\nattention: {_target_: os.system}\n",
    "broken": "d_model: {3\n",
}


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    os.mkfifo(folder / "pipe")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a\nb\nc\nd\n" * 3)
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1") * 100)
    torch.save({"hyper_parameters": {"model": {}}, "x": Hostile(folder / "ran")}, folder / "evil.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "evil.ckpt").read_bytes()[:-100])
    for group in ("experiment", "model/attention", "preset"):
        (folder / "conf" / group).mkdir(parents=True)
    (folder / "conf/model/attention/misspelt.yaml").write_text("defaults: [mla, _self_]\nn_haeds: 3\n")
    (folder / "conf/experiment/misspelt.yaml").write_text("# @package _global_\nmodel: {d_modle: 64}\n")
    (folder / "conf/experiment/broken.yaml").write_text("# @package _global_\nmodel: {d_model: 64\n")
    for name, text in PRESETS.items():
        (folder / f"conf/preset/{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def arguments_of(small: list[str], folder: Path) -> Callable[[str], list[str]]:
    def arguments(mistake: str) -> list[str]:
        given = mistake.replace("{tmp}", str(folder)).split(" & ")
        flags = [f"--config-dir={folder}/conf" if g == "{conf}" else g for g in given if g in ("-m", "{conf}")]
        key = zlib.crc32(mistake.encode())  # some begin to train
        places = [f"hydra.run.dir={folder}/run/{key}", f"hydra.sweep.dir={folder}/sweep/{key}"]
        return [*flags, *places, *small, *(g for g in given if g not in ("-m", "{conf}"))]

    return arguments


def assert_refused(found: Outcome, mistake: str) -> None:
    said, (expected, says) = found.said, ALL[mistake]
    assert found.code == 64 and "Traceback" not in said, said
    message = re.findall(r"^error: (.+) = (.*)\n  rule:   (.+)\n  remedy: (.+)$", said, re.M)
    assert said.count("error: ") == len(message) == 1, said
    path, _value, rule, remedy = message[0]
    assert path == expected or (expected[0] == "…" and path.endswith(expected[1:])), said
    assert re.search(says, f"{rule}. {remedy}"), said
    if mistake not in TOO_LATE:
        assert "step=" not in said and "configuration\n" not in said  # the tree, which would hide the message


def test_mistake_is_one_message_and_a_hostile_checkpoint_runs_nothing(
    warm: Warm, arguments_of: Callable[[str], list[str]], environment: dict[str, str], folder: Path
) -> None:
    there = {**environment, "HYDRA_FULL_ERROR": "0"}
    for name, found in run_all(warm.run, {n: arguments_of(n) for n in FEW}, cwd=folder, env=there).items():
        assert_refused(found, name)
        assert "set to `False`" not in found.said  # torch's advice
    assert not (folder / "ran").exists()


@pytest.fixture(scope="module")
def every(arguments_of: Callable[[str], list[str]], environment: dict[str, str], folder: Path) -> dict[str, Outcome]:
    """What a new process did with each, those that may import Lightning last."""
    there = {**environment, "PYTHONPATH": str(ROOT / "tests"), "HYDRA_FULL_ERROR": "0"}  # which would have Hydra say it

    def start(*words: str, **given: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=400, **given)

    first = "gc.freeze()\ngc.disable()"  # a quarter of the time of composing
    return run_all(start, {name: arguments_of(name) for name in ALL}, first, cwd=folder, env=there)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL, ids=[name[:60] for name in ALL])
def test_each_mistake_is_one_message(name: str, every: dict[str, Outcome], folder: Path) -> None:
    assert_refused(every[name], name)
    assert not (name in EARLY and every[name].lightning) and not (folder / "ran").exists()

"""Mistakes of users: one message with path, value, rule and remedy, exit code 64, at once, and no traceback.

All but a few are tried in one process, which calls ``train.main`` for each, for the start of Python and torch would
cost a hundred times the check itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytestmark = pytest.mark.xdist_group("mistakes")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parent.parent


class Mistake(NamedTuple):
    """What is written, and what the message has to say.

    given: overrides, a line each; {tmp} is a folder with the files of ``_files``
    path: of the value at fault
    says: a pattern that rule and remedy together match
    """

    given: str
    path: str
    says: str


# In the model, the optimizer or the trainer, or of Hydra's grammar: Lightning is not even imported.
EARLY = {
    "reward without its pattern": Mistake(
        "task=grpo\ndata=prompts\ntask/reward=regex_format", "task.reward.pattern", "value is required"
    ),
    "last rate of no run": Mistake("optimizer.lr=last", "optimizer.lr", "names no run"),
    "start at a folder that is no run": Mistake("init_from={tmp}", "init_from", "nor checkpoints/last.ckpt"),
    "sweep by nothing": Mistake("-m\nseed=0,1\noptimized_metric=null", "optimized_metric", "Name the figure"),
    "sweep named by a number": Mistake("-m\nseed=0,1\ntask_name=5", "task_name", "must be a string"),
    # keys
    "mistyped key": Mistake("model.d_modle=64", "model.d_modle", "Did you mean 'd_model'"),
    "mistyped key of a block": Mistake("model.attention.n_haeds=4", "model.attention.n_haeds", "'n_heads'"),
    "unknown key at the root": Mistake("+nothing=1", "nothing", "no such setting"),
    "+key of a block": Mistake("+model.attention.widow=3", "model.attention.widow", "no parameter 'widow'"),
    "++key of a block": Mistake("++model.attention.widow=3", "model.attention.widow", "no parameter 'widow'"),
    "+key of a child": Mistake("+model.ffn.shared.widow=3", "model.ffn.shared.widow", "no parameter 'widow'"),
    "+key of the optimizer": Mistake("+optimizer.widow=3", "optimizer.widow", "no argument 'widow'"),
    "key in a block's file": Mistake("model/attention=misspelt", "model.attention.n_haeds", "misspelt.yaml"),
    "key in an experiment's file": Mistake("experiment=misspelt", "model.d_modle", "Did you mean 'd_model'"),
    "key in an unused variant": Mistake(
        "+model.variants.ffn.odd={name: swiglu, widow: 1}", "model.variants.ffn.odd.widow", "no parameter"
    ),
    "parameter of the block before": Mistake(
        "model/attention=mha\nmodel.attention.kv_lora_rank=4", "model.attention.kv_lora_rank", "MHA"
    ),
    "parameter that the name fixes": Mistake(
        "model/attention=mqa\nmodel.attention.n_kv_heads=2", "model.attention.n_kv_heads", "fixes n_kv_heads to 1.*gqa"
    ),
    "child that no block takes": Mistake("+model/qk_norm=per_head", "model.qk_norm", r"model\.qk_norm=null.*gqa\|"),
    "argument the trainer has not": Mistake("trainer.max_stepz=4", "trainer.max_stepz", "Did you mean 'max_steps'"),
    "argument of the trainer that no file lists": Mistake(
        "trainer.limit_val_batches=3", "trainer.limit_val_batches", r"\+trainer\.limit_val_batches=3"
    ),
    "argument a callback has not": Mistake(
        "callbacks.report.sample_tokenz=4", "callbacks.report.sample_tokenz", "Did you mean 'sample_tokens'"
    ),
    "file that is not YAML": Mistake("experiment=broken", "…/broken.yaml:3", "is not YAML"),
    # names
    "unknown block": Mistake("model/attention=mla2", "model/attention", "Did you mean 'mla'"),
    "unknown family": Mistake("model/atention=mla", "model/atention", "Did you mean 'model/attention'"),
    "unknown block by ++name": Mistake("++model.attention.name=mla2", "model.attention.name", "Did you mean 'mla'"),
    "unknown option in a list": Mistake(
        "callbacks=[default,early_stoping]", "callbacks", "Did you mean 'early_stopping'"
    ),
    "group taken away": Mistake("~logger", "logger", "every run has this setting"),
    "group that is chosen already": Mistake("+model/attention=gqa", "model/attention", "Leave out the +"),
    "part of a preset that has none": Mistake(
        "model/gating=of/llama2_7b", "model/gating", "no preset of this name has a block of kind gating"
    ),
    # presets
    "presets that inherit each other": Mistake("model=circle", "model.inherits", "circle → wheel → circle"),
    "unknown preset to inherit": Mistake("model=orphan", "model.inherits", "Did you mean 'llama2_7b'"),
    "key in a preset": Mistake("model=misspelt", "model.d_modle", "Did you mean 'd_model'"),
    "preset that is a list": Mistake("model=listed", "model", r"must be a mapping .*listed\.yaml"),
    "class in a preset": Mistake("model=foreign", "model.attention._target_", r"dotted path .*foreign\.yaml"),
    "preset that is not YAML": Mistake("model=broken", "model", r"line 2: .*broken\.yaml.*Fix"),
    "format of a later version": Mistake("model.format=3", "model.format", "unknown to this version.*its own: 2"),
    "no family selected": Mistake("~model.attention", "model.attention", r"\+model/attention=<[^>]*\|gated_delta\|"),
    "foreign class in a model": Mistake(
        "+model.attention._target_=os.system", "model.attention._target_", "never a class by its dotted path"
    ),
    "interpolation of nothing": Mistake("model.d_model=${nope}", "model.d_model", "'nope' not found"),
    # values
    "wrong type": Mistake("model.attention.n_heads=four", "model.attention.n_heads", "must be an integer"),
    "a fraction where a count is due": Mistake("model.n_layers=2.5", "model.n_layers", "must be an integer"),
    "wrong type for the optimizer": Mistake("optimizer.lr=fast", "optimizer.lr", "must be a number"),
    "missing value": Mistake("model.d_model=???", "model.d_model", "is required"),
    "missing parameter of a block": Mistake("model/experts=swiglu", "model.experts.d_ff", "hidden width"),
    "negative size": Mistake("model.experts.d_ff=-5", "model.experts.d_ff", "at least 1"),
    "heads that do not divide the width": Mistake(
        "model.attention.n_heads=7", "model.attention.n_heads", r"must divide d_model \(64\).*is 8"
    ),
    "more experts a token than there are": Mistake("model.gating.top_k=99", "model.gating.top_k", "more experts"),
    "layout that does not fit": Mistake("model.layout.ffn='dense*2 ffn'", "model.layout.ffn", "but this one names 3"),
    "layout of a billion layers": Mistake("model.layout.ffn='ffn*999999999'", "model.layout.ffn", "999999999 times"),
    "null for what a decoder needs": Mistake("model.norm=null", "model.norm", r"layer 0 has none.*\+model/norm=<"),
    "null for what a block needs": Mistake("model.ffn.experts=null", "model.ffn.experts", "requires a block of kind"),
    "null for what a layout names": Mistake("model.ffn=null", "model.layout.ffn", "the model has none.*model/ffn=NAME"),
    "pattern of no parameter": Mistake("task.frozen=[gatign]", "task.frozen", "matches no.*Did you mean 'gating'"),
    "pattern that is no list": Mistake("task.frozen=embedding", "task.frozen", r"a list.*task\.frozen=\[embedding\]"),
    "number for a list of patterns": Mistake("task.frozen=3", "task.frozen", "must be a list of patterns"),
    "start of another name": Mistake("+adapter={name: init_from}", "adapter.name", "a setting of its own"),
    "number for a callback": Mistake("callbacks.report=3", "callbacks.report", "must be a mapping"),
    "switch for a head of several tokens": Mistake("model.mtp=false", "model.mtp", "must be a mapping"),
    "switch for a number of steps": Mistake("trainer.max_steps=true", "trainer.max_steps", "must be an integer"),
    "multiplier below 0": Mistake(
        "optimizer.multipliers={attention: -1}", "optimizer.multipliers.attention", "above 0.*task.frozen"
    ),
    "multiplier of a frozen part": Mistake(
        "task.frozen=[attention]\noptimizer.multipliers={attention: 0.1}",
        "optimizer.multipliers",
        "matches no trained parameter",
    ),
    "names for AdamW of no parameter": Mistake(
        "optimizer=muon\noptimizer.adamw_names=[heads]",
        "optimizer.adamw_names",
        "matches no trained parameter.*Did you mean 'head'",
    ),
    "selector of a window": Mistake(
        "model/attention=sliding_window\n+model/selector=dsa",
        "model.selector",
        "no block of this model takes this selector.*attention .*gqa",
    ),
    "no name of a block": Mistake(
        "model.attention.name=null",
        "model.attention.name",
        r"must have a value.*model/attention=<.*\|gqa\|",
    ),
    "no number": Mistake("model.norm.eps=null", "model.norm.eps", "must have a value.*Leave out model.norm.eps=null"),
    "multipliers that are a list": Mistake("optimizer.multipliers=[1]", "optimizer.multipliers", "must be a mapping"),
    "override of a layer that is not there": Mistake(
        "model.overrides=[{layers: 9, attention: mha}]", "model.overrides.0.layers", "9 is not one of them"
    ),
    "negative learning rate": Mistake("optimizer.lr=-1", "optimizer.lr", "above 0"),
    "warm-up longer than the training": Mistake("scheduler.warmup=7", "scheduler.warmup", "Write at most 6"),
    "training without an end": Mistake("trainer.max_steps=-1", "trainer.max_steps", "scheduler=constant"),
    "no batches a step": Mistake("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches", "at least 1"),
    "gradients turned round": Mistake("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val", "invert them"),
    "validation every 0 steps": Mistake(
        "trainer.val_check_interval=0", "trainer.val_check_interval", "number of steps"
    ),
    "batch that two processes cannot share": Mistake(
        "trainer=ddp_sim\ndata.batch_size=3", "data.batch_size", "Set data.batch_size=4"
    ),
    # many processes
    "GPU that is not there": Mistake("trainer=fsdp", "trainer.accelerator", r"no GPU.*trainer=\[fsdp,sim\]"),
    "part of a trainer": Mistake("trainer=[ddp_sim,sim]\n~trainer._target_", "trainer", r"'trainer=\[fsdp,sim\]'"),
    "torch's older FSDP": Mistake("trainer.strategy=fsdp", "trainer.strategy", "older FSDP.*trainer=fsdp"),
    "package for a strategy": Mistake("trainer=deepspeed", "trainer.strategy", r"blockwright\[deepspeed\]"),
    "world that is not filled": Mistake(
        "trainer=[fsdp,sim]\ntrainer.strategy.shard=3", "trainer.strategy.shard", "do not fill the world of 2"
    ),
    "copies that do not divide the world": Mistake(
        "trainer=[hsdp,sim]\ntrainer.devices=3", "trainer.strategy.replicate", "do not divide the world of 3"
    ),
    "no ranks": Mistake("trainer=[fsdp,sim]\ntrainer.strategy.tensor=0", "trainer.strategy.tensor", "positive number"),
    "heads that do not divide": Mistake(
        "trainer=[fsdp_tp,sim]\nmodel/attention=mha\nmodel.attention.n_heads=1\ntrainer.devices=2",
        "model.attention.n_heads",
        r"trainer\.strategy\.tensor = 2.*tensor be one of 1",
    ),
    "KV heads that do not divide": Mistake(
        "trainer=[fsdp_tp,sim]\nmodel/attention=gqa\nmodel.attention.n_kv_heads=1",
        "model.attention.n_kv_heads",
        "divisible",
    ),
    "experts that do not divide": Mistake(
        "trainer=[fsdp_ep,sim]\nmodel.ffn.n_experts=5", "model.ffn.n_experts", "expert × tensor be one of 1, 5"
    ),
    "experts on more ranks than there are": Mistake(
        "trainer=[fsdp,sim]\ntrainer.strategy.expert=4", "trainer.strategy.expert", "Choose one of 1, 2"
    ),
    "experts of a model without any": Mistake(
        "trainer=[fsdp_ep,sim]\nmodel/ffn=swiglu", "trainer.strategy.expert", "no layer of this model has any"
    ),
    "group of experts on two ranks": Mistake(
        "trainer=[fsdp_ep,sim]\nmodel.ffn.n_experts=6\nmodel/gating=group_limited\nmodel.gating.n_groups=3",
        "model.gating.n_groups",
        "Use a multiple of 2",
    ),
    "devices that are no ranks": Mistake(
        "trainer=[fsdp_ep,sim]\n+model/dropping=device_budget\nmodel.dropping.n_devices=4\nmodel.ffn.n_experts=4",
        "model.dropping.n_devices",
        r"Write model\.dropping\.n_devices=2",
    ),
    "scaled gradients": Mistake("trainer=[fsdp,sim]\ntrainer.precision=16-mixed", "trainer.precision", "bf16-mixed"),
    "offloading from no GPU": Mistake(
        "trainer=[fsdp,sim]\ntrainer.strategy.cpu_offload=true", "trainer.strategy.cpu_offload", "Leave it out"
    ),
    "batch that ranks cannot share": Mistake(
        "trainer=[fsdp,sim]\ndata.batch_size=3", "data.batch_size", "Set data.batch_size=4"
    ),
    "recomputation of another kind": Mistake(
        "task.activation_checkpointing=some", "task.activation_checkpointing", "none, selective, full"
    ),
    "seed that is no number": Mistake("seed=abc", "seed", "must be an integer"),
    "seed that no generator takes": Mistake("seed=5000000000", "seed", "at least 0 and at most 4294967295"),
    "word that is no switch": Mistake("test=no", "test", "true or false.*test=false"),
    "empty mapping over another": Mistake("model.layout={}", "model.layout", "change nothing.*model.layout=null"),
    "strategy that starts no commands": Mistake("trainer.strategy=ddp_spawn", "trainer.strategy", "strategy=ddp"),
    "batch that two processes cannot share, by count alone": Mistake(
        "trainer.devices=2\ndata.batch_size=3", "data.batch_size", "Set data.batch_size=4"
    ),
    "no such device": Mistake("trainer.accelerator=gpux", "trainer.accelerator", "Did you mean 'gpu'"),
    "no tags where tags are asked for": Mistake("tags=[]\nextras.enforce_tags=true", "tags", r"tags=\[mine\]"),
    # files
    "corpus not named": Mistake("data.corpus.files=???", "data.corpus.files", "a value is required"),
    "auto_resume that is no switch": Mistake("auto_resume=last", "auto_resume", "true or false"),
    # grammar
    "no override at all": Mistake("gqa", "command line", "Write key=value"),
    "two equals signs": Mistake("a=b=c", "command line", "cannot be read as an override"),
    "package not installed": Mistake("logger=wandb", "logger.wandb", r"pip install 'blockwright\[wandb\]'"),
}

# In the data or the task, whose classes import Lightning, or of what is read after them.
OF_PARTS = {
    "unknown block in a sweep": Mistake("-m\nmodel/attention=mha,nope", "model/attention", "is not an option"),
    "unknown option of a group": Mistake("data=shakespear", "data", "Did you mean 'shakespeare'"),
    "group set to null": Mistake("trainer=null", "trainer", "Known: ddp, ddp_sim, deepspeed, default, fsdp"),
    "group of blocks set to nothing": Mistake(
        "task=grpo\ndata=prompts\ntask/penalty=null", "task/penalty", "~task/penalty"
    ),
    "part of an objective that has numbers of another": Mistake(
        "task=grpo\ndata=prompts\ntask/surrogate=cispo", "task.surrogate.low", "leave it out: ~task/objective"
    ),
    "transform that is none": Mistake(
        "+data.transforms.x._target_=blockwright.training.data.text.TextFiles",
        "data.transforms.x._target_",
        "is not a Transform",
    ),
    "shares that do not sum to 1": Mistake(
        "data.lengths=[{shares:{32:0.6,16:0.3}}]", "data.lengths.0.shares", "sum to 0.9"
    ),
    "windows longer than the longest": Mistake(
        "data.lengths=[{shares:{64:1.0}}]", "data.lengths", "longer than data.sequence_length"
    ),
    "documents neither apart nor joined": Mistake("data.documents=glued", "data.documents", "apart"),
    "documents of one token": Mistake("data.min_length=1", "data.min_length", "at least 2"),
    "misspelt monitor": Mistake(
        "callbacks.checkpoint.monitor=val/lss", "callbacks.checkpoint.monitor", "Did you mean 'val/loss'"
    ),
    "misspelt objective": Mistake("optimized_metric=val_loss", "optimized_metric", "Did you mean 'val/loss'"),
    "objective of a sweep that nothing measures": Mistake(
        "-m\nseed=0,1\noptimized_metric=test/loss\ntest=false", "optimized_metric", "because of test=false"
    ),
    "objective of a search that nothing measures": Mistake(
        "-m\nhydra/sweeper=optuna\noptimizer.lr=choice(0.1,0.2)\ndata.corpus.val_fraction=0",
        "optimized_metric",
        r"because of data\.corpus\.val_fraction=0",
    ),
    "early stopping by what is not measured": Mistake(
        "callbacks=[default,early_stopping]\n+trainer.limit_val_batches=0",
        "callbacks.early_stopping.monitor",
        r"because of trainer\.limit_val_batches=0",
    ),
    "unknown task": Mistake("task=causal_ml", "task", "Did you mean 'causal_lm'"),
    "vocabulary smaller than the tokenizer's": Mistake("model.vocab_size=100", "model.vocab_size", "= 257"),
    "vocabulary too small for the tokenizer": Mistake(
        "data.tokenizer.vocab_size=10", "data.tokenizer.vocab_size", "need 257"
    ),
    "depth of prediction beyond the sequence": Mistake(
        "model.mtp={depth: 2}\ndata.sequence_length=2", "model.mtp.depth", "sequence_length = 2.*Predict fewer"
    ),
    "sequence longer than the model": Mistake("data.sequence_length=65", "data.sequence_length", "raise model.max_pos"),
    "window that ranks cannot share": Mistake(
        "trainer=[fsdp_cp,sim]\ndata.sequence_length=30", "data.sequence_length", "Set data.sequence_length=32"
    ),
    "gate that chooses among all tokens of shared windows": Mistake(
        "trainer=[fsdp_cp,sim]\nmodel/gating=expert_choice", "model.gating", "softmax_topk"
    ),
    "corpus not there": Mistake("data.corpus.files={tmp}/emty.txt", "data.corpus.files", "Did you mean 'empty.txt'"),
    "corpus that is a pipe": Mistake("data.corpus.files={tmp}/pipe", "data.corpus.files", "no ordinary file"),
    "corpus with a name longer than any": Mistake("data.corpus.files=" + "a" * 5000, "path", "name too long"),
    "corpus empty": Mistake("data.corpus.files={tmp}/empty.txt", "data.corpus.files", "hold no text"),
    "corpus too short": Mistake(
        "data.corpus.files={tmp}/short.txt\ndata.corpus.val_fraction=0\ndata.corpus.test_fraction=0",
        "data.sequence_length",
        "has 25 tokens.*more text",
    ),
    "corpus not in UTF-8": Mistake("data.corpus.files={tmp}/latin.txt", "data.corpus.files", "0xe9 at offset 3.*iconv"),
    "checkpoint not there": Mistake("ckpt_path=nope.ckpt", "ckpt_path", "no such file"),
    "checkpoint that is something else": Mistake("ckpt_path={tmp}/short.txt", "ckpt_path", "cannot be loaded safely"),
    "checkpoint that would run a command": Mistake("ckpt_path={tmp}/evil.ckpt", "ckpt_path", r"\(.*system.*\)"),
    "checkpoint cut short": Mistake("ckpt_path={tmp}/cut.ckpt", "ckpt_path", "cannot be loaded safely"),
    "address for a checkpoint": Mistake("ckpt_path='https://host/x.ckpt'", "ckpt_path", "no such file"),
    "no run to resume": Mistake("ckpt_path=last\ntask_name=absent", "ckpt_path", "has left a last.ckpt"),
    "random weights to test": Mistake("train=false\ntest=true", "ckpt_path", "random initial weights"),
    "random weights to validate": Mistake("train=false\ntest=false", "ckpt_path", "init_from=OUT"),
}

# What only the argument's own class knows: Lightning is there by then, training is not.
LATE = {
    "documents longer than any": Mistake("data.min_length=100000", "data.min_length", "the longest has"),
    "wrong type for the trainer": Mistake("trainer.max_steps=abc", "trainer.max_steps", "must be an integer"),
    "+key of the trainer": Mistake("+trainer.max_stepz=4", "trainer.max_stepz", "Did you mean 'max_steps'"),
    "no such precision": Mistake("trainer.precision=17", "trainer.precision", "bf16-mixed"),
    "wrong type for a callback": Mistake(
        "callbacks.report.sample_tokens=many", "callbacks.report.sample_tokens", "int"
    ),
    "value that a callback refuses": Mistake(
        "callbacks.report.temperature=-1\nextras.print_config=true", "callbacks.report.temperature", "at least 0"
    ),
    "no such class": Mistake("+callbacks.x._target_=nope.Nope", "callbacks.x._target_", "No module named 'nope'"),
    "z-loss that rewards": Mistake("task.z_loss=-0.1", "task.z_loss", "at least 0"),
    "+key of the task": Mistake("+task.lr=3", "task.lr", "no parameter 'lr'"),
    "null for a folder": Mistake("data.cache_dir=null", "data.cache_dir", "must be a path"),
    "batch larger than the corpus": Mistake("data.batch_size=5000", "data.batch_size", "has only"),
}

# What shows only when training has begun: still no traceback.
TOO_LATE = {
    "monitor of nothing": Mistake(
        "callbacks.checkpoint.monitor=val/accuracy", "callbacks.checkpoint.monitor", "declared by no task"
    ),
    "early stopping by a figure that is not logged": Mistake(
        "callbacks=[default,early_stopping]\ncallbacks.early_stopping.monitor=val/accuracy",
        "callbacks.early_stopping.monitor",
        "declared by no task",
    ),
    "validation less often than once an epoch of them": Mistake(
        "trainer.check_val_every_n_epoch=1\ntrainer.val_check_interval=100000",
        "trainer.val_check_interval",
        "check_val_every_n_epoch=null",
    ),
}

PRESETS = {
    "circle": "inherits: wheel\n",
    "wheel": "inherits: circle\n",
    "orphan": "inherits: llama2_7\n",
    "misspelt": "inherits: tiny\nd_modle: 64\n",
    "listed": "- d_model\n",
    "foreign": "inherits: tiny\nattention: {_target_: os.system}\n",
    "broken": "d_model: {3\n",
}

DRIVER = """
import contextlib, gc, io, json, sys, traceback
from blockwright import train
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
import hydra_once

hydra_once.install()

# Hydra composes everything once more, beforehand, to see whether a file asks for a sweep: half of the time of this.
Hydra.get_mode = lambda *_, **__: RunMode.MULTIRUN if "-m" in sys.argv else RunMode.RUN

gc.freeze()
gc.disable()  # a quarter of the time of composing
for name, arguments in json.load(sys.stdin).items():
    GlobalHydra.instance().clear()
    sys.argv = ["train.py", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            train.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "raised"
    lightning = "lightning" in sys.modules
    print(json.dumps({"name": name, "code": code, "said": said.getvalue(), "lightning": lightning}))
"""


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def _files(folder: Path) -> None:
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
    for name, text in PRESETS.items():
        (folder / f"conf/preset/{name}.yaml").write_text(text)
    (folder / "conf/experiment/broken.yaml").write_text("# @package _global_\nmodel: {d_model: 64\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    _files(folder)
    return folder


@pytest.fixture(scope="module")
def arguments_of(small: list[str], folder: Path) -> Callable[[Mistake], list[str]]:
    def arguments(mistake: Mistake) -> list[str]:
        given = mistake.given.replace("{tmp}", str(folder)).splitlines()
        flags = [g for g in given if g.startswith("-")]
        places = [
            "--config-dir",
            str(folder / "conf"),
            f"hydra.run.dir={folder}/run/{zlib.crc32(mistake.given.encode())}",  # some begin to train
            f"hydra.sweep.dir={folder}/sweep/{zlib.crc32(mistake.given.encode())}",
        ]
        return [*flags, *places, *small, *(g for g in given if g not in flags)]

    return arguments


ALL = {**EARLY, **OF_PARTS, **LATE, **TOO_LATE}
# Of the quick tests: one of each way to be refused. The rules have their tests where they are.
FEW = {
    *("mistyped key of a block", "unknown block", "heads that do not divide the width", "two equals signs"),
    "checkpoint that would run a command",
}


def rows(mistakes: dict[str, Mistake]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in mistakes]


@pytest.fixture(scope="module")
def outcomes(
    arguments_of: Callable[[Mistake], list[str]],
    environment: dict[str, str],
    folder: Path,
    request: pytest.FixtureRequest,
) -> dict[str, dict[str, Any]]:
    """What the program did with each that is asked for, in one process, those that may import Lightning last."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("name") for item in here}  # type: ignore[attr-defined]
    given = {name: arguments_of(mistake) for name, mistake in ALL.items() if name in asked}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(given),
        cwd=folder,
        env={
            **environment,
            "PYTHONPATH": str(ROOT / "tests"),
            "HYDRA_FULL_ERROR": "0",
        },  # which would have Hydra say it
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {outcome["name"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


def assert_one_message(said: str, mistake: Mistake) -> None:
    assert "Traceback" not in said, said
    message = re.findall(r"^error: (.+) = (.*)\n  rule:   (.+)\n  remedy: (.+)$", said, re.M)
    assert said.count("error: ") == len(message) == 1, said
    path, _value, rule, remedy = message[0]
    assert path == mistake.path or (mistake.path[0] == "…" and path.endswith(mistake.path[1:])), said
    assert re.search(mistake.says, f"{rule}. {remedy}"), said


@pytest.mark.parametrize("name", rows(EARLY))
def test_mistake_is_refused_before_lightning_is_imported(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[name]
    assert_one_message(outcome["said"], EARLY[name])
    assert outcome["code"] == 64
    assert not outcome["lightning"]


@pytest.mark.parametrize("name", rows({**OF_PARTS, **LATE}))
def test_mistake_is_refused_before_training(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[name]
    assert_one_message(outcome["said"], {**OF_PARTS, **LATE}[name])
    assert outcome["code"] == 64
    assert "step=" not in outcome["said"] and "results.json" not in outcome["said"]
    assert "configuration\n" not in outcome["said"]  # the tree, which would hide the message


@pytest.mark.parametrize("name", rows(TOO_LATE))
def test_mistake_that_shows_in_training_is_a_message_too(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert_one_message(outcomes[name]["said"], TOO_LATE[name])
    assert outcomes[name]["code"] == 64


@pytest.mark.parametrize("name", ["checkpoint that would run a command"])
def test_hostile_checkpoint_runs_nothing(name: str, outcomes: dict[str, dict[str, Any]], folder: Path) -> None:
    assert not (folder / "ran").exists()
    assert "set to `False`" not in outcomes[name]["said"]  # torch's advice


@pytest.mark.slow
@pytest.mark.parametrize("name", ["+key of a block", "corpus too short"])
def test_mistake_on_the_real_command_line(
    name: str, arguments_of: Callable[[Mistake], list[str]], train_py: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    mistake = {**EARLY, **OF_PARTS, **LATE}[name]
    done = train_py(*arguments_of(mistake))
    assert done.returncode == 64
    assert_one_message(done.stderr, mistake)

"""Everything in conf/ composes, and Hydra's refusals come out in one form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import yaml
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from pairwise import each

from blockwright.registry import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config, explain
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.instantiate import check_target
from blockwright.training.configuration.run import OWN
from blockwright.training.entry.preflight import preflight
from hydra_plugins.blockwright_optuna._options import TPE, OptunaSweeper


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def chosen(*groups: str) -> list[str]:
    # One names a file (tests/training/data/test_tokenizers.py), one needs a package, one is put upon another, and one
    # starts from a trained run.
    needy = {"data/tokenizer=pretrained", "trainer=deepspeed", "trainer=sim", "experiment=dsa_warmup"}
    return [o for group in groups for option in options(group) if (o := f"{group}={option}") not in needy]


WHOLE = chosen("experiment", "debug", "hparams_search")
# Choices that know nothing of each other; models: tests/test_presets.py
GROUPS = ("trainer", "logger", "optimizer", "scheduler", "data/tokenizer", "callbacks")
TOGETHER = each(*map(chosen, GROUPS))


def check(override: list[str], small: list[str], tmp_path: Path) -> dict[str, Any]:
    return preflight(compose_config([*small, *override], output_dir=str(tmp_path)))


QUICK = "experiment=attention_ablation"


@pytest.mark.parametrize(
    "override",
    [override if override == QUICK else pytest.param(override, marks=pytest.mark.slow) for override in WHOLE],
)
def test_named_list_of_overrides_composes_and_is_sound(
    override: str, kernel_pages: str, corpus_file: Path, tmp_path: Path
) -> None:
    text = f"data.corpus.files={corpus_file}"  # in place of what is downloaded
    own = {"experiment=mixture": [kernel_pages], "experiment=nanogpt_shakespeare": [text]}.get(override, [])
    plain = preflight(compose_config([override, *own], output_dir=str(tmp_path)))  # as it stands: on Shakespeare
    parts.check("task", plain)
    check_target(plain["trainer"], "trainer", skip=OWN)


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(row, marks=[pytest.mark.slow] * (i > 3), id=" ".join(row)) for i, row in enumerate(TOGETHER)],
)
def test_option_composes_and_its_arguments_exist(
    overrides: tuple[str, ...], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "blockwright.training.entry.preflight.has_package", lambda name: True
    )  # those of loggers need not be
    trainer, on_cpus = overrides[0], ["trainer.accelerator=cpu"]  # this machine need not have a GPU
    if trainer not in ("trainer=default", "trainer=ddp_sim", "trainer=gpu"):
        on_cpus += ["trainer.devices=4", "data.batch_size=4", "data.eval_batch_size=4"]
    kept = [o for o in small if not o.startswith("callbacks.")]
    plain = check([*overrides, *on_cpus], kept, tmp_path)
    check_target(plain["trainer"], "trainer", skip=OWN)
    check_target(plain["callbacks"] or {}, "callbacks")


REFUSED = {
    # a mistake: its path, and what the remedy holds
    "model.d_modle=1": ("model.d_modle", "'d_model'"),
    "modle.d_model=1": ("modle", "'model'"),
    "model.attention.n_heads=x": ("model.attention.n_heads", "<an integer>"),
    "model/attention=x": ("model/attention", "mla"),
    "model/balance=expert": ("model/balance", "+model/balance=expert"),
    "callbacks=[default,x]": ("callbacks", "early_stopping"),
    "+trainer.strategy=ddp": ("trainer.strategy", "remove + prefix: 'trainer.strategy=ddp'"),
    "model.layout={}": ("model.layout", "model.layout=null"),
    "++model.variants={ }": ("model.variants", "model.variants=null"),
    "callbacks.report={}": ("callbacks.report", "callbacks.report=null"),
    "callbacks={}": ("callbacks", "callbacks=<averaging|checkpoint|completions"),
    "a=b=c": ("command line", "quoted"),
    "~nothing": ("nothing", "--help"),
    "+model.overrides.0.layers=1": ("model.overrides.0.layers", "--help"),
    "model=[tiny,gpt2]": ("model", "Write one: model=tiny"),
    # comparisons, presets and classes, which are chosen in another way
    "ladder=x": ("ladder", "Write: blockwright ladder x"),
    "preset=tiny": ("preset", "Write model=tiny"),
    "model/ffn=of/mixtral": ("model/ffn", "'of/mixtral_8x7b'"),
    "model=of/x": ("model/of", "--help"),
    "task._target_=x": ("task._target_", "@register('task', NAME)"),
    # a key that is not there, of a class, of a block, below another
    "optimizer.lrr=1": ("optimizer.lrr", "not listed: +optimizer.lrr=1"),
    "model.attention.n_haeds.deeper=3": ("model.attention.n_haeds", "'n_heads'"),
    "model.attention.d_model=3": ("model.attention.d_model", "Known: kv_lora_rank"),
    "seed.x=1": ("seed.x", "--cfg job"),
    "nogroup/x=1": ("nogroup/x", "Known: ablation"),
    "optimizer=nothing": ("optimizer", "Known: adamw"),
    "model/gating=null": ("model/gating", "; or ~model/gating for none"),
    "data/tokenizer=null": ("data/tokenizer", "Known: bpe, bytes, chars, pretrained"),
    "model.attention.name=null": ("model.attention.name", "|gqa|"),
    "+model/attention=gqa": ("model/attention", "Leave out the +: model/attention=gqa"),
    "model.d_model=1,2": ("model.d_model", "A list is written model.d_model=[1,2]"),
    # written at the root, to be written as a group, and a key that only what is selected lacks
    "lr=0.1": ("lr", "Write optimizer.lr=0.1"),
    "trainer.callbacks=[]": ("trainer.callbacks", "Write callbacks=NAME"),
    "model=file & model.file=x & model.n_layers=2": ("model.n_layers", "Add it: +model.n_layers=2"),
    # several values without a sweep
    "model/attention=mha,gqa": ("model/attention", "blockwright train -m model/attention=mha,gqa"),
}


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_refusal_of_hydra_has_the_path_and_a_remedy(part: int) -> None:
    for override, (path, remedy) in list(REFUSED.items())[part::3]:
        with pytest.raises(ConfigError) as caught:
            compose_config(["seed=1", *override.split(" & "), "data.batch_size=4"], output_dir="x")
        error = caught.value
        assert error.path == path and remedy in error.remedy and "\n" not in error.render().split("remedy:")[1]
        assert error.__cause__ is None and error.__suppress_context__
        assert "seed=1" not in str(error.value), override  # the value at fault, not the whole command line


def test_later_override_wins_and_an_empty_mapping_where_nothing_is_means_what_it_says(tmp_path: Path) -> None:
    given = ["seed=1", "model/attention=mha", "model/attention=gqa", "seed=2"]
    given += ["+model.balance={}", "logger=none", "logger={}", "+model.overrides=[]"]
    cfg = compose_config(given, output_dir=str(tmp_path))
    assert (cfg.seed, cfg.model.attention.name, cfg.paths.output_dir) == (2, "gqa", str(tmp_path))
    assert cfg.data.seed == 2 and cfg.logger == {} and cfg.model.overrides == []


def test_search_without_optuna_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "blockwright.lab.sweep.search", raising=False)
    for module in ("optuna", *(name for name in sys.modules if name.startswith("optuna."))):
        monkeypatch.setitem(sys.modules, module, None)
    node = OmegaConf.structured(OptunaSweeper(sampler=TPE()))
    with pytest.raises(InstantiationException) as raised:
        hydra.utils.instantiate(node)
    refused = explain(raised.value, ["hparams_search=optuna"])
    assert refused.path == "hydra/sweeper" and "pip install 'blockwright[optuna]'" in str(refused)


def test_other_errors_of_hydra_keep_their_advice_and_the_longest_override_that_they_name() -> None:
    said = "Cannot have 'log.dir'.\nfull_key: log.dir\nEither leave it.\nIt is so.\n"
    refused = explain(HydraException(said), ["log=1", "+log.dir=2", "seed=0"])
    assert (refused.path, refused.value, refused.remedy) == ("log.dir", "2", "Either leave it.")
    error = HydraException("It cannot be.\nIt is so.")
    error.__cause__ = error  # as errors of OmegaConf under a debugger and where coverage is measured
    nothing = explain(error, ["seed=0", "test=true"])
    assert (nothing.path, nothing.value) == ("configuration", "seed=0 test=true") and "--help" in nothing.remedy


def test_file_that_is_not_yaml_is_refused_at_its_line() -> None:
    with pytest.raises(yaml.YAMLError) as raised:
        yaml.safe_load("a: b\nc: {d\n")
    refused = explain(raised.value, [])
    assert refused.path.endswith(":3")

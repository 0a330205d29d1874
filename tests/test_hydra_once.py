"""What tests/hydra_once.py makes of a command is what Hydra makes of it, the first time and later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blockwright.blocks.ffn import SwiGLU
from blockwright.registry import ConfigError, register
from blockwright.training.configuration.composing import compose_config

COMMANDS = [
    [],
    ["seed=3"],
    ["data=sorting", "optimizer.lr=1e-5", "++model.ffn.shared.d_ff=12"],
    ["data=sorting", "optimizer.lr=2e-5"],
    ["model=gpt2", "model/attention=gqa", "~callbacks.report", "callbacks.guard.patience=7"],
    ["model=gpt2", "model/attention=of/deepseek_v2_lite", "++trainer.inference_mode=false"],
    ["experiment=sft_sort", "logger=[csv,tensorboard]", "model.layout.ffn=ffn*"],
    ["experiment=sft_sort", "logger=[csv]"],
    ["data=sorting", "optimizer={lr:0.5}"],
]
PLAIN = """
import json, sys
from omegaconf import OmegaConf
from blockwright.training.configuration.composing import compose_config

print(json.dumps([OmegaConf.to_container(compose_config(c, output_dir="out")) for c in json.load(sys.stdin)]))
"""


def composed(*overrides: str) -> Any:
    return OmegaConf.to_container(compose_config(overrides, output_dir="out"))


@pytest.mark.slow
def test_it_composes_what_hydra_does(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], input=json.dumps(COMMANDS), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    for _ in range(2):  # made, then remembered
        assert json.loads(json.dumps([composed(*command) for command in COMMANDS])) == expected


def test_what_one_configuration_becomes_changes_no_other() -> None:
    first = compose_config(["data=sorting"], output_dir="out")
    before = OmegaConf.to_container(first)
    first.model.d_model = 8
    first.callbacks.guard = None
    assert composed("data=sorting") == before


@pytest.mark.slow
def test_a_mistake_is_refused_each_time_and_what_a_test_makes_is_an_option_until_it_ends(
    temporary_blocks: None, tmp_path: Path
) -> None:
    for wrong in (["model=gpt22"], ["model.d_modle=3"], ["data=sorting", "nothing=1"]) * 2:
        with pytest.raises(ConfigError):
            compose_config(wrong)
    before = composed("model=gpt2", "model/ffn=swiglu")
    register("ffn", "mine")(type("Mine", (SwiGLU,), {"__doc__": SwiGLU.__doc__}))
    assert composed("model=gpt2", "model/ffn=mine")["model"]["ffn"]["name"] == "mine"
    assert composed("model=gpt2", "model/ffn=swiglu") == before
    group = tmp_path / "experiment"
    group.mkdir()
    for seed in (4, 5):
        (group / "mine.yaml").write_text(f"# @package _global_\nseed: {seed}\n")
        assert composed(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")["seed"] == seed

"""A run that starts by surgery: ``surgery=default init_from=RUN``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.surgery.start import Surgery
from blockwright.registry import ConfigError
from blockwright.training.configuration import parts

SURGERY = ["init_from=RUN", "model=pretrained", "surgery=default"]
MHA = [*SURGERY, "+model/attention=mha"]
Checked = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    decoder = compose(tiny(vocab_size=257), seed=7)
    weights = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, tmp_path / "some.ckpt")
    return tmp_path / "some.ckpt"


@pytest.fixture(name="small")
def without_a_model(small: list[str]) -> list[str]:
    """The small run without changes to its model, which is that of the weights."""
    return [o for o in small if not o.startswith("model.")]


def test_weights_are_put_into_another_composition(checked: Checked, run: Path) -> None:
    task = parts.build("task", checked(*(o.replace("RUN", str(run)) for o in MHA), "++model.n_layers=3"))
    task.configure_model()
    text = torch.arange(30)[None]
    with torch.no_grad():
        assert (load(run)(text) - task.decoder(text)).abs().max() < 1e-4
    assert task.decoder.config["attention"]["name"] == "mha" and len(task.decoder.layers) == 3


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        ([*MHA, "+model/position=rope", "model.position.theta=5e5", "surgery.exact=true"], "surgery.exact", "theta"),
        ([*MHA, "surgery.growth.name=faded"], "surgery.growth.name", "zeroed"),
        (["surgery=default"], "init_from", "leave surgery out"),
        ([*SURGERY, "surgery/transplant=drop"], "surgery.transplant", "serves"),
    ],
)
def test_surgery_that_cannot_be_right_is_refused(
    overrides: list[str], path: str, words: str, checked: Checked, run: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        checked(*(o.replace("RUN", str(run)) for o in overrides))
    assert caught.value.path == path


def test_remedy_for_weights_that_do_not_fit_names_it(checked: Checked, run: Path) -> None:
    with pytest.raises(ConfigError, match="surgery=default") as caught:
        checked(f"init_from={run}", "model=pretrained", "+model/attention=mha")
    assert caught.value.path == "init_from"


def test_decoder_that_is_sharded_is_refused() -> None:
    surgery = parts.starts({"surgery": {}, "init_from": "RUN", "seed": 0})[0]
    assert isinstance(surgery, Surgery)
    with pytest.raises(ConfigError, match="blockwright surgery") as caught:
        surgery.fill_part(torch.nn.Linear(2, 2), "layers.0.")
    assert caught.value.path == "surgery"

"""A run that starts by surgery: ``surgery=default init_from=RUN``; measured in fp32, reported, refused if not exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.surgery.growth import Zeroed
from blockwright.plugins.surgery.ledger import Ledger
from blockwright.plugins.surgery.start import Surgery
from blockwright.plugins.surgery.transplant.base import differences, shown
from blockwright.registry import ConfigError
from blockwright.training.configuration import parts

SURGERY = ["init_from=RUN", "model=pretrained", "surgery=default"]
MHA = [*SURGERY, "+model/attention=mha"]
ONLY_MHA: dict[str, Any] = {"attention": {"name": "mha"}}
Tiny = Callable[..., dict[str, Any]]
Checked = Callable[..., dict[str, Any]]


def written(decoder: Decoder, file: Path) -> Path:
    weights = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, file)
    return file


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    return written(compose(tiny(vocab_size=257), seed=7), tmp_path / "run.ckpt")


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path) -> Path:
    return written(compose(tiny(init={"std": 0.2, "depth_scaled": False}), seed=3), tmp_path / "start.ckpt")


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


def test_surgery_that_cannot_be_right_is_refused(checked: Checked, run: Path) -> None:
    theta = [*MHA, "+model/position=rope", "model.position.theta=5e5", "surgery.exact=true"]
    for overrides, path in ((theta, "surgery.exact"), (["surgery=default"], "init_from")):
        with pytest.raises(ConfigError) as caught:
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


# Without a run


def surgery(start: Path | None = None, exact: bool = False) -> Surgery:
    return Surgery(Zeroed(), exact=exact, init_from=start and str(start))


def filled(start: Path, new: Decoder, exact: bool = False) -> tuple[Decoder, Ledger]:
    reports: list[tuple[Decoder, Ledger]] = []
    surgery(start, exact).operate(new, list, lambda *report: reports.append(report))
    return reports[0]


def test_model_of_lower_precision_is_measured_in_fp32_and_rounded(tiny: Tiny, start: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        new = compose(tiny(**ONLY_MHA)).train()
        old, ledger = filled(start, new, exact=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ledger.exact and new.training
    (trained, mine) = (decoder.layers[0].attention.query.weight for decoder in (old, new))
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, trained.to(torch.bfloat16))


def test_what_is_too_large_to_measure_is_not_exact(tiny: Tiny, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockwright.plugins.surgery.probing.FLOPS", 1e5)
    assert not filled(start, compose(tiny(**ONLY_MHA)))[1].exact
    with pytest.raises(ConfigError, match="too large") as caught:
        filled(start, compose(tiny(**ONLY_MHA)), exact=True)
    assert caught.value.path == "surgery.exact"


CHANGED: list[dict[str, Any]] = [
    {"position": {"name": "rope", "theta": 5e5}},
    {"norm": {"name": "rmsnorm", "eps": 0.1}},
    {"residual": "sandwich"},
    {"ffn": {"name": "bounded_swiglu", "d_ff": 40}},
    {"scale_embeddings": True, "norm": "none", "tie_embeddings": True},
]


def test_what_surely_changes_is_refused_before_weights_are_read(tiny: Tiny) -> None:
    for changes in CHANGED:
        models = check(tiny()), check(tiny(**ONLY_MHA, **changes))
        with pytest.raises(ConfigError) as caught:
            surgery(exact=True).outline(*models)
        assert caught.value.path == "surgery.exact" and surgery().outline(*models).changes


class Part(nn.Module):
    def __init__(self, **own: Any) -> None:
        super().__init__()
        vars(self).update(own)


def test_what_differs_is_named_and_what_is_the_same_is_not() -> None:
    differing: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"a": "none"}, {}, "a none → none"),
        ({"a": (True,)}, {"a": (1,)}, "a (True,) → (1,)"),
        ({"a": [1, (True, 2)]}, {"a": [1, (1, 2)]}, "a (1, (True, 2)) → (1, (1, 2))"),
        ({"a": (1, 2)}, {"a": (1,)}, "a (1, 2) → (1,)"),
        ({"a": 5}, {}, "a 5 → none"),
    ]
    for old, new, words in differing:
        assert shown(differences(Part(**old), Part(**new))) == words
    same: list[tuple[dict[str, Any], dict[str, Any]]]
    same = [({"a": None}, {}), ({"a": (1, 2)}, {"a": [1.0, 2]}), ({"a": 1}, {"a": 1.0})]
    for old, new in same:
        assert not differences(Part(**old), Part(**new)) and not differences(Part(**new), Part(**old))

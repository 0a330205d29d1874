"""Surgery as a run does it: measured in fp32 whatever its precision, reported, and refused if it has to be exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.surgery.growth.zeroed import Zeroed
from blockwright.plugins.surgery.ledger import Ledger
from blockwright.plugins.surgery.start import Surgery
from blockwright.registry import ConfigError

MHA: dict[str, Any] = {"attention": {"name": "mha"}}
Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path) -> Path:
    decoder = compose(tiny(init={"std": 0.2, "depth_scaled": False}), seed=3)
    weights = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, tmp_path / "some.ckpt")
    return tmp_path / "some.ckpt"


def surgery(start: Path | None = None, exact: bool = False) -> Surgery:
    return Surgery(Zeroed(), exact=exact, init_from=start and str(start))


def filled(start: Path, new: Decoder, exact: bool = False) -> tuple[Decoder, Ledger]:
    reports: list[tuple[Decoder, Ledger]] = []
    surgery(start, exact).operate(new, list, lambda *report: reports.append(report))
    return reports[0]


def test_model_of_lower_precision_is_measured_in_fp32_and_rounded(tiny: Tiny, start: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        new = compose(tiny(**MHA)).train()
        old, ledger = filled(start, new, exact=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ledger.exact and new.training
    (trained, mine) = (decoder.layers[0].attention.query.weight for decoder in (old, new))
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, trained.to(torch.bfloat16))


def test_what_is_too_large_to_measure_is_not_exact(tiny: Tiny, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockwright.plugins.surgery.probing.FLOPS", 1e5)
    assert not filled(start, compose(tiny(**MHA)))[1].exact
    with pytest.raises(ConfigError, match="too large to be compared") as caught:
        filled(start, compose(tiny(**MHA)), exact=True)
    assert caught.value.path == "surgery.exact"


@pytest.mark.parametrize(
    "changes",
    [
        {"position": {"name": "rope", "theta": 5e5}},
        {"norm": {"name": "rmsnorm", "eps": 0.1}},
        {"residual": "sandwich"},
        {"ffn": {"name": "bounded_swiglu", "d_ff": 40}},
        {"scale_embeddings": True, "norm": "none", "tie_embeddings": True},
    ],
)
def test_what_surely_changes_is_refused_before_weights_are_read(tiny: Tiny, changes: dict[str, Any]) -> None:
    models = check(tiny()), check(tiny(**MHA, **changes))
    with pytest.raises(ConfigError, match="may compute something else") as caught:
        surgery(exact=True).outline(*models)
    assert caught.value.path == "surgery.exact" and surgery().outline(*models).changes

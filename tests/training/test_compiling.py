"""Layers compiled one by one: no graph break in any published model's, the same numbers, and the same names."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from shrinking import shrunken
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.seam import implementations
from blockwright.registry import ConfigError, presets
from blockwright.training.compiling import Compiling, compile_layers, seconds_waited
from blockwright.training.entry.preflight import check_compiler

# Presets that together have most blocks of all presets; the kit compiles each block by itself.
MIXED = ("deepseek_v4_flash", "deepseek_v4_1_flash", "inkling", "gemma4_e2b", "nemotron_h_8b", "huginn_3_5b")


def loss_and_gradients(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    hidden, routings = decoder.train().hidden(ids)
    losses = [x for r in routings if r is not None for x in r.losses.values()]
    loss = torch.stack([decoder.nll(hidden, ids.roll(-1, 1)) / ids.numel(), *losses]).sum()
    used = [p for p in decoder.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, used, allow_unused=True)
    return loss, [torch.zeros(()) if g is None else g for g in grads]


@pytest.fixture
def fresh() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.slow
@pytest.mark.parametrize("model", MIXED)
def test_layers_of_a_preset_compile_without_a_break_to_the_same_loss_and_gradients(
    fresh: None, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = sys.modules[implementations("attention")["blocked"].call.__module__]
    monkeypatch.setattr(blocked, "SHORTEST", 4)  # where it can be, attention is by blocks, as in training
    decoder = compose(shrunken(model), seed=0)
    if decoder.loop is None:  # layers with a block that none before has
        kept, seen = [], set[str]()
        for layer in decoder.layers:
            if not seen >= (blocks := {f"{name}: {block}" for name, block in layer.named_children()}):
                kept.append(layer)
                seen |= blocks
        decoder.layers = nn.ModuleList(kept)
    compiled, ids = copy.deepcopy(decoder), torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    compile_layers(compiled, backend="aot_eager", fullgraph=True)
    assert list(compiled.state_dict()) == list(decoder.state_dict())
    (loss, grads), (expected, right) = loss_and_gradients(compiled, ids), loss_and_gradients(decoder, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert any(g.any() for g in right)
    for got, wanted in zip(grads, right, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_run_compiles_its_layers_for_training_alone(checked: Any, fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiled.append((f.__self__, kwargs)) or f)
    monkeypatch.setattr("blockwright.training.entry.preflight.check_compiler", lambda accelerator: None)
    task = fit("trainer.compile=true", "trainer.max_steps=1").lightning_module
    assert [layer for layer, _ in compiled] == list(task.decoder.layers)
    assert not any("forward" in vars(layer) for layer in task.decoder.layers)
    assert "compile" not in checked().task


def test_resumed_run_compiles_if_the_one_before_did(fit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ``auto`` chose depends on the first batch, which a resumed run does not see."""
    monkeypatch.setattr("blockwright.training.entry.preflight.check_compiler", lambda accelerator: None)
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiled.append("layer") or f)
    for stored in (True, False):
        checkpoint = tmp_path / f"{stored}.ckpt"
        monkeypatch.setattr(Compiling, "decide", lambda self, *_, stored=stored: stored)
        fit("trainer.compile=auto", "trainer.max_steps=1").save_checkpoint(checkpoint)
        compiled.clear()
        fit("trainer.compile=auto", "trainer.max_steps=2", ckpt_path=checkpoint)
        assert bool(compiled) == stored


WAITING = {  # preset, tokens of a micro-batch, layers → the H100 waits
    ("gpt2", 4096): True,
    ("deepseek_7b", 2048): False,
    ("deepseek_v2_lite", 8192): False,
}


@pytest.mark.parametrize(("preset", "tokens"), WAITING)
def test_a_gpu_waits_for_the_host_in_small_models(preset: str, tokens: int) -> None:
    decoder = compose(presets.read(preset), device="meta")
    waited = seconds_waited(decoder, tokens, 1024, (9, 0))
    assert (waited > 0) == WAITING[preset, tokens]
    assert seconds_waited(decoder, 100 * tokens, 1024, (9, 0)) == 0
    assert seconds_waited(decoder, tokens, 1024, (8, 0)) <= waited < 0.1


@pytest.mark.parametrize(
    ("steps", "asked", "compiles"), [(10**6, "auto", True), (9, "auto", False), (10**6, False, False)]
)
def test_layers_are_compiled_by_themselves_where_a_gpu_would_wait_longer(
    steps: int, asked: Any, compiles: bool, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: f)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    decoder = compose(tiny())
    trainer = L.Trainer(max_steps=steps, logger=False, accelerator="cpu")
    compiling = Compiling(decoder, asked)
    compiling.decide(trainer, torch.Size([2, 64]), torch.device("cuda"))
    assert all(("forward" in vars(layer)) == compiles for layer in decoder.layers)
    compiling.end()
    assert not any("forward" in vars(layer) for layer in decoder.layers)


def test_missing_compiler_for_a_cpu_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.compile.*C\+\+ compiler"):
        check_compiler("cpu")
    check_compiler("gpu")


# Blocks whose first layer, or first and last, computes otherwise than the others; all others make one graph.
KINDS = {"attention/rwkv7": 2, "residual/attention_residual": 3, "residual/hyper_connections": 3, "residual/mhc": 3}
KINDS |= {
    "residual/gated_streams": 3,
    "residual/normed_embeddings": 3,
    "residual/read_ahead": 3,
    "attention/depth": 3,
}  # its queries see the values of 1, 2, more layers
GRAPHS = [f"{kind}/{name}" for kind in ("attention", "residual") for name in registry.names(kind)]
QUICK = ("attention/lightning", "residual/prenorm")


@pytest.mark.parametrize("block", [pytest.param(b, marks=[pytest.mark.slow] * (b not in QUICK)) for b in GRAPHS])
def test_layers_that_compute_alike_share_a_graph(fresh: None, block: str) -> None:
    counted = CompileCounter()
    decoder = compose(Setting(*block.split("/")).model(n_layers=4))
    compile_layers(decoder, backend=counted, fullgraph=True)  # type: ignore[arg-type]
    for _ in range(2):
        decoder.hidden(torch.zeros(1, 12, dtype=torch.long))[0].sum().backward()  # one row: its strides are odd
    assert counted.frame_count == KINDS.get(block, 1)


def test_more_lengths_make_no_more_graphs_where_no_loop_depends_on_them(fresh: None) -> None:
    counted = CompileCounter()
    decoder = compose(Setting("attention", "gqa").model(n_layers=2))
    compile_layers(decoder, backend=counted, fullgraph=True)  # type: ignore[arg-type]
    for length in (16, 17, 24, 20, 19):  # none at which another kernel takes over
        decoder.hidden(torch.zeros(2, length, dtype=torch.long))
    assert counted.frame_count == 2  # for the first length, and for any

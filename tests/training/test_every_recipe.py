"""Every optimizer that can be chosen, with and without every constraint, on every kind of weight that a model has."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from pairwise import each
from torch import Tensor, nn

from blockwright.blocks.compose import compose
from blockwright.blocks.initialise import weights
from blockwright.blocks.linear import adaptable, attach
from blockwright.training.callbacks.guard import Guard
from blockwright.training.configuration import conf
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.collectives import clip, total_norm
from blockwright.training.schedulers import Schedule

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = [None, *conf.options("optimizer/constraint")]
CHOICES = [*each(conf.options("optimizer"), CONSTRAINTS), ("muon", CONSTRAINTS[-1])]
# Filters, weights of streams, a table with sparse gradients, stacks of experts, and matrices that begin at 0.
MODEL = """
vocab_size: 40
d_model: 16
n_layers: 1
attention: {name: gated_delta, n_heads: 2}
position: none
ffn: {name: moe, n_experts: 3}
gating: softmax_topk
experts: {name: swiglu, d_ff: 8}
norm: rmsnorm
residual: hyper_connections
memory: {name: engram, rows: 41, n_heads: 2, width: 8}
"""


def recipe(name: str, held: str | None) -> OptimizerRecipe:
    composed = conf.composed([f"optimizer={name}", *([] if held is None else [f"optimizer/constraint={held}"])])
    node: Any = OmegaConf.to_container(composed.optimizer)
    return instantiate({**node, "lr": 0.01}, "optimizer")


@functools.cache
def made() -> nn.Module:
    module = compose(MODEL, seed=0)
    attach(module, [name for name in adaptable(module) if "attention" in name], rank=2, scale=2.0)
    for name, parameter in module.named_parameters():
        if name.endswith("_lora_a"):
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("_lora_b"):
            nn.init.zeros_(parameter)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def decoder() -> nn.Module:
    return copy.deepcopy(made())


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if torch.equal(value, other[name])}


@pytest.mark.parametrize(("choice", "algorithm"), each(CHOICES, ["norm", "value"]), ids=str)
def test_every_weight_moves_and_a_step_without_gradients_moves_none(
    choice: tuple[str, str | None], algorithm: str
) -> None:
    module = decoder()
    optimizer = recipe(*choice).build(module)
    begun, draw = values(module), torch.Generator().manual_seed(0)
    for step in range(4):
        before = values(module)
        for parameter in module.parameters():
            parameter.grad = None if step in (0, 2) else torch.randn(parameter.shape, generator=draw)
        norm = total_norm(module.parameters())
        clip(module.parameters(), 1.0, algorithm)
        optimizer.step()
        if step in (0, 2):  # as after a step that the guard skips: at the beginning, and among others
            assert norm == 0 and same(before, values(module)) == begun.keys()
    moved = values(module)
    assert not same(begun, moved)
    assert all(value.isfinite().all() for value in moved.values())


@pytest.mark.parametrize(("name", "held"), CHOICES[::2])
def test_what_is_no_matrix_is_stepped_number_by_number(name: str, held: str | None) -> None:
    """Gradients whose entries differ in size by a factor of a hundred move all entries as far, as Adam's first step
    does; a direction that is made of the whole, or a length that is kept, would not."""
    module = decoder()
    optimizer = recipe(name, held).build(module)
    for parameter in module.parameters():
        sizes = torch.logspace(-1, 1, parameter.numel())
        sizes[::3] *= -1
        parameter.grad = sizes.view(parameter.shape)
    before = values(module)
    optimizer.step()
    after, kinds = values(module), set()
    for weight in weights(module):
        streams = weight.names[0].endswith(".static")  # declared below, not by what its kind says
        if weight.kind != "matrix" or streams or "conv" in weight.names[0]:
            kinds.add(weight.kind)
            old, new = (each[weight.names[0]] for each in (before, after))
            moved = new - old * (1 - 0.01 * 0.1 * (weight.decays and not streams))
            torch.testing.assert_close(moved.abs(), torch.full_like(new, 0.01), rtol=1e-3, atol=1e-6)
    assert kinds == {"vector", "filter", "table"}


CLASSES: dict[str, type] = {"optimizer": OptimizerRecipe, "scheduler": Schedule}
# Group and name of each option that is a class, others being variants of one.
NODES = [(g, n) for g in CLASSES for n in conf.options(g) if "_target_:" in (conf.CONF / g / f"{n}.yaml").read_text()]


@pytest.mark.parametrize(("group", "name"), NODES)
def test_both_doors_make_what_the_yaml_says_which_names_every_parameter(group: str, name: str) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(conf.CONF / group / f"{name}.yaml"))
    if group == "optimizer":
        assert node.pop("defaults") == ["_self_", {"constraint": None}]  # optimizer/constraint=NAME sets it
    by_hydra, target = hydra.utils.instantiate(node), node.pop("_target_")
    parser = ArgumentParser()
    parser.add_argument(f"--{group}", type=CLASSES[group])
    by_cli = parser.instantiate_classes(parser.parse_object({group: {"class_path": target, "init_args": node}}))[group]
    assert target == f"{type(by_hydra).__module__}.{type(by_hydra).__name__}"
    assert type(by_hydra) is type(by_cli) and vars(by_hydra) == vars(by_cli)
    parameters = inspect.signature(type(by_hydra)).parameters
    if group == "scheduler":
        assert list(node) == list(parameters)
    else:
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in node.items()}
        assert plain == {key: p.default for key, p in parameters.items()}


def test_making_a_recipe_and_a_schedule_imports_no_torch() -> None:
    nodes = [OmegaConf.load(conf.CONF / group / f"{name}.yaml") for group, name in NODES]
    targets = [str(node["_target_"]) for node in nodes]
    assert len(targets) > 7
    make = "module, _, name = t.rpartition('.'); getattr(importlib.import_module(module), name)()"
    program = f"import importlib, sys\nfor t in {targets}: {make}\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


class Bad(L.Callback):
    """Gradients that are not finite in the first step and in a later one."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step in (0, 2):
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(float("nan"))


@pytest.mark.slow
def test_run_survives_steps_that_are_skipped(fit: Callable[..., Any]) -> None:
    clipped = ("+trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1.0")
    settings = ("trainer.precision=bf16-true", "optimizer/constraint=hyperball", *clipped)
    guard = Guard()
    trainer = fit(*settings, "trainer.max_steps=4", callbacks=[Bad(), guard])
    assert (trainer.global_step, guard.skipped) == (4, 2)
    assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())

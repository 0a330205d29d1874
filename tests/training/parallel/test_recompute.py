"""What is decided by scores is decided once: where activations are recomputed, the second pass finds the choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.conformance.setting import Setting, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating import base
from blockwright.blocks.gating.softmax import SoftmaxTopK
from blockwright.training.parallel.recompute import recompute

HOW = ("full", "selective")
DECIDING = [
    (kind, name)
    for kind in registry.kinds()
    for name in registry.names(kind)
    if issubclass(cls := registry.lookup(kind, name).cls, Block) and cls.decides is not None
]
# What decoders do with gates beside calling each once on all tokens.
AROUND: dict[str, dict[str, Any]] = {
    "visited twice": {"loop": {"name": "repeat", "visits": 2, "entry": "add"}},
    "predicting more tokens": {"mtp": {"depth": 1, "loss_weight": 0.3}},
    "dropping": {"ffn": {"name": "moe", "n_experts": 8, "dropping": {"name": "device_budget", "n_devices": 4}}},
    "noisy": {
        "gating": {"name": "noisy", "top_k": 2},
        "ffn": {"name": "moe", "dropping": {"name": "device_budget", "n_devices": 4}},
    },
    "one expert": {"ffn": {"name": "moe", "n_experts": 1}, "gating": {"name": "softmax_topk", "top_k": 1}},
    "all experts": {"ffn": {"name": "moe", "n_experts": 8}, "gating": {"name": "softmax_topk", "top_k": 8}},
}


class Calls:
    """Counts what blocks decide, and shakes the scores of gates once ``shaken``."""

    def __init__(self, decoder: Decoder) -> None:
        self.made, self.shaken = 0, False
        for block in decoder.modules():
            if isinstance(block, Block) and block.decides is not None:
                setattr(block, block.decides, self._counted(getattr(block, block.decides)))

    def _counted(self, decide: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.made += 1
            return decide(*given, **named)

        return counted

    @contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        scores, draw = base.full_linear, torch.Generator().manual_seed(1)  # of its own: the others stay

        def shaky(*given: Any) -> Tensor:
            found = scores(*given)
            return found + torch.randn(found.shape, generator=draw) if self.shaken else found

        with monkeypatch.context() as patch:
            patch.setattr(base, "full_linear", shaky)
            yield


def gradients(decoder: Decoder, between: Callable[[], None] = lambda: None) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    ids, segments = tokens(2, 9), torch.zeros(2, 9, dtype=torch.int64)
    segments[1, 7:] = -1
    hidden, routings = decoder.hidden(ids, segments=segments)
    losses = [decoder.nll(hidden, ids.roll(-1, 1)) / ids.numel()]
    if len(decoder.mtp):
        more, further = decoder.mtp_nll(hidden, ids, ids.roll(-1, 1))
        losses, routings = [*losses, *(nll.sum() / ids.numel() for nll, _ in more)], [*routings, *further]
    losses += [loss for routing in routings if routing is not None for loss in routing.losses.values()]
    between()
    decoder.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


def agree(decoder: Decoder, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those without recomputation, bit for bit, whatever a second pass would have scored."""
    other = copy.deepcopy(decoder)
    plain, again = Calls(decoder), Calls(other)
    recompute(other, how)
    expected = gradients(decoder)
    with again.watched(monkeypatch):
        found = gradients(other, lambda: setattr(again, "shaken", True))
    assert again.made == plain.made > 0
    for name, gradient in expected.items():
        assert gradient is found[name] is None or torch.equal(gradient, found[name]), name


@pytest.mark.parametrize(("block", "how"), each(DECIDING, HOW), ids=str)
def test_every_block_that_decides_does_so_once(block, how, monkeypatch):
    kind, name = block
    agree(Setting(kind, name, brief=True).decoder().train(), how, monkeypatch)


@pytest.mark.parametrize(("around", "how"), each(list(AROUND), HOW))
def test_experts_are_chosen_once_wherever_a_gate_is(around, how, monkeypatch, temporary_blocks):
    @registry.register("gating", "noisy")
    class Noisy(SoftmaxTopK):
        """Draws before the tokens to keep are drawn."""

        def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            return super().choose(logits + torch.randn_like(logits), experts)

    model = {**Setting("gating", "softmax_topk").model(), **AROUND[around]}
    agree(compose(model, seed=0).train(), how, monkeypatch)


def test_gate_of_another_kind_is_not_called_again(monkeypatch: pytest.MonkeyPatch, temporary_blocks: None) -> None:
    @registry.register("gating", "of_its_own")
    class Own(base.Gating):
        """No linear gate: what it computes is kept as a whole."""

        def __init__(self, d_model: int, n_experts: int, top_k: int = 2) -> None:
            super().__init__(n_experts, top_k)
            self.router = nn.Linear(d_model, n_experts)

        def forward(self, x, tokens=None, experts=None, real=None):
            probs = self.router(x.flatten(0, -2)).tanh().softmax(-1)
            weights, chosen = probs.topk(self.top_k)
            return base.routed(chosen, weights, probs, real)

    for how in HOW:
        model = {**Setting("gating", "softmax_topk").model(), "gating": "of_its_own"}
        agree(compose(model, seed=0).train(), how, monkeypatch)


def test_pass_that_is_differentiated_twice_finds_its_choices_twice() -> None:
    decoder = Setting("gating", "sigmoid_bias").decoder().train()
    recompute(decoder, "full")
    loss = decoder.hidden(tokens(2, 9))[0].square().sum()
    decoder.hidden(tokens(2, 5, seed=1))  # another pass between, without a gradient in the end
    with torch.no_grad():
        decoder.hidden(tokens(1, 4))
    used = [p for p in decoder.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, used, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, used, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("block", "how"), each([pair for pair in DECIDING if pair[0] == "gating"][::2], HOW), ids=str)
def test_compiled_layers_keep_what_was_chosen(block: tuple[str, str], how: Any) -> None:
    kind, name = block
    from torch._dynamo.backends.common import aot_autograd

    from blockwright.training.compiling import compile_layers

    sorts: list[int] = []

    def counted(graph: Any, inputs: Any) -> Any:
        sorts.append(sum(node.target in (torch.ops.aten.topk.default,) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    decoder = Setting(kind, name).decoder().train()
    recompute(other := copy.deepcopy(decoder), how)
    backend: Any = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=counted)
    compile_layers(other, backend=backend, fullgraph=True)
    expected, found = gradients(decoder), gradients(other)
    for parameter, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5)
    assert sorts and not any(sorts)

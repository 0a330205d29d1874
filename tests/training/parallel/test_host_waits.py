"""Under expert parallelism the host waits for the device once a layer of experts and pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from many_ranks import MOE, read_model, spawn

WAITS = ("tolist", "item", "nonzero", "__int__", "__bool__", "__index__", "__float__", "cpu", "numpy")


def count_waits() -> list[Counter[str]]:
    """Calls that would make the host wait if the tensors were a GPU's, of one forward and backward pass."""
    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    called: Counter[str] = Counter()
    found = []
    for sizes in ({"shard": 2, "expert": 2}, {"shard": 1, "tensor": 2}):
        model = read_model(MOE.replace("n_layers: 2", "n_layers: 1"))
        decoder = build(model, 0, Sharding(make_meshes(Sizes(**sizes), "cpu")))
        decoder.choose_kernels({"experts": "grouped"})  # a GPU's
        tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # the first pass sets FSDP2 up
            called.clear()
            with pytest.MonkeyPatch.context() as patch:
                for name in WAITS:
                    patch.setattr(torch.Tensor, name, _counted(name, called))
                hidden, _ = decoder.hidden(tokens)
                hidden.square().sum().backward()
        found.append(Counter(called))
    return found


def _counted(name: str, called: Counter[str]) -> Any:
    inner = getattr(torch.Tensor, name)

    def call(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        called[name] += 1
        return inner(self, *arguments, **options)

    return call


@pytest.mark.slow
def test_a_layer_of_experts_waits_once() -> None:
    for over_experts, over_tensor in spawn(2, count_waits):
        assert sum(over_experts.values()) <= 1, over_experts
        assert sum(over_tensor.values()) <= 1, over_tensor

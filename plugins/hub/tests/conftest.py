"""Tiny random checkpoints as ``transformers`` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import RELEASED, V, as_released, build
from torch import Tensor, nn

ONE_LESS = ("Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")


@pytest.fixture(scope="session")
def foreign(randomise: Callable[..., None]) -> Callable[..., nn.Module]:
    """transformers' model of a case, every weight random, biases of gates too."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = build(name, dtype)
        recurrent = any(hasattr(module, "conv1d") for module in model.modules())
        randomise(model, scale=0.5 if recurrent else 1.0)  # a state of many tokens magnifies rounding
        for module in model.modules():
            if type(module).__name__ in ONE_LESS:
                module.weight.data -= 1  # type: ignore[operator] # gains are stored minus one
            if type(module).__name__ == "Gemma4TextAttention":
                module.q_norm.weight.data *= module.head_dim**-0.5  # type: ignore[operator,union-attr] # as trained ones
            if type(module).__name__ == "OlmoHybridRMSNormGated":
                module.weight.data *= 0.2  # type: ignore[operator] # its eps is fixed, and small
        generator = torch.Generator().manual_seed(5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def checkpoint(foreign: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that ``save_pretrained`` leaves of a case."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint")
        foreign(name, dtype).save_pretrained(folder, **options)  # type: ignore[operator]
        if name.split()[0] in RELEASED:
            as_released(folder, RELEASED[name.split()[0]])
        return folder

    return save


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(0, V, (2, 63), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wrapped(tiny: Callable[..., dict[str, Any]], randomise: Callable[..., None]) -> Callable[..., Any]:
    """A small composition as a model of transformers, in double precision, every parameter random."""

    def make(moe: bool = True, **changes: Any) -> Any:
        from blockwright.plugins.hub.transformers import BlockwrightConfig, BlockwrightForCausalLM

        model = BlockwrightForCausalLM(BlockwrightConfig(tiny(moe=moe, **changes), eos_token_id=None, pad_token_id=0))
        randomise(model.decoder, scale=2.0)
        return model.double().eval()

    return make

"""Released formats in and out: the same logits, the same bits."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, as_loaded
from safetensors.torch import load_file
from torch import Tensor, nn

from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder

# One worker of xdist takes all of a case: its model and its import are made once.
EVERY = [pytest.param(name, marks=pytest.mark.xdist_group(f"parity {name}")) for name in CASES]
QUICK = ("llama yarn", "gpt2", "gpt_oss", "gemma4_text experts", "qwen3_5_text", "kimi_linear", "inkling_text")
QUICK += ("longcat_flash", "nemotron_h latent", "deepseek_v2 q_lora yarn", "deepseek_v4")
QUICK_OR_SLOW = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def both(
    foreign: Callable[..., nn.Module], checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[nn.Module, Path]]:
    """transformers' model of a case, and the folder that its import leaves, which tests only read."""

    @functools.lru_cache(maxsize=2)
    def make(name: str) -> tuple[nn.Module, Path]:
        out = tmp_path_factory.mktemp("imported") / "out"
        import_folder(checkpoint(name), out)
        return foreign(name), out

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_imported_logits_equal_transformers_in_single_precision(
    name: str, both: Callable[[str], tuple[nn.Module, Path]], tokens: Tensor
) -> None:
    theirs, out = both(name)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    # Torch's norm adds up in the order of transformers; the fused one does not, and is compared in double precision.
    decoder = load(out).choose_kernels({"rms_norm": "torch"})
    bound = 1e-5 * max(1.0, expected.abs().max().item())  # which library multiplies depends on the machine
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=bound)
    exact = load(out, dtype=torch.float64)(tokens).float()
    torch.testing.assert_close(decoder.choose_kernels()(tokens), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("name", QUICK_OR_SLOW)
@torch.no_grad()
def test_imported_logits_equal_transformers_in_double_precision(
    name: str,
    foreign: Callable[..., nn.Module],
    checkpoint: Callable[..., Path],
    tokens: Tensor,
    in_double: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import_folder(checkpoint(name, torch.float64), tmp_path / "out")
    decoder, theirs = load(tmp_path / "out", dtype=torch.float64), foreign(name, torch.float64)
    in_double(theirs, decoder, monkeypatch)
    torch.testing.assert_close(decoder(tokens), theirs(tokens).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["qwen3_5_text", pytest.param("glm_moe_dsa reused", marks=pytest.mark.slow), "longcat_flash"]
)
def test_gradients_equal_transformers_in_double_precision(
    name: str,
    foreign: Callable[..., nn.Module],
    checkpoint: Callable[..., Path],
    tokens: Tensor,
    in_double: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of the embedding, which all layers have a part in."""
    import_folder(checkpoint(name, torch.float64), tmp_path / "out")
    decoder, theirs = load(tmp_path / "out", dtype=torch.float64), foreign(name, torch.float64)
    in_double(theirs, decoder, monkeypatch)
    embeddings = decoder.embedding.weight, theirs.get_input_embeddings().weight  # type: ignore[operator]
    weights = torch.linspace(-1, 1, tokens.numel() * len(embeddings[0])).double().view(*tokens.shape, -1)
    for logits in (decoder(tokens), theirs(tokens).logits):
        (logits * weights).mean().backward()
    found, expected = (embedding.grad for embedding in embeddings)
    assert found is not None and expected is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_decoding_with_a_cache_equals_transformers_with_its_own(
    name: str, both: Callable[[str], tuple[nn.Module, Path]], tokens: Tensor
) -> None:
    theirs, out = both(name)
    decoder = load(out)
    exact = load(out, dtype=torch.float64)(tokens)  # which is theirs to 1e-10, as the test above shows
    caches, cache = decoder.new_caches(2, 30), None
    for start, end in ((0, 11), *((t, t + 1) for t in range(11, 30))):
        found = theirs(tokens[:, start:end], cache=cache, use_cache=True)
        cache = found.past_key_values
        ours = decoder(tokens[:, start:end], caches=caches)
        bound = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact[:, start:end], rtol=0, atol=bound, msg=f"token {start}")
        # Each rounds in its own way: from one another they may be twice as far as from what is exact.
        torch.testing.assert_close(ours, found.logits, rtol=0, atol=2 * bound, msg=f"token {start}")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_exported_folder_gives_transformers_the_same_logits(
    name: str, both: Callable[[str], tuple[nn.Module, Path]], tokens: Tensor, tmp_path: Path
) -> None:
    theirs, out = both(name)
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "origin.json").unlink()  # by the composition alone
    export_folder(tmp_path / "out", tmp_path / "hf", max_bytes=50_000)
    as_loaded(tmp_path / "hf", theirs.config)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for parameter in again.parameters():
        parameter.data = parameter.data.clone()  # products of memory that is not aligned may round otherwise
    found, expected = again.eval()(tokens).logits, theirs(tokens).logits
    if type(again) is type(theirs):
        assert torch.equal(found, expected)
    else:  # the same model of another class, whose products round otherwise
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_what_is_imported_and_exported_is_the_same_to_the_bit(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In bf16, of which fp32 would be a cast; the test above compares the logits of fp32 bitwise."""
    source = checkpoint(name, torch.bfloat16, max_shard_size="60KB")
    import_folder(source, tmp_path / "out", max_bytes=40_000)
    written, _ = export_folder(tmp_path / "out", tmp_path / "hf", max_bytes=50_000)
    before, after = everything(source), everything(tmp_path / "hf")
    assert written == name.split()[0]
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key


def everything(folder: Path) -> dict[str, Any]:
    """All tensors of a folder."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}

"""The tiny models of these tests, as ``transformers`` describes them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockwright.plugins.hub.names import Row, links

V, D, LAYERS = 97, 42, 4
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "max_position_embeddings": 128, **IDS}
# Index heads are so many that no score is 0, where ties are broken otherwise; the eps of layers with a state is large,
# since the norm of a nearly empty state would magnify its rounding. "one group": the language model of DeepSeek-VL2.
FOREIGN = yaml.safe_load((Path(__file__).parent / "foreign.yaml").read_text())
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (kind, given) for name, (kind, given) in FOREIGN["cases"].items()}
SLOW, MIXTURE, ROPE = FOREIGN["values"]["slow"], FOREIGN["bases"]["mixture"], FOREIGN["bases"]["rope"]
CONFIGS = {"Inkling": "InklingTextConfig"}  # where the class is not named after the head


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a case as transformers makes it, its weights not yet random."""
    architecture, settings = CASES[name]
    sizes = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, CONFIGS.get(architecture, f"{architecture}Config"))(
        **copy.deepcopy({**sizes, **settings})
    )  # it writes into them
    config._experts_implementation = "eager"  # the others refuse doubles
    head = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, head)(config).to(dtype).eval()


@torch.no_grad()
def filled(decoder: nn.Module, table: Sequence[Row], theirs: nn.Module) -> set[str]:
    """Copy their weights into a decoder with its own head; returns the names of those that no row reads."""
    weights, own, used = theirs.state_dict(), decoder.state_dict(), set()
    if not any(row.ours == "head.weight" for row in table):
        own.pop("head.weight", None)
    for link in links(table, own, len(decoder.layers)):  # type: ignore[arg-type]
        if link.theirs:
            link.part(own[link.ours]).copy_(link.row.form.view(weights[link.theirs]))
            used.add(link.theirs)
    return set(weights) - used


# ---- where transformers saves other names than those of the released files, which it reads ---------------------------


def _olmo_hybrid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        if layer + "post_feedforward_layernorm.weight" in tensors:
            found[layer + "post_attention_layernorm.weight"] = found.pop(layer + "feedforward_layer_norm.weight")
            continue
        widths = [len(tensors[f"{layer}linear_attn.{x}_proj.weight"]) for x in "qkv"]
        names = [f"{layer}linear_attn.{x}_conv1d.weight" for x in "qkv"]
        whole = torch.cat([tensors[name] for name in names])
        found |= dict(zip(names, (part.clone() for part in whole.split(widths)), strict=True))
    return found


def _kimi_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dense = re.compile(r"block_sparse_moe\.(gate|up|down)_proj")
    return {dense.sub(r"mlp.\1_proj", name): tensor for name, tensor in tensors.items()}


def _longcat_flash(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rows of experts that have no parameters."""
    idle = re.compile(r"mlp\.experts\.[567]\.")
    return {name: tensor for name, tensor in tensors.items() if not idle.search(name)}


RELEASED = {"olmo_hybrid": _olmo_hybrid, "kimi_linear": _kimi_linear, "longcat_flash": _longcat_flash}


def as_loaded(folder: Path, config: Any) -> None:
    """Add to a folder what transformers 5.24 wants to load and does not read: rows of experts without parameters."""
    if not (idle := getattr(config, "zero_expert_num", 0)):
        return
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    first = config.n_routed_experts
    for name in [name for name in tensors if re.search(r"mlp\.experts\.0\.(gate|up)_proj", name)]:
        tensors |= {
            name.replace("experts.0.", f"experts.{first + n}."): torch.zeros_like(tensors[name]) for n in range(idle)
        }
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_released(folder: Path, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a folder in the names of the released files."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    save_file(rename(tensors), folder / "model.safetensors", metadata={"format": "pt"})

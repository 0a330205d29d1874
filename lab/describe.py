"""``blockwright describe model=A,B,… [OVERRIDE …]``: what models cost: parameters, FLOPs, cache, memory.

Everything is measured on the meta device (blocks/cost.py), plug-in blocks included; nothing is allocated.
Left out: activations, optimizer states other than AdamW's, the memory of communication.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blockwright.blocks.cost import (
    cache_bytes,
    count_parameters,
    deepseek_moe_flops,
    ffn_ratio,
    flops_per_token,
    forward_flops_per_token,
    growth_beyond_windows,
    in_order,
    input_flops,
)
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.input import Input
from blockwright.blocks.kernels import choice
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.kernels.products import Choice
from blockwright.blocks.kernels.timing import AUTO, allowed, kept, matrices, processor
from blockwright.blocks.on_gpu import CARDS, attention_kernels, every
from blockwright.lab import card
from blockwright.lab.card import RECIPES, SETTINGS, Options, Request, flat, read
from blockwright.lab.models import load
from blockwright.lab.report import single
from blockwright.lab.report.svg import standalone
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.command import run_command, strict_json
from blockwright.registry.folder import write_text

USAGE = """\
blockwright describe model=NAME[,NAME…] [OPTION=VALUE …] [HYDRA OVERRIDE …] [--json] [--plot FILE.svg]

model              presets, runs (logs/…), checkpoints (*.ckpt) or compositions (*.yaml), side by side
context            tokens of the sequence that FLOPs are counted for; default 4096, or fewer if a model must
cache.context      tokens that the cache is counted for; default: context
cache.bits         bits that one number of the cache takes; default 16
training.recipe    mixed (bf16 weights and gradients, fp32 master weights and AdamW moments), fp32 or bf16
gpus               ways that the training state is sharded; default 8
against            the model the others are compared with; default: the last

An option takes one value for all models or one for each: cache.bits=6,16. Any other KEY=VALUE is an override as
blockwright train takes it, and holds for every model: model/attention=gqa, model.n_layers=4.
--json prints one document of plain numbers; --plot draws parameters by family, and cache over context.
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
USUAL = 4096  # default sequence length in tokens: that of most presets' training


def figures(decoder: Decoder, options: Options) -> dict[str, Any]:
    """All figures of the card of one model, as plain numbers; ``null`` where there is nothing to measure.

    Args:
        decoder: on the meta device
        options: contexts, precisions and sharding
    """
    config, counted = decoder.config, count_parameters(decoder)
    context = options.context or usual_context([decoder])
    ratio, (forward, training) = ffn_ratio(decoder, counted), flops_per_token(decoder, context)
    L, D, V = (config[name] for name in ("n_layers", "d_model", "vocab_size"))
    # The kernels chosen on this machine, and those of attention on GPUs that need not be here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    products = _products(decoder) if device.type == "cpu" else None
    found = {"device": device.type, **choice.names(choice.choose(device)), "products": products}
    kernels = {**found, "attention_on": _forecast(decoder)}
    return {
        "shape": {"n_layers": L, "d_model": D, "vocab_size": V},
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "tables": counted.tables,
            "active_without_embedding": counted.active - counted.embedding,
            "active_without_embedding_and_head": counted.active - counted.embedding - counted.head,
            "families": dict(counted.families),
        },
        "flops": {
            "context": context,
            "forward_per_token": forward,
            "training_per_token": training,
            "ffn_ratio": ratio,
            "deepseek_moe_formula": deepseek_moe_flops(len(decoder.order()), D, V, ratio, context),
        },
        "cache": _cache(decoder, options.cache_context or context, options.cache_bits),
        "inputs": {kind: _input(decoder, block) for kind, block in decoder.inputs.items()},
        "kernels": kernels,
        "weights": {
            "bytes": {name: counted.total * dtype.itemsize for name, dtype in DTYPES.items()},
            "table_bytes": {name: counted.tables * dtype.itemsize for name, dtype in DTYPES.items()},
        },
        "training": _training(counted.total, options),
    }


def usual_context(decoders: Sequence[Decoder]) -> int:
    """A length in tokens that all of them support: 4096, or the least ``max_positions`` if that is less."""
    return min(USUAL, *(decoder.config["max_positions"] for decoder in decoders))


def _cache(decoder: Decoder, context: int, bits: float) -> dict[str, Any]:
    """Growth per token, at first and beyond windows, the constant part, and the total at a context."""
    try:
        numbers = [cache_bytes(decoder, length, torch.float32) // 4 for length in (1, 2, context)]
    except NotImplementedError:  # a plug-in's attention may have no cache
        names = ("elements_per_token", "elements_beyond_windows", "elements_constant", "elements_at_context")
        weighed = {name: dict.fromkeys((*DTYPES, "at_bits")) for name in ("bytes_per_token", "bytes_at_context")}
        return {"bits": bits, "context": context, **dict.fromkeys(names), **weighed}
    one, two, all_of_it = numbers
    stored = _stored(decoder, context, bits)
    sizes = {name: [cache_bytes(decoder, n, dtype) for n in (1, 2, context)] for name, dtype in DTYPES.items()}
    return {
        "bits": bits,
        "context": context,
        "elements_per_token": two - one,
        "elements_beyond_windows": growth_beyond_windows(decoder),
        "elements_constant": 2 * one - two,
        "elements_at_context": all_of_it,
        "bytes_per_token": {
            **{k: s[1] - s[0] for k, s in sizes.items()},
            "at_bits": (two - one) * bits / 8,
            **({"stored": stored[1] - stored[0]} if stored else {}),
        },
        "bytes_at_context": {
            **{k: s[2] for k, s in sizes.items()},
            "at_bits": all_of_it * bits / 8,
            **({"stored": stored[2]} if stored else {}),
        },
    }


def _input(decoder: Decoder, block: Input) -> dict[str, Any]:
    """The cost of each example of an input: its tokens, embedding them, reading them, and their cache."""
    return {
        name: {**numbers, "tokens": block.count(content), "embedding_flops": input_flops(block, content)}
        | _reading(decoder, block.count(content))
        for name, (content, numbers) in block.cost_examples().items()
    }


def _reading(decoder: Decoder, tokens: int) -> dict[str, float | None]:
    try:
        held = cache_bytes(decoder, tokens, torch.bfloat16)
    except NotImplementedError:  # a plug-in's attention may have no cache
        held = None
    return {"reading_flops": tokens * forward_flops_per_token(decoder, tokens), "cache_bytes": held}


def _products(decoder: Decoder) -> dict[str, Any]:
    """How commands multiply fp32 matrices of this model on this CPU, and what they have measured."""
    found = kept(of) if allowed() == AUTO and (of := matrices(decoder)) else Choice()
    threads = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if found is None:
        return {"chosen": f"when a command first computes with it: {threads}"}
    return {"chosen": f"as measured: {threads}" if found.found else "torch, not measured", **found.shown()}


def _forecast(decoder: Decoder) -> dict[str, Any]:
    try:
        found = attention_kernels(decoder)
    except Exception:  # a plug-in's block may compute only where there are numbers, or keep no cache
        return dict.fromkeys(CARDS)
    return {
        card: {**{kind: ", ".join(names) for kind, names in passes.items()}, "all": ", ".join(every(passes)) or None}
        for card, passes in found.items()
    }


def _stored(decoder: Decoder, context: int, bits: float) -> list[int] | None:
    """Bytes of quantised caches of 1, 2 and ``context`` tokens, scales included; None if unsupported."""
    try:
        return [cache_bytes(decoder, n, torch.float32, int(bits)) for n in (1, 2, context)] if bits in BITS else None
    except BlockError:  # a plug-in's attention may not quantise
        return None


def _training(parameters: int, options: Options) -> dict[str, Any]:
    recipe = RECIPES[options.recipe]
    total = parameters * sum(recipe.values())
    return {
        "recipe": options.recipe,
        "bytes_per_parameter": sum(recipe.values()),
        "bytes": {**{part: parameters * size for part, size in recipe.items()}, "total": total},
        "gpus": options.gpus,
        "bytes_per_gpu": -(-total // options.gpus),
    }


def changes(figures: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Dotted key → relative difference to the reference's figure: −0.9334 is 93.34 % less.

    Settings, and figures without a counterpart, are left out.
    """
    ours, theirs = flat(figures), flat(reference)
    numbers = [key for key in ours if _is_number(ours[key]) and _is_number(theirs.get(key)) and key not in SETTINGS]
    compared = [key for key in numbers if theirs[key] != 0]
    return {key: ours[key] / theirs[key] - 1 for key in compared}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def document(request: Request, decoders: Sequence[Decoder]) -> dict[str, Any]:
    """The ``--json`` document: ``models`` in the order given, ``against``, ``changes``."""
    usual = usual_context(decoders)
    options = [replace(o, context=o.context or usual) for o in request.options]
    measured = [figures(d, o) for d, o in zip(decoders, options, strict=True)]
    # Give all models the families of each, so that they can be compared
    every = in_order(family for found in measured for family in found["parameters"]["families"])
    for found in measured:
        counts = found["parameters"]["families"]
        found["parameters"]["families"] = {family: counts.get(family, 0) for family in every}
    models = [{"model": name, **found} for name, found in zip(request.models, measured, strict=True)]
    compared = [
        {"model": name, "index": i, "change": changes(found, measured[request.against])}
        for i, (name, found) in enumerate(zip(request.models, measured, strict=True))
        if i != request.against
    ]
    return {"models": models, "against": request.models[request.against], "changes": compared}


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or a model
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    request = read(arguments)
    decoders = [load(name, request.overrides) for name in request.models]
    answer = document(request, decoders)
    if request.as_json:
        print(strict_json(answer))
    else:
        card.show(answer)
    if request.plot:
        _plot(answer, decoders, request.plot)


def _plot(answer: Mapping[str, Any], decoders: Sequence[Decoder], file: Path) -> None:
    charts = [single.families(answer["models"]), single.caches(answer["models"], decoders)]
    try:
        write_text(file, standalone(*(chart for chart in charts if chart)))
    except OSError as error:
        raise ConfigError("--plot", str(file), f"cannot be written ({error.strerror})", "Name another file") from None


if __name__ == "__main__":
    sys.exit(run_command(main))

"""``python -m lab.describe model=A,B,… [OVERRIDE …] [--json] [--plot FILE]``: what models cost, before any is built.

Everything is measured on the meta device (blocks/cost.py), so it is right for guests' blocks; nothing is allocated.
Left out: activations, optimizer states other than AdamW's, the memory of communication.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import registry
from blocks.checkpoint import read_checkpoint
from blocks.compose import compose
from blocks.cost import cache_bytes, count_parameters, deepseek_moe_flops, ffn_ratio, forward_flops_per_token
from blocks.decoder import Decoder
from blocks.kernels import choice
from blocks.kernels.quantise import BITS
from lab import card
from lab.card import SETTINGS, flat
from registry import REFUSED, BlockError, ConfigError, did_you_mean
from training.composition import compose_config

USAGE = """\
python -m lab.describe model=NAME[,NAME…] [OPTION=VALUE …] [HYDRA OVERRIDE …] [--json] [--plot FILE.png|.svg|.pdf]

model              presets of conf/model, runs (logs/…), checkpoints (*.ckpt) or compositions (*.yaml), side by side
context            tokens of the sequence that FLOPs are counted for; default 4096, or fewer if a model must
cache.context      tokens the cache is weighed at; default: context
cache.bits         bits that one number of the cache takes; default 16
training.recipe    mixed (bf16 weights and gradients, fp32 master weights and AdamW moments), fp32 or bf16
gpus               ways that the training state is sharded; default 8
against            the model the others are compared with; default: the last

An option takes one value for all models or one for each: cache.bits=6,16. Any other KEY=VALUE is an override as
train.py takes it, and holds for every model: model/attention=gqa, model.n_layers=4.
--json prints one document of plain numbers; --plot draws parameters by family, and cache over context.
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# What one parameter takes while AdamW trains it, in bytes.
RECIPES = {
    "mixed": {"weights": 2, "gradients": 2, "master_weights": 4, "moments": 8},
    "fp32": {"weights": 4, "gradients": 4, "master_weights": 0, "moments": 8},
    "bf16": {"weights": 2, "gradients": 2, "master_weights": 0, "moments": 4},
}
USUAL = 4096  # tokens of a sequence, unless said otherwise: what most of the presets were trained at
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Options:
    """What figures of one model are taken at.

    Args:
        context: T, tokens of the sequence that FLOPs are counted for; None is ``usual_context``'s
        cache_context: tokens that the cache is weighed at; None is ``context``
        cache_bits: bits of one number in the cache
        recipe: of ``RECIPES``
        gpus: ways that the training state is sharded
    """

    context: int | None = None
    cache_context: int | None = None
    cache_bits: float = 16.0
    recipe: str = "mixed"
    gpus: int = 8


@dataclass(frozen=True)
class Request:
    """A command line, read and checked."""

    models: list[str]
    options: list[Options]
    overrides: list[str]
    against: int
    as_json: bool
    plot: Path | None


# --- the figures ------------------------------------------------------------------------------------------------------


def figures(decoder: Decoder, options: Options) -> dict[str, Any]:
    """Everything the card says of one model, as plain numbers; ``null`` where there is nothing to measure.

    Args:
        decoder: on the meta device
        options: contexts, precisions and sharding
    """
    config, counted = decoder.config, count_parameters(decoder)
    context = options.context or usual_context([decoder])
    ratio, forward = ffn_ratio(decoder, counted), forward_flops_per_token(decoder, context)
    L, D, V = (config[name] for name in ("n_layers", "d_model", "vocab_size"))
    return {
        "shape": {"n_layers": L, "d_model": D, "vocab_size": V},
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "active_without_embedding": counted.active - counted.embedding,
            "active_without_embedding_and_head": counted.active - counted.embedding - counted.head,
            "families": dict(counted.families),
        },
        "flops": {
            "context": context,
            "forward_per_token": forward,
            "training_per_token": 3 * forward,
            "ffn_ratio": ratio,
            "deepseek_moe_formula": deepseek_moe_flops(L, D, V, ratio, context),
        },
        "cache": _cache(decoder, options.cache_context or context, options.cache_bits),
        "kernels": _kernels(),
        "weights": {"bytes": {name: counted.total * dtype.itemsize for name, dtype in DTYPES.items()}},
        "training": _training(counted.total, options),
    }


def usual_context(decoders: Sequence[Decoder]) -> int:
    """A length in tokens that all of them are made for: 4096, or the least ``max_positions`` if that is less."""
    return min(USUAL, *(decoder.config["max_positions"] for decoder in decoders))


def _cache(decoder: Decoder, context: int, bits: float) -> dict[str, Any]:
    """Growth from one token to the next, what is there regardless, and the weight at a context."""
    try:
        numbers = [cache_bytes(decoder, length, torch.float32) // 4 for length in (1, 2, context)]
    except NotImplementedError:  # a guest's attention need not have a cache
        names = ("elements_per_token", "elements_constant", "elements_at_context")
        weighed = {name: dict.fromkeys((*DTYPES, "at_bits")) for name in ("bytes_per_token", "bytes_at_context")}
        return {"bits": bits, "context": context, **dict.fromkeys(names), **weighed}
    one, two, all_of_it = numbers
    stored = _stored(decoder, context, bits)
    sizes = {name: [cache_bytes(decoder, n, dtype) for n in (1, 2, context)] for name, dtype in DTYPES.items()}
    return {
        "bits": bits,
        "context": context,
        "elements_per_token": two - one,
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


def _kernels() -> dict[str, str]:
    """What would compute it on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"device": device.type, **choice.names(choice.choose(device))}


def _stored(decoder: Decoder, context: int, bits: float) -> list[int] | None:
    """Bytes of our own quantised caches of 1, 2 and ``context`` tokens, scales included; None if there are none."""
    try:
        return [cache_bytes(decoder, n, torch.float32, int(bits)) for n in (1, 2, context)] if bits in BITS else None
    except BlockError:  # a guest's attention need not quantise
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
    """Dotted key → how much larger a figure is than the reference's, as a fraction: −0.9334 is 93.34 % less.

    What was chosen rather than measured, and what has nothing to be compared with, is left out.
    """
    ours, theirs = flat(figures), flat(reference)
    numbers = [key for key in ours if _is_number(ours[key]) and _is_number(theirs.get(key)) and key not in SETTINGS]
    compared = [key for key in numbers if theirs[key] != 0]
    return {key: ours[key] / theirs[key] - 1 for key in compared}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def document(request: Request, decoders: Sequence[Decoder]) -> dict[str, Any]:
    """The whole answer as ``--json`` prints it: ``models`` in the order asked for, ``against``, ``changes``."""
    usual = usual_context(decoders)
    options = [replace(o, context=o.context or usual) for o in request.options]
    measured = [figures(d, o) for d, o in zip(decoders, options, strict=True)]
    models = [{"model": name, **found} for name, found in zip(request.models, measured, strict=True)]
    compared = [
        {"model": name, "index": i, "change": changes(found, measured[request.against])}
        for i, (name, found) in enumerate(zip(request.models, measured, strict=True))
        if i != request.against
    ]
    return {"models": models, "against": request.models[request.against], "changes": compared}


# --- the models -------------------------------------------------------------------------------------------------------


def load(name: str, overrides: Sequence[str] = ()) -> Decoder:
    """The decoder of a preset, a run's folder, a checkpoint or a composition's file, on the meta device.

    Raises:
        ConfigError: there is no such model, or it cannot be built
    """
    path = Path(name)
    if "/" not in name and path.suffix not in (".ckpt", ".yaml", ".yml"):
        return compose(compose_config([f"model={name}", *overrides]).model, device="meta")
    if path.suffix in (".yaml", ".yml"):
        return compose(_changed(_written(path), overrides), device="meta")
    checkpoint = read_checkpoint(_checkpoint_of(path) if path.is_dir() else path)
    return compose(_changed(checkpoint["hyper_parameters"]["model"], overrides), device="meta")


def _written(path: Path) -> Any:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Name a file that holds a composition"
        raise ConfigError("model", str(path), f"cannot be read ({type(error).__name__})", remedy) from None
    written = registry.to_plain(text)
    return written["model"] if isinstance(written, dict) and isinstance(written.get("model"), dict) else written


def _checkpoint_of(run: Path) -> Path:
    last = run / "checkpoints" / "last.ckpt"
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        remedy = "Name a run's folder (logs/train/runs/…), a *.ckpt or a *.yaml"
        raise ConfigError("model", str(run), "holds no checkpoints/*.ckpt", remedy)
    return last if last.exists() else found[-1]


def _changed(model: Any, overrides: Sequence[str]) -> Any:
    """A composition that no group chose, with the values that were set on top of it."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key.startswith("model."):
            rule = "only values can be set in a model that is a file: it has no groups to choose from"
            raise ConfigError(key, value, rule, "Write model.KEY=VALUE, or start from a preset")
    if not overrides:
        return model
    try:
        changes = OmegaConf.from_dotlist([override.lstrip("+").removeprefix("model.") for override in overrides])
        return OmegaConf.merge(OmegaConf.create(model), changes)
    except (OmegaConfBaseException, ValueError) as error:
        rule = str(error).splitlines()[0]
        raise ConfigError("command line", " ".join(overrides), rule, "Write model.KEY=VALUE") from None


# --- the command line -------------------------------------------------------------------------------------------------


def _whole(value: float) -> bool:
    return 1 <= value <= 10_000_000 and value == int(value)


NUMBERS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "context": ("context", _whole, "a number of tokens, from 1 to ten million"),
    "cache.context": ("cache_context", _whole, "a number of tokens, from 1 to ten million"),
    "cache.bits": ("cache_bits", lambda bits: 0 < bits <= 64, "a number of bits, above 0 and at most 64"),
    "gpus": ("gpus", _whole, "a number of GPUs, from 1 to ten million"),
}
KEYS = (*NUMBERS, "training.recipe", "against")


def read(arguments: Sequence[str]) -> Request:
    """A command line → what is asked.

    Raises:
        ConfigError: no model, an unknown option, a value that cannot be
    """
    words, flags = _flags(arguments)
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    models = [name.strip() for name in given.pop("model", "").split(",") if name.strip()]
    if not models:
        raise ConfigError("model", None, "says which models to describe", "Write e.g. model=deepseek_v2,deepseek_67b")
    own = {key: given[key] for key in given if key in KEYS}
    for key in given:
        owner = key.partition(".")[0]
        if key not in KEYS and owner in ("cache", "training", "context", "gpus", "against", "models"):
            raise ConfigError(key, given[key], "there is no such option", did_you_mean(key, [*KEYS, "model"]))
    overrides = [word for word in words if word.partition("=")[0] not in (*KEYS, "model")]
    return Request(models, _options(own, models), overrides, _against(own, models), flags["json"], flags["plot"])


def _flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    words: list[str] = []
    flags: dict[str, Any] = {"json": False, "plot": None}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
        elif word == "--json":
            flags["json"] = True
        elif word.partition("=")[0] == "--plot":
            file = word.partition("=")[2] or (rest.pop(0) if rest and "=" not in rest[0] else "")
            if Path(file).suffix not in PLOTS:
                raise ConfigError(
                    "--plot", file, f"names a file ending in {', '.join(PLOTS)}", "Write --plot costs.png"
                )
            flags["plot"] = Path(file)
        else:
            remedy = did_you_mean(word, ["--json", "--plot", "--help"])
            raise ConfigError("command line", word, "there is no such flag", remedy)
    if unset := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ConfigError("command line", unset[0], "is no KEY=VALUE", f"Write model={unset[0]} for a model")
    return words, flags


def _options(own: Mapping[str, str], models: Sequence[str]) -> list[Options]:
    columns: dict[str, list[Any]] = {}
    for key, (name, fits, rule) in NUMBERS.items():
        if key in own:
            texts = _each(key, own[key], models)
            columns[name] = [_number(key, text, fits, rule) for text in texts]
    if "training.recipe" in own:
        columns["recipe"] = _each("training.recipe", own["training.recipe"], models)
        for recipe in columns["recipe"]:
            if recipe not in RECIPES:
                remedy = did_you_mean(recipe, RECIPES)
                raise ConfigError("training.recipe", recipe, "there is no such recipe", remedy)
    return [Options(**{name: values[i] for name, values in columns.items()}) for i in range(len(models))]


def _each(key: str, text: str, models: Sequence[str]) -> list[str]:
    """One value for all models, or one for each."""
    values = [value.strip() for value in text.split(",")]
    if len(values) == 1:
        return values * len(models)
    if len(values) != len(models):
        rule = f"takes one value for all models or one for each of the {len(models)}"
        raise ConfigError(key, text, rule, f"Write {key}={','.join(values[:1] * len(models))}")
    return values


def _number(key: str, text: str, fits: Callable[[float], bool], rule: str) -> float:
    try:
        value = float(text)
        good = fits(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise ConfigError(key, text, f"is {rule}", f"Write e.g. {key}=16")
    return int(value) if value == int(value) else value


def _against(own: Mapping[str, str], models: Sequence[str]) -> int:
    name = own.get("against", models[-1])
    if name not in models:
        raise ConfigError("against", name, "is one of the models described", did_you_mean(name, models))
    return len(models) - 1 if "against" not in own else models.index(name)


def main(arguments: Sequence[str]) -> None:
    """Answer a command line.

    Raises:
        ConfigError: whatever is wrong with it or with a model
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return
    request = read(arguments)
    decoders = [load(name, request.overrides) for name in request.models]
    answer = document(request, decoders)
    if request.as_json:
        print(json.dumps(answer, indent=1))
    else:
        card.show(answer)
    if request.plot:
        card.plot(answer, decoders, request.plot)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(REFUSED)
    except BrokenPipeError:  # whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Numbers and shapes as a picture writes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from blockwright.lab.card import in_bytes, scaled
from blockwright.lab.drawing.boxes import written
from blockwright.lab.drawing.parts import Cached, Panel, Scheme, Totals


def parameters(number: float) -> str:
    """A number of parameters: 235.7 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:,.0f}"


def sizes(scheme: Scheme) -> tuple[str, ...]:
    """What is written below the name of a model: depth, width, vocabulary, longest sequence."""
    return (
        f"{scheme.n_layers:,} layer{'s' if scheme.n_layers > 1 else ''}",
        f"d_model {scheme.d_model:,}",
        f"vocabulary {scheme.vocab_size:,}",
        f"{scheme.max_positions:,} positions",
    )


def totals(figures: Totals) -> list[tuple[str, str]]:
    """What is written of the whole model, and what it is a figure of."""
    rows = [
        (parameters(figures.parameters), "parameters"),
        (parameters(figures.active), "active a token"),
        (scaled(figures.forward_flops), f"forward FLOPs a token at {figures.context:,}"),
    ]
    return [*rows, _cache(figures)]


def _cache(figures: Totals) -> tuple[str, str]:
    if figures.cache_bytes is None or figures.cache_at_context is None:
        return "none", "cache"
    if not figures.cache_bytes:
        return in_bytes(figures.cache_at_context), "cache at any length"
    return f"{figures.cache_bytes:,} B", f"cache a token, bf16{_beyond(figures)}"


def _beyond(figures: Totals) -> str:
    """What a token adds once windows are full, where they are; numbers in bf16 have two bytes."""
    if figures.cache_beyond in (None, figures.cache_numbers):
        return ""
    return f"; {2 * (figures.cache_beyond or 0):,.0f} B beyond windows"


def of_layer(panel: Panel) -> tuple[str, ...]:
    """What is written of a layer: its parameters, and what a token adds to its cache."""
    active = () if panel.active == panel.parameters else (f"{parameters(panel.active)} active",)
    return (f"{parameters(panel.parameters)} parameters", *active, *_grown(panel))


def _grown(panel: Panel) -> tuple[str, ...]:
    """Numbers that a token adds to the cache of a layer, and beyond a window where they differ."""
    near, far = panel.cache_numbers, panel.cache_beyond
    if not near or far is None:
        return ()
    beyond = "" if far == near else f", {far:,g} beyond windows"
    return (f"{near:,} cached a token{beyond}",)


def cached(held: Cached) -> tuple[str, ...]:
    """What is cached: its name and shape, of which tokens, in which precision."""
    last = " + ".join(map(written, held.parts)) if held.parts else written(held.shape[-1])
    size = " × ".join([*(written(n) for n in held.shape[:-1] if n != 1), last])
    kept = {
        "all": "a token",
        "last": f"last {held.tokens:,} tokens",
        "every": f"one for {held.tokens:,} tokens",
        "state": "a sequence",
    }
    return (f"{held.name.replace('.', ' ')} {size}", kept[held.keeps], *(("fp32",) if held.wide else ()))


def spans(indices: Sequence[int]) -> str:
    """Layers as ranges: 0–2, 4, 6–9; shortened where they are many."""
    texts = ranges(indices)
    few = 3 if len(texts) == len(indices) else 2  # a range takes the room of two
    return ", ".join(texts if len(texts) <= few + 1 else [*texts[:few], "…", texts[-1]])


def ranges(indices: Sequence[int]) -> list[str]:
    """Consecutive indices as one text each: 0–2, 4."""
    ends = [i for i, (one, two) in enumerate(pairwise(indices), 1) if two != one + 1]
    runs = zip([0, *ends], [*ends, len(indices)], strict=True)
    return [f"{indices[i]}–{indices[j - 1]}" if j - i > 1 else str(indices[i]) for i, j in runs]


def layers(panel: Panel) -> str:
    """layers 1–59."""
    return f"layer{'s' if len(panel.layers) > 1 else ''} {spans(panel.layers)}"

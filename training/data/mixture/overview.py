"""What a mixture is made of, as a table: to look at before a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blockwright.training.data.mixture.agreement import agreement, samples
from blockwright.training.data.mixture.order import MixtureOrder
from blockwright.training.data.mixture.sources import Opened
from blockwright.training.data.tokenizers.base import Tokenizer


def overview(
    opened: Mapping[str, Opened], order: MixtureOrder, batches: int | None, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """A row for each source: tokens, shares by stage, epochs, and what stretches of it show.

    Args:
        opened: the sources
        order: of the run's windows
        batches: of the run; None if it has no end: then there are no epochs
        tokenizer: of the run
    """
    epochs = {} if batches is None else order.epochs(batches)
    stages = {f"stage {i}": stage.weights for i, stage in enumerate(order.schedule.stages, start=1)}
    rows = []
    for name, source in opened.items():
        shares = {stage: _percent(weights.get(name, 0), sum(weights.values())) for stage, weights in stages.items()}
        read = {"epochs": f"{epochs[name]:.3g}" if name in epochs else ""}
        rows.append({"source": name, **_sizes(source), **shares, **read, **_shown(source, tokenizer)})
    return rows


def texts(opened: Mapping[str, Opened], tokenizer: Tokenizer, n: int) -> list[tuple[str, str]]:
    """Name and text of n stretches of each source."""
    return [
        (name, tokenizer.decode(sample)) for name, source in opened.items() for sample in samples(source.train, n, 64)
    ]


def _sizes(source: Opened) -> dict[str, str]:
    held_out = 0 if source.val is None else source.val.n_tokens
    return {"tokens": f"{source.train.n_tokens:,}", "held out": f"{held_out:,}" if held_out else ""}


def _shown(source: Opened, tokenizer: Tokenizer) -> dict[str, str]:
    """Figures of stretches: mean length of documents and bytes of tokens, the highest id, and the tokenizer."""
    stretches = samples(source.train)
    ids = np.array([i for stretch in stretches for i in stretch])
    made = "same fingerprint" if source.made_by_ours else f"{agreement(source.train, tokenizer):.1%} encodes back"
    return {
        "bytes a token": f"{tokenizer.token_bytes()[ids].mean():.2f}",
        "highest id": f"{ids.max():,} of {tokenizer.vocab_size:,}",
        "tokenizer": made,
    }


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if part else ""

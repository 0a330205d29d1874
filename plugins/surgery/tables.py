"""The ledger of a surgery as a table: what each operator did, whether it is exact, and what it costs, untrained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes, count_parameters, forward_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.cache_loss import Window
from blockwright.lab.card import in_bytes
from blockwright.plugins.surgery.growth import Growth
from blockwright.plugins.surgery.ledger import DEPTH, TOGETHER, TOLERANCE, Ledger, Line
from blockwright.plugins.surgery.probing import grown, mixed


@dataclass(frozen=True)
class Row:
    """One operator.

    Args:
        line: of the ledger: its claim, and the measurement on random tokens
        loss: difference of the mean loss on the text with this operator alone, in nats per token; None if not measured
    """

    line: Line
    loss: float | None = None

    def count(self, key: str) -> int:
        """Parameters that are ``copied``, ``derived`` or ``drawn``."""
        return sum(getattr(operation, key) for operation in self.line.operations)

    @property
    def verdict(self) -> str:
        """Whether it is exact, in words."""
        if self.line.difference is None:
            return "not measured"
        return "yes" if self.line.exact else "no, though claimed" if self.line.refuted else "no"


def rows(old: Decoder, new: Decoder, growth: Growth, ledger: Ledger, windows: Sequence[Window]) -> list[Row]:
    """A row for each line of the ledger, and one for all together.

    Args:
        old, new: before and after the surgery, in evaluation mode
        growth: the one that it used
        ledger: what was done and measured
        windows: text to measure the loss on; none leaves it out
    """
    base = grown(old, len(new.layers), growth)
    return [Row(line, _loss(line, old, base, new, windows)) for line in (*ledger.lines, ledger.together)]


def _loss(line: Line, old: Decoder, base: Decoder, new: Decoder, windows: Sequence[Window]) -> float | None:
    if not windows or line.operator == "copy" or (line.difference is None and line.operator != TOGETHER):
        return None
    if line.operator == TOGETHER:
        return loss_difference(old, new, windows)
    if any(operation.path == DEPTH for operation in line.operations):
        return loss_difference(old, base, windows)
    return loss_difference(base, mixed(base, new, [operation.path for operation in line.operations]), windows)


@torch.inference_mode()
def loss_difference(old: Decoder, new: Decoder, windows: Iterable[Window]) -> float:
    """Difference of the mean loss in nats per token, new − old."""
    nats, scored = 0.0, 0
    for tokens, targets in windows:
        before, after = (decoder.nll(decoder.hidden(tokens)[0], targets) for decoder in (old, new))
        nats += float(after - before)
        scored += int((targets != IGNORED).sum())
    return nats / max(scored, 1)


def costs(model: Mapping[str, Any], context: int) -> dict[str, float]:
    """Parameters, cache of one sequence of ``context`` tokens in bf16, and FLOPs per token of it."""
    decoder = compose(model, device="meta")
    return {
        "parameters": count_parameters(decoder).total,
        "cache_bytes": cache_bytes(decoder, context, torch.bfloat16),
        "forward_flops_per_token": forward_flops_per_token(decoder, context),
    }


def plain(
    found: Sequence[Row], ledger: Ledger, before: Mapping[str, float], after: Mapping[str, float], context: int
) -> dict[str, Any]:
    """The ledger as plain numbers."""
    operators = [
        {
            "operator": row.line.operator,
            "blocks": len(row.line.operations),
            "exact": row.line.exact,
            "claimed": row.line.claimed,
            "measured": row.line.difference is not None,
            "note": row.line.note,
            **{key: row.count(key) for key in ("copied", "derived", "drawn")},
            "logits": row.line.difference,
            "loss": row.loss,
        }
        for row in found
    ]
    measured = {"tolerance": TOLERANCE, "random_tokens": ledger.tokens, "errors": ledger.errors}
    return {"context": context, "before": dict(before), "after": dict(after), **measured, "operators": operators}


def table(found: Sequence[Row], ledger: Ledger, scored: int) -> Table:
    """The rows as a table.

    Args:
        found: the rows
        ledger: what they are of
        scored: tokens of text that the loss is of
    """
    caption = "too large to be compared here: nothing is called exact"
    if ledger.tokens:
        caption = (
            f"logits: largest difference on {ledger.tokens:,} random tokens over the largest logit, in fp32, each"
            f" operator alone; exact: claimed, and at most {TOLERANCE:g}"
        )
    caption += f"; loss: in nats, on {scored:,} tokens of text" if scored else ""
    shown = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for head in ("operator", "blocks", "exact", "logits", "loss", "copied", "derived", "drawn", ""):
        shown.add_column(head, justify="left" if head in ("operator", "exact", "") else "right")
    for row in found:
        line = row.line
        logits = "" if line.difference is None else f"{line.difference:.2g}"
        loss = "" if row.loss is None else f"{row.loss:+.5f}"
        numbers = [f"{row.count(key):,}" for key in ("copied", "derived", "drawn")]
        shown.add_row(line.operator, str(len(line.operations)), row.verdict, logits, loss, *numbers, line.note)
    return shown


def cost_table(before: Mapping[str, float], after: Mapping[str, float], context: int) -> Table:
    """Costs before and after."""
    shown = Table(box=box.SIMPLE_HEAD, caption=f"a sequence of {context:,} tokens", caption_justify="left")
    for head in ("", "before", "after", "ratio"):
        shown.add_column(head, justify="right" if head else "left")
    for key, label, write in (
        ("parameters", "parameters", lambda v: f"{v:,.0f}"),
        ("cache_bytes", "cache in bf16", in_bytes),
        ("forward_flops_per_token", "FLOPs per token, forward", lambda v: f"{v:,.0f}"),
    ):
        ratio = f"{after[key] / before[key]:.3f}" if before[key] else ""
        shown.add_row(label, write(before[key]), write(after[key]), ratio)
    return shown

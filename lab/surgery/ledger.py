"""The ledger of a surgery: what each operator did, whether it is exact, and what it costs, before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from blocks.compose import compose
from blocks.cost import cache_bytes, count_parameters, forward_flops_per_token
from blocks.decoder import Decoder
from blocks.growth.base import Growth
from blocks.kernels.cross_entropy import IGNORED
from blocks.surgery import Operation, mixed
from lab.cache_loss import Window
from lab.card import in_bytes

ROUNDING = 1e-3  # of logits: what is called exact and differs by more is not
TOTAL = "all together"


@dataclass(frozen=True)
class Row:
    """One operator.

    Args:
        operator: its name
        blocks: how many it made
        exact: whether it leaves the outputs alone, up to rounding
        note: of its first block
        copied, derived, drawn: parameters
        logits: largest difference of a logit on the text, with this operator alone; None if not measured
        loss: difference of the mean loss on the text, in nats a token; None if not measured
    """

    operator: str
    blocks: int
    exact: bool
    note: str
    copied: int
    derived: int
    drawn: int
    logits: float | None = None
    loss: float | None = None

    @property
    def disproved(self) -> bool:
        """Whether it is called exact, and measured otherwise."""
        return self.exact and self.logits is not None and self.logits > ROUNDING


def rows(old: Decoder, new: Decoder, growth: Growth, done: Sequence[Operation], windows: Sequence[Window]) -> list[Row]:
    """A row for each operator, and one for all together.

    Args:
        old, new: before and after the surgery, in evaluation mode
        growth: the one that it used
        done: what was done
        windows: text to measure on; none leaves the differences out
    """
    names = [name for name in dict.fromkeys(o.name for o in done) if name != "copy"]
    groups = {name: [o for o in done if o.name == name] for name in [*names, "copy"]}
    found = [_row(name, group, old, new, growth, windows) for name, group in groups.items() if group]
    return [*found, _row(TOTAL, list(done), old, new, growth, windows)]


def _row(
    name: str, group: Sequence[Operation], old: Decoder, new: Decoder, growth: Growth, windows: Sequence[Window]
) -> Row:
    copied, derived, drawn = (sum(getattr(o, key) for o in group) for key in ("copied", "derived", "drawn"))
    exact, note = all(o.exact for o in group), next((o.note for o in group if o.note), "")
    measured: tuple[float, float] | tuple[None, None] = (None, None)
    if windows and name != "copy":
        probe = new if name == TOTAL else mixed(old, new, growth, [o.path for o in group])
        measured = differences(old, probe, windows)
    return Row(name, len(group), exact, "" if name == TOTAL else note, copied, derived, drawn, *measured)


@torch.inference_mode()
def differences(old: Decoder, new: Decoder, windows: Iterable[Window]) -> tuple[float, float]:
    """Largest difference of a logit, and the difference of the mean loss in nats a token, new − old."""
    largest, nats, scored = 0.0, 0.0, 0
    for tokens, targets in windows:
        hidden = [decoder.hidden(tokens)[0] for decoder in (old, new)]
        logits = [decoder.logits(h) for decoder, h in zip((old, new), hidden, strict=True)]
        largest = max(largest, float((logits[1] - logits[0]).abs().max()))
        nats += float(new.nll(hidden[1], targets) - old.nll(hidden[0], targets))
        scored += int((targets != IGNORED).sum())
    return largest, nats / max(scored, 1)


def costs(model: Mapping[str, Any], context: int) -> dict[str, float]:
    """Parameters, cache of one sequence of ``context`` tokens in bf16, and FLOPs a token of it."""
    decoder = compose(model, device="meta")
    return {
        "parameters": count_parameters(decoder).total,
        "cache_bytes": cache_bytes(decoder, context, torch.bfloat16),
        "forward_flops_per_token": forward_flops_per_token(decoder, context),
    }


def plain(
    found: Sequence[Row], before: Mapping[str, float], after: Mapping[str, float], context: int
) -> dict[str, Any]:
    """The ledger as plain numbers."""
    return {"context": context, "before": dict(before), "after": dict(after), "operators": [asdict(r) for r in found]}


def table(found: Sequence[Row], tokens: int) -> Table:
    """The rows as a table."""
    caption = f"differences on {tokens:,} tokens, each operator alone" if tokens else "no text: nothing measured"
    shown = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for head in ("operator", "blocks", "exact", "logits", "loss", "copied", "derived", "drawn", ""):
        shown.add_column(head, justify="left" if head in ("operator", "exact", "") else "right")
    for row in found:
        exact = "no" if not row.exact else "yes, but measured otherwise" if row.disproved else "yes"
        logits = "" if row.logits is None else f"{row.logits:.2g}"
        loss = "" if row.loss is None else f"{row.loss:+.5f}"
        numbers = (f"{row.copied:,}", f"{row.derived:,}", f"{row.drawn:,}")
        shown.add_row(row.operator, str(row.blocks), exact, logits, loss, *numbers, row.note)
    return shown


def cost_table(before: Mapping[str, float], after: Mapping[str, float], context: int) -> Table:
    """Costs before and after."""
    shown = Table(box=box.SIMPLE_HEAD, caption=f"a sequence of {context:,} tokens", caption_justify="left")
    for head in ("", "before", "after", "ratio"):
        shown.add_column(head, justify="right" if head else "left")
    for key, label, write in (
        ("parameters", "parameters", lambda v: f"{v:,.0f}"),
        ("cache_bytes", "cache in bf16", in_bytes),
        ("forward_flops_per_token", "FLOPs a token, forward", lambda v: f"{v:,.0f}"),
    ):
        ratio = f"{after[key] / before[key]:.3f}" if before[key] else ""
        shown.add_row(label, write(before[key]), write(after[key]), ratio)
    return shown

"""Checks of the peers: sizes equal to ours, and equal outputs of ours and transformers.

``python -m benchmarks.peers`` builds every contender of every family, compares its parameters with ours, and ours with
transformers on equal weights: our decoder is exported, transformers loads it, and both read the same tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Contender, Entry, Race, contenders
from benchmarks.record import Result, Table
from benchmarks.shapes import FAMILIES, SHAPES, TOLERANCE, Family, composition

# Relative difference of logits, and difference of the loss in nats. In fp32 the maximum is bounded; in bf16 the root
# mean square, because rounding can change the choice of a router that is nearly undecided: against fp32, the logits of
# a few tokens deviate as much in either implementation.
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (5e-2, 2e-2)}
FAMILY_OF = {"mla_moe": "deepseek_v3", "dense": "llama", "mixtral": "mixtral"}


class UnequalError(AssertionError):
    """A peer is not equivalent to ours."""


class Count:
    """Job: count a contender's parameters."""

    def __init__(self, shape: str, contender: Mapping[str, Any], device: str) -> None:
        from benchmarks.models.base import build

        model = build(Contender(**contender), SHAPES[shape], "fp32", device)
        self.parameters = sum(p.numel() for p in model.module.parameters())

    def about(self) -> dict[str, Any]:
        return {"parameters": self.parameters}

    def turn(self, **ignored: Any) -> dict[str, Any]:
        return {}


class Equality:
    """Job: compare ours with transformers on equal weights."""

    def __init__(self, shape: str, device: str) -> None:
        self.shape, self.device = SHAPES[shape], device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, family: Family, dtype: str) -> dict[str, Any]:
        """Differences of logits and loss."""
        import torch
        from torch.nn import functional as F

        from benchmarks.models.base import DTYPES
        from blockwright.blocks.compose import compose

        torch.manual_seed(0)
        decoder = compose(composition(self.shape, family)).eval()
        theirs = as_transformers(decoder, family, dtype).to(self.device)
        decoder.to(self.device, DTYPES[dtype])
        tokens = torch.randint(self.shape.vocab_size, (2, self.shape.sequence + 1)).to(self.device)
        with torch.inference_mode():
            a, b = decoder(tokens[:, :-1]).float(), theirs(input_ids=tokens[:, :-1]).logits.float()
            losses = [F.cross_entropy(x.flatten(0, 1), tokens[:, 1:].flatten()) for x in (a, b)]
        return {
            "logits": float((a - b).abs().max() / b.abs().max() if dtype == "fp32" else (a - b).norm() / b.norm()),
            "loss": abs(float(losses[0] - losses[1])),
        }


def as_transformers(decoder: Any, family: Family, dtype: str) -> Any:
    """Our decoder as transformers loads it, on the CPU."""
    from transformers import AutoModelForCausalLM

    from benchmarks.models.base import DTYPES
    from blockwright.blocks.checkpoint.manifest import dump_json
    from blockwright.blocks.checkpoint.shards import write_shards
    from blockwright.plugins.hub.exporting import outgoing, recognise

    found, values, _ = recognise(decoder, FAMILY_OF[family], {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, outgoing(found, decoder, decoder.state_dict(), None), 10**10)
        dump_json(folder / "config.json", {**values, "dtype": "float32"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()


def equality(shape: str, kinds: Sequence[tuple[Family, str]], device: str, threads: int) -> Table:
    """Compare ours with transformers on equal weights.

    Args:
        shape: name of the sizes
        kinds: families and dtypes
        device, threads: of the computation

    Raises:
        UnequalError: the difference exceeds ``BOUNDS``
    """
    columns = ("family", "dtype", "difference of logits", "bound", "difference of loss", "bound of loss")
    table = Table(f"Equal outputs of ours and transformers, {shape}", columns)
    with Race([Entry("ours", "benchmarks.peers:Equality", {"shape": shape}, tuned=True)], device, threads) as race:
        entry = race.entries[0]
        for family, dtype in kinds:
            found, bounds = race.ask(entry, {"family": family, "dtype": dtype}), BOUNDS[dtype]
            if found is None:
                raise UnequalError(f"{family}, {dtype}: {entry.failed}")
            if found["logits"] > bounds[0] or found["loss"] > bounds[1]:
                rule = f"logits differ by {found['logits']}, the loss by {found['loss']}"
                raise UnequalError(f"{family}, {dtype}: {rule}")
            table.rows.append([family, dtype, found["logits"], bounds[0], found["loss"], bounds[1]])
    return table


def sizes(shape: str, threads: int) -> Table:
    """Compare parameter counts of all contenders.

    Raises:
        UnequalError: a peer's deviate from ours by more than ``TOLERANCE``
    """
    table = Table(f"Parameters, {shape}", ("contender", "family", "parameters", "÷ ours", "remarks"))
    for family in FAMILIES:
        found = [c for c in contenders(family, older=True) if c.tuned]
        jobs = [
            Entry(c.label, "benchmarks.peers:Count", {"shape": shape, "contender": asdict(c)}, False) for c in found
        ]
        with Race(jobs, "cpu", threads) as race:
            pass
        if race.entries[0].failed:
            raise UnequalError(f"{family}: {race.entries[0].failed}")
        ours = race.entries[0].about["parameters"]
        for contender, entry in zip(found, race.entries, strict=True):
            if entry.failed:
                table.rows.append([contender.name, family, None, None, f"failed: {entry.failed}"])
                continue
            ratio = entry.about["parameters"] / ours
            table.rows.append([contender.name, family, entry.about["parameters"], ratio, ""])
            if abs(ratio - 1) > TOLERANCE:
                raise UnequalError(f"{contender.name}, {shape}: {ratio:.3f} times our parameters")
    return table


def main(arguments: Sequence[str] | None = None) -> Result:
    """Count, compare, and save both tables."""
    parser = record.parser("peers", __doc__, rounds=1, minutes=5)
    record.add_names(parser, "shapes", "tiny,small", list(SHAPES))
    given = record.read(parser, arguments)
    shapes = ["smoke"] if given.quick else given.shapes
    result = Result("peers", machine.about(given.device, given.threads))
    for shape in shapes:
        result.tables.append(sizes(shape, given.threads))
        kinds = [(family, dtype) for family in FAMILIES for dtype in SHAPES[shape].dtypes]
        result.tables.append(equality(shape, kinds, given.device, given.threads))
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()

"""Overhead of the Trainer per step: our Lightning module and callbacks against a bare loop with the same model.

``python -m benchmarks.trainer_overhead``. Both have the same composition, optimizer, clipping and batches; a turn of
the Trainer is a whole ``fit`` of a few steps, of which those after the first are timed, from the start of one batch to
the start of another. Promised: at most 5 %.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.shapes import SHAPES, Shape, composition

PROMISED = 1.05
CLIP = 1.0


def batches(shape: Shape, n: int) -> Iterator[dict[str, Any]]:
    """Batches like those of the data module."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        drawn = torch.randint(shape.vocab_size, (shape.batch, shape.sequence + 1), generator=generator)
        yield {
            "tokens": drawn[:, :-1].contiguous(),
            "targets": drawn[:, 1:].contiguous(),
            "positions": torch.arange(shape.sequence).expand(shape.batch, -1),
            "n_bytes": torch.full((shape.batch,), shape.sequence),
        }


class BareLoop:
    """Job: train in a plain loop."""

    def __init__(self, shape: str, device: str) -> None:
        from blockwright.blocks.compose import compose
        from blockwright.training.optimizers.adamw import AdamW

        self.shape = SHAPES[shape]
        self.decoder = compose(composition(self.shape, "mla_moe"))
        self.optimizer = AdamW().build(self.decoder)

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, steps: int) -> dict[str, Any]:
        """Seconds per step, the first not counted."""
        import torch

        start = 0.0
        for index, batch in enumerate(batches(self.shape, steps + 1)):
            if index == 1:
                start = time.perf_counter()
            hidden, _ = self.decoder.hidden(batch["tokens"])
            loss = self.decoder.nll(hidden, batch["targets"]) / batch["targets"].numel()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), CLIP)
            self.optimizer.step()
        return {"seconds": (time.perf_counter() - start) / steps}


class Trainer:
    """Job: train as ``train.py`` does: the configured callbacks and loggers, Lightning's Trainer."""

    def __init__(self, shape: str, device: str) -> None:
        from blockwright.training.configuration.composing import compose_config
        from blockwright.training.entry.preflight import preflight

        self.shape = SHAPES[shape]
        self.folder = tempfile.TemporaryDirectory()  # as long as the process lives
        wanted = ["data=text", "data.corpus.files=LICENSE", "test=false"]
        cfg = compose_config([*wanted, f"paths.data_dir={self.folder.name}"], output_dir=self.folder.name)
        run = preflight(cfg)
        self.run = replace(run, model=composition(self.shape, "mla_moe"))

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, steps: int) -> dict[str, Any]:
        """Seconds per step, from the start of the second batch to the start of the one after the last."""
        from torch.utils.data import DataLoader

        from benchmarks.callbacks import StepClock
        from blockwright.training.configuration import parts
        from blockwright.training.configuration.instantiate import instantiate
        from blockwright.training.configuration.run import OWN
        from blockwright.training.entry.execute import quieten
        from blockwright.training.optimizers.adamw import AdamW
        from blockwright.training.schedulers import Constant

        quieten(ignore=True)
        clock = StepClock(first=1, last=steps + 1)
        # Exclude what happens at the end of a run (sample, plots).
        chosen = {k: node for k, node in self.run.callbacks.items() if node and k != "report"}
        callbacks = [instantiate(node, f"callbacks.{k}") for k, node in chosen.items()]
        loggers = [instantiate(node, f"logger.{k}") for k, node in self.run.logger.items() if node]
        given = {k: value for k, value in self.run.trainer.items() if k not in OWN}
        settings = {**given, "max_steps": steps + 2, "limit_val_batches": 0, "val_check_interval": None}
        trainer = instantiate({**settings, "callbacks": [clock, *callbacks], "logger": loggers}, "trainer")
        task = parts.build("task", self.run)
        task.recipe, task.schedule = AdamW(), Constant()
        loader: Any = DataLoader(list(batches(self.shape, steps + 2)), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(task, loader)
        return {"seconds": clock.seconds / steps}


def main(arguments: Sequence[str] | None = None) -> Result:
    """Race both, and save the times."""
    parser = record.parser("trainer_overhead", __doc__, rounds=7, minutes=4)
    record.add_names(parser, "shapes", "small", list(SHAPES))
    parser.add_argument("--steps", type=int, default=3, help="timed in a turn (default: %(default)s)")
    given = record.read(parser, arguments)
    result = Result("trainer_overhead", machine.about("cpu", given.threads))
    for name in ["smoke"] if given.quick else given.shapes:
        jobs = (("bare loop", "BareLoop"), ("Trainer", "Trainer"))
        entries = [Entry(label, f"benchmarks.trainer_overhead:{job}", {"shape": name}) for label, job in jobs]
        with Race(entries, "cpu", given.threads) as race:
            race.run(given.rounds, given.minutes * 60, least=1 if given.quick else 3, steps=given.steps)
        failed = [entry for entry in entries if entry.failed]
        if failed:
            raise SystemExit(f"{failed[0].label}: {failed[0].failed}")
        bare, trainer = ({r: turn["seconds"] for r, turn in entry.turns.items()} for entry in entries)
        table = Table(f"Seconds a step · {name}", ("loop", "seconds", "q1", "q3"), plotted="seconds")
        for label, seconds in (("bare loop", bare), ("ours, Trainer with the default callbacks", trainer)):
            s = spread(list(seconds.values()))
            table.rows.append([label, s.median, s.q1, s.q3])
        ratio = paired(trainer, bare)
        assert ratio is not None
        bound = PROMISED if name == "small" else None
        result.ratios.append(Ratio(f"trainer · {name}: Trainer ÷ bare loop, time", ratio, "less", bound))
        result.tables.append(table)
        result.raw[name] = {"bare loop": bare, "Trainer": trainer}
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()

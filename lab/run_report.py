"""Report of one run: a table of figures, curves, the experts' load, a sampled text.

``curves.json`` has its training and validation curves. Steps are optimizer steps; ``tokens_per_step`` converts them to
tokens, ``flops_per_token`` those to FLOPs. The validations are those during training, all on the same text; a run
without any has its final one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table

from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes_per_token, count_parameters, training_flops_per_token
from blockwright.blocks.generation.generate import generate
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.report import single
from blockwright.lab.report.svg import standalone
from blockwright.registry import printing
from blockwright.registry.enforcing import enforced
from blockwright.registry.folder import write_text
from blockwright.registry.ranges import NonNegative, Whole
from blockwright.training.cadence import logs_now
from blockwright.training.callbacks.interruption import Interruption
from blockwright.training.callbacks.step_end import Finale, StepEnd
from blockwright.training.data.tokenizers.tokenizer import Tokenizer
from blockwright.training.figure import by_name, find, names_in, of_run
from blockwright.training.parallel.local import is_distributed
from blockwright.training.result import RESULTS, Result
from blockwright.training.tasks.base import Task

FILE = "curves.json"
Curve = Sequence[tuple[int, float]]


def costs(model: Mapping[str, Any], length: int) -> dict[str, float | None]:
    """Cost of one token, measured on the meta device.

    Args:
        model: a composition
        length: T, tokens of its training sequences

    Returns:
        ``flops_per_token`` of training, and ``cache_bytes_per_token`` in fp32, of a sequence of this length;
        None if a plug-in's block cannot be measured
    """
    found: dict[str, float | None] = {"flops_per_token": None, "cache_bytes_per_token": None}
    try:
        decoder = compose(model, device="meta")
        length = min(length, decoder.config["max_positions"])
        found["flops_per_token"] = training_flops_per_token(decoder, length)
        found["cache_bytes_per_token"] = cache_bytes_per_token(decoder, length, torch.float32)
    except NotImplementedError:  # an attention without a cache
        pass
    except Exception as error:  # must not end a finished training
        rank_zero_warn(f"no costs in {FILE}: {type(error).__name__}: {error}")
    return found


def tokens_per_step(trainer: L.Trainer) -> int | None:
    """Tokens per optimizer step, over all ranks; None if the data module does not define it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    windows, length = getattr(data, "batch_size", None), getattr(data, "sequence_length", None)
    return None if windows is None or length is None else windows * length * trainer.accumulate_grad_batches


def write(
    directory: Path,
    train: Curve,
    val: Curve,
    tokens: int | None,
    costs: Mapping[str, float | None],
    shares: Mapping[str, torch.Tensor],
) -> None:
    """Write ``curves.json`` atomically."""
    load = {layer: [round(share, 6) for share in found.tolist()] for layer, found in shares.items()}
    document = {"tokens_per_step": tokens, "train": train, "val": val, **costs, "expert_load": load}
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / FILE, json.dumps(document))


STAGES = {"val": "validation", "test": "test", "train": "last training"}


@enforced("callbacks.report")
class RunReport(StepEnd, Finale):
    """Writes results.json, curves.json, loss.svg, expert_load.svg, model.svg and sample.txt, and prints a summary. Of a
    task that names other curves it draws those too; one that samples completions has those for a sampled text.

    The curves are stored in checkpoints, so a resumed run has all of them. They are also written at each validation and
    when training fails or is interrupted, for comparisons.

    Args:
        directory: where to write
        sample_tokens: length of the sampled text; 0 for none
        temperature: of the sampling
    """

    observes = "writes and shows what was logged"

    def __init__(self, directory: str, sample_tokens: Whole = 400, temperature: NonNegative = 0.8) -> None:
        self.directory = Path(directory)
        self.sample_tokens, self.temperature = sample_tokens, temperature
        self.train: list[tuple[int, float]] = []
        self.val: list[tuple[int, float]] = []
        self.drawn: dict[str, list[tuple[int, float]]] = {}
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._costs: dict[str, float | None] | None = None  # measured once

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val, "drawn": self.drawn, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.val, self.seconds = list(state_dict["train"]), list(state_dict["val"]), state_dict["seconds"]
        self.drawn = {name: list(curve) for name, curve in state_dict["drawn"].items()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = self._elapsed()

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._since

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        if logs_now(trainer):
            if (loss := trainer.callback_metrics.get("train/loss")) is not None:  # a task may declare other figures
                self.train.append((step, float(loss)))
            self._keep(trainer, pl_module, "train/", step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._keep(trainer, pl_module, "val/", trainer.global_step)
        measured = "val/loss" in trainer.callback_metrics  # a task on rewards measures other figures
        if measured and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.val.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))
            self._write_curves(trainer, pl_module)

    def _keep(self, trainer: L.Trainer, task: L.LightningModule, stage: str, step: int) -> None:
        """Keep the figures of a stage that the task has drawn."""
        for name in sum(task.curves.values(), ()) if isinstance(task, Task) else ():
            if name.startswith(stage) and name in trainer.callback_metrics:
                self.drawn.setdefault(name, []).append((step, float(trainer.callback_metrics[name])))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.train or self.val:
            try:
                self._write_curves(trainer, pl_module)
            except OSError as error:  # must not take the place of what ended the run
                rank_zero_warn(f"{self.directory / FILE} is not written ({error.strerror})")

    def _write_curves(self, trainer: L.Trainer, task: L.LightningModule, final: Curve = ()) -> None:
        if not trainer.is_global_zero or not isinstance(task, Task):
            return
        if self._costs is None:
            data = trainer.datamodule  # type: ignore[attr-defined]
            length = getattr(data, "sequence_length", task.model_config["max_positions"])
            self._costs = costs(task.model_config, length)
        tokens = tokens_per_step(trainer)
        write(self.directory, self.train, self.val or final, tokens, self._costs, task.expert_shares)

    def on_conclusion(self, trainer: L.Trainer, task: L.LightningModule, metrics: dict[str, float]) -> None:
        assert isinstance(task, Task) and task.decoder is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        spread = is_distributed(task.decoder)  # over ranks; this runs on the first only
        counts = count_parameters(compose(task.model_config, device="meta") if spread else task.decoder)
        saves = [c.slowest_s for c in trainer.callbacks if isinstance(c, Interruption)]  # type: ignore[attr-defined]
        result = Result(
            "completed",
            parameters=counts.total,
            active_parameters=counts.active,
            steps=trainer.global_step,
            save_seconds=round(max(saves), 3) if saves else None,
            fit_seconds=round(self.seconds, 1),
            metrics=metrics,
            figures=by_name(metrics, of_run(trainer)),
        )
        result.write(self.directory)
        final = [(trainer.global_step, metrics["val/loss"])] if "val/loss" in metrics else []
        self._write_curves(trainer, task, final)
        if self.train:
            # The unit of the validation loss, or of that of training where there is none
            known = (find(name, of_run(trainer)) for name in ("val/loss", "train/loss"))
            unit_of_loss = next((figure.unit for figure in known if figure is not None), "")
            chart = single.losses(self.train, self.val, final, unit_of_loss)
            write_text(self.directory / "loss.svg", standalone(chart))
        for name, names in task.curves.items():
            shown = {label: self.drawn[label] for label in names if label in self.drawn}
            if shown:
                write_text(self.directory / f"{name}.svg", standalone(single.figures(name, shown)))
        if task.expert_shares:
            chart = single.expert_load({layer: share.tolist() for layer, share in task.expert_shares.items()})
            write_text(self.directory / "expert_load.svg", standalone(chart))
        write_text(self.directory / "model.svg", picture(scheme(task.model_config, self.directory.resolve().name)))
        printing.show(table_of(result))
        if "reward" in names_in("val", task.figures):
            pass  # its completions are shown after each validation
        elif self.sample_tokens and (tokenizer := trainer.datamodule.tokenizer) is not None:  # type: ignore[attr-defined]
            self._show_sample(task, tokenizer, spread)
        drawn = [f.name for f in sorted(self.directory.glob("*.svg"))]
        print(f"{self.directory}: {', '.join([RESULTS, FILE, *drawn])}")

    def _show_sample(self, task: Task, tokenizer: Tokenizer, spread: bool) -> None:
        if spread:
            print("no sampled text: no rank has the whole model; see blockwright generate")
            return
        try:
            text = self._sample(task, tokenizer)
        except NotImplementedError:  # a plug-in's attention may have no cache
            print("no sampled text: an attention of this model has no new_cache")
            return
        write_text(self.directory / "sample.txt", text)
        printing.show_text(text, f"sampled at temperature {self.temperature:g}")

    def _sample(self, task: Task, tokenizer: Tokenizer) -> str:
        """Sample a text from the start of a document."""
        assert task.decoder is not None
        room = task.decoder.config["max_positions"]
        begin = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
        prompt = torch.tensor([[begin]], device=task.device, dtype=torch.int64)
        task.decoder.eval()
        count = min(self.sample_tokens, room - 1)
        tokens = generate(task.decoder, prompt, count, temperature=self.temperature, seed=task.seed)
        return tokenizer.decode(tokens[0, 1:].tolist())


def table_of(result: Result) -> Table:
    """The figures of one run, as written, each with its unit and whether more or less of it is better."""
    table = Table("figure", "value", "unit", "better", title="results", title_justify="left")
    table.add_row("parameters", f"{result.parameters:,}", f"{result.active_parameters:,} active", "")
    table.add_row("optimizer steps", f"{result.steps:,}", f"{result.fit_seconds:.0f} s of training", "")
    for name in sorted(filter(_is_shown, result.metrics), key=_order):
        figure = result.figures.get(name)
        unit, better = ("", "not declared") if figure is None else (figure.unit, figure.better or "")
        group, _, rest = name.partition("/")
        label = f"{STAGES.get(group, group)} {rest}".replace("_", " ")
        table.add_row(label, f"{result.metrics[name]:,.6g}", unit, better)
    violations = [v for k, v in result.metrics.items() if k.startswith("val_load/") and k.endswith("max_violation")]
    if violations:
        worst = f"{1 + max(violations):.3g}"
        table.add_row("busiest expert over the mean", worst, "×, worst layer, validation", "less")
    return table


def _is_shown(name: str) -> bool:
    """Whether a figure is of the model: of training only the loss is, and of the load of experts the worst."""
    group = name.partition("/")[0]
    return name == "train/loss" or not (group == "train" or group.endswith("_load"))


def _order(name: str) -> int:
    """Validation, test, training, the rest as they come."""
    group = name.partition("/")[0]
    return [*STAGES].index(group) if group in STAGES else len(STAGES)

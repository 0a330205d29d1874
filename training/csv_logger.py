"""``metrics.csv``, continued by a run that resumes in the same folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from blockwright.registry.folder import append_lines, replaced, write_text


class CSVLogger(LightningCSVLogger):
    """Lightning's CSVLogger, with the same arguments.

    How this differs from Lightning's: that one deletes an existing file, and writes all rows again, in place, for every
    figure that appears later. Here rows stay whatever ends the run, except those logged again: the steps between the
    checkpoint and the end of the previous run.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Continued(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _Continued(ExperimentWriter):
    _begun = False

    def _check_log_dir_exists(self) -> None:
        """Keep existing files."""

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        with replaced(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as partial:
            save_hparams_to_yaml(partial, self.hparams)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if not self._begun and step is not None:
            self._drop_later_rows(set(metrics_dict), step)
        self._begun = True
        super().log_metrics(metrics_dict, step)

    def save(self) -> None:
        """Append the rows that were logged; with a new figure, write a file with all rows in place of the old one."""
        if not self.metrics:
            return
        file, keys = Path(self.metrics_file_path), sorted({*self.metrics_keys, *set().union(*self.metrics)})
        if keys != self.metrics_keys or not file.is_file():
            write_text(file, _text(keys, [*(_rows(file) or []), *self.metrics], head=True))
        else:
            append_lines(file, _text(keys, self.metrics))
        self.metrics_keys, self.metrics = keys, []  # not before: they are written again after an error

    def _drop_later_rows(self, keys: set[str], step: int) -> None:
        """Keep rows of earlier steps, and rows of this step with other figures."""
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        if (rows := _rows(file)) is None:  # another program's
            file.replace(file.with_suffix(".other.csv"))
            return
        again = keys - {"epoch"}
        past = [row for row in rows if (at := int(row["step"])) < step or (at == step and not again & set(row))]
        self.metrics_keys = sorted(set().union(*past)) or ["step"]
        write_text(file, _text(self.metrics_keys, past, head=True))


def _rows(file: Path) -> list[dict[str, Any]] | None:
    """The rows that were written as a whole, without empty figures; None of a file that is no table of steps.

    A kill or a full disk may have cut the last line, and a power failure leaves zeros.
    """
    if not file.is_file():
        return []
    text = file.read_bytes().decode(errors="replace").replace("\0", "").replace("\r", "")
    try:
        head, *rows = list(csv.reader(text.split("\n")[:-1])) or [[]]
    except csv.Error:
        return None
    if "step" not in head and any(rows):
        return None
    found = (dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head))
    return [{key: value for key, value in row.items() if value} for row in found if row.get("step", "").isdecimal()]


def _text(keys: Sequence[str], rows: Sequence[dict[str, Any]], head: bool = False) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=keys)
    if head:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

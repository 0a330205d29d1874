"""``metrics.csv``, continued by a run that resumes in the same folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from blockwright.registry.replacing import replaced


class CSVLogger(LightningCSVLogger):
    """Lightning's CSVLogger, with the same arguments.

    How this differs from Lightning's: that one deletes an existing file. Here its rows stay, except those logged again:
    the steps between the checkpoint and the end of the previous run.
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

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        if not self._begun and step is not None:
            self._drop_later_rows(set(metrics_dict), step)
        self._begun = True
        super().log_metrics(metrics_dict, step)

    def _drop_later_rows(self, keys: set[str], step: int) -> None:
        """Keep rows of earlier steps, and rows of this step with other figures."""
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        with file.open(newline="") as opened:
            rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if v} for row in csv.DictReader(opened)]
        again = keys - {"epoch"}
        past = [row for row in rows if (at := int(row["step"])) < step or (at == step and not again & set(row))]
        self.metrics_keys = sorted(set().union(*past)) or ["step"]
        with replaced(file) as partial, partial.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(past)

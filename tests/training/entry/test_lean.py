"""Lightning comes without scipy and transformers, and torchmetrics is whole for whoever asks for more of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from training.entry.lean import import_torchmetrics_as_needed
import_torchmetrics_as_needed()
import lightning
import training.metrics
early = {"scipy", "transformers", "torchmetrics.functional"} & set(sys.modules)
import torchmetrics
assert torchmetrics.Accuracy(task="binary") and torchmetrics.functional.accuracy
assert issubclass(torchmetrics.Accuracy, training.metrics.Metric) and torchmetrics.__version__
print(early)
"""


def test_metrics_nobody_uses_are_not_imported_and_are_there_when_asked_for(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr

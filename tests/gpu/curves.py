"""The default model's first steps on the device against those on a CPU: the losses of the same training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.worker import peak_memory, reset_peak
from tests.gpu.answer import held
from tests.training.parallel.many_ranks import Curve

# The greatest relative difference of a loss: rounding, which training amplifies.
CASES = {
    "fp32": ("32-true", False, 0.01),
    "bf16": ("bf16-mixed", False, 0.03),
    "bf16, compiled": ("bf16-mixed", True, 0.03),
}
SMALL = ["model.n_layers=2", "model.d_model=64", "data.sequence_length=32", "data.batch_size=2"]


class Curves:
    """Job: one precision a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.device, self.small, self.steps = device, small, 5 if small else 50
        self.right: list[float] = []

    def about(self) -> dict[str, Any]:
        return {"cases": list(CASES)}

    def turn(self, case: str) -> dict[str, Any]:
        """Whether each step's loss is the CPU's in fp32."""
        precision, compiled, bound = CASES[case]
        self.right = self.right or self.losses("cpu", "32-true", False)
        reset_peak(self.device)
        found = self.losses(self.device, precision, compiled)
        far = float((torch.tensor(found) / torch.tensor(self.right) - 1).abs().max())  # NaN if a loss is
        figures = {"first": found[0], "last": found[-1], "last on the CPU": self.right[-1], "apart": far}
        detail = f"a loss differs by more than {bound:.0%} from the CPU's"
        return held(far <= bound, detail, **figures, **{"peak, GB": peak_memory(self.device) / 1e9})

    def losses(self, device: str, precision: str, compiled: bool) -> list[float]:
        """The loss of each optimizer step."""
        import lightning as L

        from blockwright.training.configuration import parts
        from blockwright.training.configuration.composing import compose_config
        from blockwright.training.configuration.run import OWN
        from blockwright.training.entry.preflight import preflight

        given = [f"trainer.precision={precision}", f"trainer.compile={compiled}", "test=false", "callbacks=none"]
        given += [f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", "logger=none"]
        given += [f"trainer.max_steps={self.steps}", "trainer.log_every_n_steps=1", *(SMALL if self.small else [])]
        with tempfile.TemporaryDirectory() as folder:
            plain = preflight(compose_config([*given, *self._text(Path(folder))], output_dir=folder))
            L.seed_everything(plain["seed"], verbose=False)
            curve = Curve()
            ours = {k: v for k, v in plain["trainer"].items() if k not in ("_target_", "plugins", *OWN)}
            quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
            trainer = L.Trainer(**{**ours, **quiet, "limit_val_batches": 0}, callbacks=[curve])
            trainer.fit(parts.build("task", plain), parts.build("data", plain))
        return curve.losses

    def _text(self, folder: Path) -> list[str]:
        """Text that every machine has."""
        file = folder / "corpus.txt"
        file.write_text("".join(f"To be, or not to be: line {i} of {i * i % 89}.\n" for i in range(4000)))
        return ["data=text", f"data.corpus.files={file}", f"paths.data_dir={folder}"]

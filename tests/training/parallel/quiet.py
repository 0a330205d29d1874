"""A trainer on a CPU that writes nothing and shows nothing."""

from __future__ import annotations

from typing import Any

import lightning as L

OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def quiet_trainer(**settings: Any) -> L.Trainer:
    """A trainer with these settings beside the usual ones, which they may change."""
    return L.Trainer(**{"accelerator": "cpu", "use_distributed_sampler": False, **OFF, **settings})

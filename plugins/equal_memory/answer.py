"""What ``blockwright throughput`` answers: measure, print, and write the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.blocks.kernels.timing import multiply_fastest
from blockwright.lab.writer import usable_device
from blockwright.plugins.equal_memory import report
from blockwright.plugins.equal_memory.arm import Arm, cells_of, read_arms
from blockwright.plugins.equal_memory.race import WIDTH, Machine, Race, race
from blockwright.plugins.equal_memory.request import Request, Settings, read_request
from blockwright.plugins.equal_memory.results import Results, collect
from blockwright.registry import ConfigError
from blockwright.registry.errors import require
from blockwright.training.configuration.composing import compose_config


def answer(arguments: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        ConfigError: an error in it or in an arm, an arm that does not fit, or a folder that cannot be written
    """
    request = read_request(arguments)
    require("lab", "jinja2", path="blockwright throughput")
    device = _device(request.settings)
    arms = read_arms(request, getattr(torch, request.settings.dtype), device)
    folder = _new_folder(request.log_dir)
    try:
        results = measure(request, arms, device)
    except BaseException as error:
        folder.rmdir()  # nothing is in it
        # Whether a device has no more memory; of a CPU torch raises a RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        rule = f"and weights leave too little of the memory of {device.type} for what a step computes"
        raise ConfigError("memory", request.settings.memory, rule, "Lower it, or write rows=N") from None
    page = report.write(folder, results)
    if request.as_json:
        print(json.dumps(results.as_plain(), indent=1))
    else:
        report.show(results, page)


def measure(request: Request, arms: Sequence[Arm], device: torch.device) -> Results:
    """Give every arm its turns."""
    settings, dtype = request.settings, getattr(torch, request.settings.dtype)
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    decoders = {arm.name: arm.build(device) for arm in arms}
    multiply_fastest(*decoders.values())
    machine = Machine(device, dtype, settings.budget)

    def race_at(context: int) -> Race:
        if sys.stderr.isatty():
            print(f"{context:,} tokens of context", file=sys.stderr)
        return race(decoders, cells_of(request, context), settings, machine)

    return collect(request, arms, device, race_at)


def _device(settings: Settings) -> torch.device:
    device = usable_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in WIDTH:
        raise ConfigError("device", settings.device, "is not timed", "Write device=cpu, or device=cuda:0 on a GPU")
    return device


def _new_folder(overrides: Sequence[str]) -> Path:
    """The folder of this measurement, ``paths.log_dir/throughput/TIME``.

    Raises:
        ConfigError: it cannot be made
    """
    log_dir = compose_config(overrides).paths.log_dir
    if not isinstance(log_dir, str):
        raise ConfigError("paths.log_dir", log_dir, "must name a folder", "Write paths.log_dir=FOLDER")
    folder = Path(log_dir) / "throughput" / f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError("paths.log_dir", str(folder), rule, "Write paths.log_dir=FOLDER, one with room") from None
    return folder

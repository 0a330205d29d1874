"""What every test keeps to, for conftest.py: it writes in its own folders, leaves nothing running, and casts nothing.

A test that breaks one of these harms another, or hides a fault that a user would see; so none needs to ask for it.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.ffn import FFN
from blockwright.blocks.norm import Norm

ROOT = str(Path(__file__).resolve().parent.parent) + os.sep
KEPT = (
    "__pycache__",
    ".hypothesis",
    ".pytest_cache",
    "pytest-cache",
    ".venv",
    ".git",
    "slow_tier.json",
)  # what Python and the test's tools write
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MONITORS = (
    "tqdm_monitor",
    "ExecutorManagerThread",
    "ThreadPoolExecutor",
    "asyncio_",
    "pymp-",
    "QueueFeederThread",
    "AnyIO worker thread",
)
SHARED = (
    "resource_tracker",
    "multiprocessing.forkserver",
    "joblib.externals.loky",
    "blockwright.training.answering",
    "tests/warm.py",
)  # processes
ENDS_WITHIN_S = 5.0


def refuse_writes_in_the_checkout(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a test that forgets its ``tmp_path`` would change the source, or what the next test reads."""
    if event != "open" or not isinstance(arguments[0], str) or not arguments[2] or not arguments[2] & WRITES:
        return
    path = os.path.abspath(arguments[0])
    if path.startswith(ROOT) and not any(part.startswith(KEPT) for part in path[len(ROOT) :].split(os.sep)):
        raise PermissionError(f"a test writes into the checkout: {path}")


def running() -> dict[str, str]:
    """Threads of this process that it would wait for, and its processes: what each is called.

    A process that has ended, or has just begun, is called "".
    """
    found = {str(t.ident): t.name for t in threading.enumerate() if not t.name.startswith(MONITORS)}
    for process in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
        with suppress(OSError):
            command = Path("/proc", process, "cmdline").read_text().replace("\0", " ")
            if not any(kept in command for kept in SHARED):
                found[process] = command
    return found


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = running().keys()
    yield
    if running().keys() - before:
        gc.collect()  # loaders end their processes with the last reference to them
    end = time.monotonic() + ENDS_WITHIN_S
    while (left := {name for key, name in running().items() if name and key not in before}) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left, f"left running: {left}"


def refuse_a_cast(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """A hook of all modules: attention, a feed-forward layer and a norm give what they get, outside of autocast."""
    if not isinstance(module, Attention | FFN | Norm) or not inputs or not isinstance(inputs[0], Tensor):
        return
    given, found = inputs[0], output[0] if isinstance(output, tuple) else output
    if isinstance(found, Tensor) and found.dtype != given.dtype and not torch.is_autocast_enabled(given.device.type):
        raise TypeError(f"{type(module).__name__} gives {found.dtype} for {given.dtype}")


def install() -> None:
    sys.addaudithook(refuse_writes_in_the_checkout)
    nn.modules.module.register_module_forward_hook(refuse_a_cast)

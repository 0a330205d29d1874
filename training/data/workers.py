"""Loader processes: how they are started, and how they react to the signals that stop a run.

They are not forked from the training process. If one thread forks while another (of gloo, say) holds a lock of the
interpreter, the child waits forever for a thread that it does not have, and all ranks wait for its batch. They are
forked from a single-threaded server, which imports once what all of them need.

The signals that stop a run may reach every process of it, as with Slurm. The current step still waits for its batch
then, so loader processes stay until they are dismissed, or the training process is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext

GRACE_S = 5  # at exit the interpreter sends its children SIGTERM and waits for them


def forkserver() -> BaseContext | None:
    """The start method of loader processes; None on systems without a fork server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "blockwright.training.data.loader_server"])
    return context


def stay(worker: int) -> None:
    """In a new loader process: ignore SIGINT; on SIGTERM exit after ``GRACE_S``; exit when the trainer dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """torch watches the worker's parent, which is the server, not the training process; so watch that too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

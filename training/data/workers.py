"""Loader processes: where they come from, and what the signals that stop a run mean to them.

They are not forked from the training process. When one thread forks while another (of gloo, say) holds a lock of the
interpreter's, the child waits for ever for a thread that it has not got, and all ranks wait for its batch. They come
from a server of one thread, which imports once what all of them need.

The signals that stop a run may reach every process of it, as Slurm sends them. The step in hand still waits for its
batch then, so loader processes stay until they are dismissed, or nobody is left to do so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import BaseContext

GRACE_S = 5  # the interpreter ends its children by SIGTERM when it exits, and waits for them


def forkserver() -> BaseContext | None:
    """The context of loader processes; None where a system has no such server."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "training.data.loader_server"])
    return context


def stay(worker: int) -> None:
    """In a new loader process: ignore what stops the run, outlast a SIGTERM by ``GRACE_S``, end with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """Torch watches the process that a worker was forked from; that is the server, which waits for its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

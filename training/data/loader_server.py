"""Imported only by the process that loader processes are forked from: see ``modules/batches.py``."""

import os
import signal

import blockwright.training.data.windows  # noqa: F401  what each of them needs, and first of all torch: imported once, here

os.setsid()  # not reached by Ctrl-C
for signum in (signal.SIGTERM, signal.SIGUSR1):  # it ends with the training process
    signal.signal(signum, signal.SIG_IGN)

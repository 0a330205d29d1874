"""Imported by the process that loader processes are forked from, and nowhere else: see ``workers.py``."""

import os
import signal

import training.data.windows  # noqa: F401  what each of them needs, and first of all torch: imported once, here

os.setsid()  # out of reach of Ctrl-C
for signum in (signal.SIGTERM, signal.SIGUSR1):  # it ends when the training process does, whatever the end
    signal.signal(signum, signal.SIG_IGN)

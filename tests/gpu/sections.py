"""What is tried on a GPU, in this order, and for how long."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """Cases of one kind, which one process tries.

    title: in the report
    job: ``module:class``; its ``about()`` names the ``cases``, its ``turn(case)`` answers one
    seconds: after which no further case is begun, and a running one is killed
    """

    title: str
    job: str
    seconds: float


SECTIONS = (
    Section("kernels", "tests.gpu.kernels:Kernels", 240),
    Section("attention", "tests.gpu.attention:Attention", 150),
    Section("training", "tests.gpu.curves:Curves", 210),
    Section("steps", "tests.gpu.steps:Steps", 300),
    Section("strategies", "tests.gpu.strategies:Strategies", 270),
    Section("speed", "tests.gpu.speed:Speed", 180),
    Section("decoding", "tests.gpu.decoding:Decoding", 120),
)

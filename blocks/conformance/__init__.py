"""Checks that every block must pass, for this project and plug-ins: ``blockwright check``, ``cases``."""

from blockwright.blocks.conformance.cases import Case, Outcome, cases
from blockwright.blocks.conformance.kernel_parity import KernelCase, kernel_cases
from blockwright.blocks.conformance.setting import PromiseError

__all__ = ["Case", "KernelCase", "Outcome", "PromiseError", "cases", "kernel_cases"]

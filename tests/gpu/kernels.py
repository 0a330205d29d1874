"""Each implementation of each kernel against its reference, at the odd sizes of the conformance kit."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.conformance.kernel_parity import kernel_cases
from tests.gpu.answer import held, not_applicable


class Kernels:
    """Job: one implementation, call and precision a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.cases = {str(case): case for case in kernel_cases()}

    def about(self) -> dict[str, Any]:
        return {"cases": list(self.cases)}

    def turn(self, case: str) -> dict[str, Any]:
        """Whether it agrees."""
        found = self.cases[case].outcome()
        if found.status == "not applicable":
            return not_applicable(found.reason)
        return held(found.status == "passed", found.reason)

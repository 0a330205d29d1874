"""Checks that every block must pass, for this project and plug-ins: ``blockwright check``, ``cases``."""

from blocks.conformance.cases import Case, Outcome, PromiseError, cases

__all__ = ["Case", "Outcome", "PromiseError", "cases"]

"""Blockwright: compose decoders from named blocks, train them, swap a block, compare.

What this package exports (``__init__.pyi`` lists it, docs/api.md describes it) is the public interface, and changes are
recorded in CHANGELOG.md. Everything else is internal and may move.
"""

from blockwright.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)

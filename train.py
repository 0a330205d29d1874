"""Train a model.

``python train.py KEY=VALUE …`` composes conf/ with Hydra; ``python train.py fit|validate|test|predict`` is Lightning
CLI on the same configuration.
"""

from __future__ import annotations

from blockwright.training.entry.main import main

if __name__ == "__main__":
    main()

"""Settings of a study that takes seconds."""

SMALL = {"iterations": 2, "robots": 12, "episodes": 2, "held_out": 1}

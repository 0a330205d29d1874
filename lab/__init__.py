"""Measure and compare: costs, ablations, sweeps, reports."""

if __name__ != "blockwright.lab":  # the same code under a second name would register every block twice
    raise ImportError("lab is a part of blockwright: write `from blockwright.lab import …`")

"""Comparisons of corrections, found by the entry point ``blockwright.ablations``."""

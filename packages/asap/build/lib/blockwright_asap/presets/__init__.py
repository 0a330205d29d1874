"""The delta model's compositions, found by the entry point ``blockwright.presets``."""

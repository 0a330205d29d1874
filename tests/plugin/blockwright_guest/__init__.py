"""Blocks of a guest, one a file; pyproject.toml names them as entry points."""

"""Blocks of a plug-in, one a file; pyproject.toml names them as entry points."""

"""Decoder blocks, one a file, and what composes them."""

if __name__ != "blockwright.blocks":  # the same code under a second name would register every block twice
    raise ImportError("blocks is a part of blockwright: write `from blockwright.blocks import …`")

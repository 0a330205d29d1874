"""Checkpoints of Hugging Face and GGUF."""

if __name__ != "blockwright.interop":  # the same code under a second name would register every block twice
    raise ImportError("interop is a part of blockwright: write `from blockwright.interop import …`")

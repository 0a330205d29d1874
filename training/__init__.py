"""One run: tasks, data, optimizers, checkpoints, parallelism."""

if __name__ != "blockwright.training":  # the same code under a second name would register every block twice
    raise ImportError("training is a part of blockwright: write `from blockwright.training import …`")

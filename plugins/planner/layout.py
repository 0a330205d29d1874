"""How a training job is spread over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockwright.training.parallel.sizes import Sizes

Schedule = Literal["1f1b", "zero_bubble", "dualpipe"]
Precision = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Job:
    """What is to be trained with, whatever the layout.

    Args:
        gpus: their number
        batch: sequences of an optimizer step
        length: tokens of a sequence
        precision: of the matrix products
    """

    gpus: int
    batch: int
    length: int
    precision: Precision = "bf16"


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of GPUs, which multiply to their number, and how a micro-batch runs.

    Args:
        tensor: GPUs that split heads and widths
        pipeline: stages
        context: GPUs that split a sequence
        expert: GPUs over which the experts are distributed, among all but the stages
        interleave: stages that a GPU has, of one pipeline
        micro_batch: sequences
        shard: whether weights and gradients are spread over all data-parallel GPUs (FSDP2, ZeRO-3) and gathered for
            each micro-batch; else the optimizer state alone is (ZeRO-1)
        recompute: none, selective (feed-forward blocks), full, or a fraction of the forward pass
        schedule: of the pipeline
        stages: layers of each stage in the order of the model, ``interleave`` for each GPU: ``2*35 3 2*3 1``. The head
            is in the last stage, beside the layers of multi-token prediction. None: as much work in each
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    interleave: int = 1
    micro_batch: int = 1
    shard: bool = False
    recompute: str | float = "none"
    schedule: Schedule = "1f1b"
    stages: str | None = None

    @property
    def layers_of_stages(self) -> list[int]:
        """``stages``, a number for each."""
        counts = [word.partition("*") for word in (self.stages or "").split()]
        return [int(n) for n, _, times in counts for _ in range(int(times or 1))]

    def data(self, job: Job) -> int:
        """GPUs that read different sequences."""
        return job.gpus // (self.tensor * self.pipeline * self.context)

    def micro_batches(self, job: Job) -> int:
        """Of an optimizer step, on each GPU."""
        return max(1, job.batch // (self.data(job) * self.micro_batch))

    def tokens(self, job: Job) -> float:
        """Of a micro-batch, on each GPU."""
        return self.micro_batch * job.length / self.context

    def sizes(self, job: Job) -> Sizes:
        """Of one stage, as training/parallel knows them; GPUs that split a sequence share the weights too."""
        return Sizes(1, self.data(job), self.tensor, self.expert_in_shard, self.context)

    @property
    def expert_in_shard(self) -> int:
        """The rest of ``expert`` beside ``tensor``: experts are distributed over both, as training/parallel does."""
        return max(1, self.expert // self.tensor)

    def runs_here(self) -> bool:
        """Whether this project spreads a training so; others are for a framework that has pipelines."""
        return self.pipeline == 1 and self.shard

    def trains_here(self, job: Job) -> bool:
        """Whether this project trains the job so: its matrix products are not in fp8."""
        return self.runs_here() and job.precision == "bf16"

    def __str__(self) -> str:
        named = {"tp": self.tensor, "pp": self.pipeline, "cp": self.context, "ep": self.expert}
        words = [f"{name}{size}" for name, size in named.items() if size > 1]
        words += [f"vp{self.interleave}"] * (self.interleave > 1) + ["fsdp" if self.shard else "zero1"]
        words += [f"mb{self.micro_batch}"] + [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(words)

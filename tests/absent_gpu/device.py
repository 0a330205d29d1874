"""GPUs that are pretended: what ``torch.cuda`` answers for each, and what a kernel may take of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class Gpu(NamedTuple):
    """A kind of GPU.

    name: as its driver gives it
    capability: of its instructions
    shared: bytes of shared memory that a block of threads may ask for
    processors: streaming multiprocessors
    memory: bytes
    """

    name: str
    capability: tuple[int, int]
    shared: int
    processors: int
    memory: int


GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 166_912, 108, 80 << 30),
    "sm_90": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 232_448, 132, 80 << 30),
    "sm_100": Gpu("NVIDIA B200", (10, 0), 232_448, 148, 180 << 30),
}


class Built(NamedTuple):
    """What a kernel takes of a GPU.

    shared: bytes of shared memory
    spilled: bytes of registers that did not fit, stored and loaded
    registers: of a thread
    """

    shared: int
    spilled: int
    registers: int

    def fault(self, gpu: Gpu) -> str | None:
        """Why it cannot be launched on this GPU."""
        if self.shared > gpu.shared:
            return f"takes {self.shared:,} bytes of shared memory, and {gpu.name} has {gpu.shared:,}"
        return None


def pretend(gpu: Gpu) -> None:
    """Let ``torch.cuda`` answer as if this GPU were here, until the process ends."""
    seed = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": _properties(gpu), "get_device_capability": gpu.capability,
        "get_device_name": gpu.name, "get_arch_list": [f"sm_{gpu.capability[0]}{gpu.capability[1]}"],
        "is_bf16_supported": True, "is_current_stream_capturing": False, "mem_get_info": (gpu.memory, gpu.memory),
        "get_rng_state": seed, "set_rng_state": None, "synchronize": None, "_lazy_init": None, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.cuda.random.current_device = torch.cuda.current_device
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch.version.cuda = "13.0"


def _properties(gpu: Gpu) -> SimpleNamespace:
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.processors,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        warp_size=32,
        L2_cache_size=50 << 20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared,
        shared_memory_per_multiprocessor=gpu.shared + 1024,
        is_integrated=0,
        is_multi_gpu_board=0,
    )

"""Triton kernels that the compiler writes for a GPU that is not here: collected, made into machine code, measured."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import ASTSource

from tests.absent_gpu.device import Built, Gpu
from tests.absent_gpu.operations import calling

# A line of the code that Inductor writes which asks the GPU for something: a kernel of its own, or one of torch's.
LAUNCH = re.compile(r"^    .*(?:\.run\(|\bextern_kernels\.\w+\(|\btorch\.ops\.\S+\()", re.M)


class Driver(CudaDriver):
    """Triton's, of a GPU that is not here: names it, and launches nothing."""

    def __init__(self, gpu: Gpu) -> None:
        GPUDriver.__init__(self)
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": gpu.shared})


class Collector:
    """A backend of ``torch.compile`` that has Inductor write the kernels, keeps their source, and runs the graph as it
    was traced: tensors without memory cannot be computed with."""

    def __init__(self, gpu: Gpu) -> None:
        triton.runtime.driver.set_active(Driver(gpu))
        triton.knobs.nvidia.dump_ptxas_log = True
        config.use_static_cuda_launcher = False  # whose kernels forget what they take
        self.writes = True  # or traces only
        self.sources: dict[str, str] = {}  # source → what the kernel is called
        self.graphs = 0
        self._backend = aot_autograd(
            fw_compiler=self._write,
            bw_compiler=self._write,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )

    def __call__(self, graph: Any, inputs: Any, **_: Any) -> Any:
        self.graphs += 1
        return self._backend(graph, inputs)

    def _write(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        written: list[str] = []
        if self.writes:
            with _inductor(self._keep), patch.object(GraphLowering, "save_output_code", written.append):
                compile_fx_inner(_copy(graph), inputs)
        launches = sum(len(LAUNCH.findall(code)) for code in written)

        def run(inputs: list[Any]) -> Any:
            given = list(inputs)
            inputs.clear()
            with calling(launches):
                return graph(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def _keep(self, name: str, source: str, device_str: str = "cuda") -> Any:
        self.sources.setdefault(source, name)
        return None


def _copy(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Inductor's passes change the graph that they are given."""
    return torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))


@contextmanager
def _inductor(keep: Callable[..., Any]) -> Iterator[None]:
    """Inductor as far as writing the source. Its passes that compute constants, or need examples, are off."""
    kept, AsyncCompile.triton = AsyncCompile.triton, keep  # type: ignore[method-assign]
    changed = {
        "pattern_matcher": False,
        "joint_graph_constant_folding": False,
        "fx_graph_cache": False,
        "fallback_random": True,  # what replaces draws is one of those passes
        "compile_threads": 1,
        "triton.unique_kernel_names": False,
        "triton.descriptive_names": False,
    }
    try:
        with config.patch(changed):
            yield
    finally:
        AsyncCompile.triton = kept  # type: ignore[method-assign]


_logs: dict[str, str] = {}  # hash of a kernel → what ptxas said of it, in this process


def build(source: str, name: str, gpu: Gpu) -> Built:
    """Compile a kernel to machine code, in the first of the shapes that Inductor would try.

    A sum that loads rows ahead and does not fit is built without: so does Inductor, if no shape fits
    (``CachingAutotuner.compile_by_disabling_pipelining``). Attention is not: its first shape must fit.
    """
    tuner = getattr(PyCodeCache.load(source), "triton_" if "def triton_(" in source else name)
    first, said = tuner.configs[0], io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = tuner._precompile_config(first).kernel
        if kernel.metadata.shared > gpu.shared and first.kwargs.get("NUM_STAGES", 1) > 1:
            first.num_stages = first.kwargs["NUM_STAGES"] = 1
            said.truncate(said.seek(0))
            kernel = tuner._precompile_config(first).kernel
    if log := said.getvalue():  # nothing is said of machine code that was compiled before, from another source
        _logs[kernel.hash] = log
    return _measured(kernel, _logs[kernel.hash])


def _measured(kernel: Any, log: str) -> Built:
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    return Built(kernel.metadata.shared, spilled, registers)


def build_coded(name: str, bits: int, rows: int, gpu: Gpu) -> Built:
    """Compile a kernel of triton_products.py to machine code."""
    from blockwright.blocks.kernels import triton_products

    kernel, constants = getattr(triton_products, f"_{name}"), {"BITS": bits, "ROWS": rows}
    numbers = ["i32"] * (len(triton_products.Stored._fields) - 3)
    known = {"q": "*fp32", "w": "*fp32", "out": "*fp32", **dict.fromkeys(constants, "constexpr")}
    known["of"] = triton_products.Stored("*u8", "*bf16", "*i32", *numbers)
    signature = {name: known.get(name, "i32") for name in kernel.arg_names}
    capability, said = 10 * gpu.capability[0] + gpu.capability[1], io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    return _measured(built, said.getvalue())

"""What is held against a pretended GPU, one function a check."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.testing import CompileCounter

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.on_gpu import MATH, attention_kernels, every
from blockwright.training.compiling import compile_layers
from tests.absent_gpu import cases, planted
from tests.absent_gpu.device import Built, Gpu
from tests.absent_gpu.kernels import Collector, build, build_coded
from tests.absent_gpu.steps import MODE, attend, decode, layers_of, step
from tests.gpu.blocks_at_work import work


class Checks:
    """Checks by name, on one GPU. Each takes the name of what is tried, and returns figures."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.collector = Collector(gpu)
        self.built: dict[str, Built] = {}
        self._compile = torch.compile
        torch.compile = self._compiled  # type: ignore[assignment]

    def _compiled(self, *given: Any, backend: Any = "inductor", **options: Any) -> Any:
        """What this project compiles by itself is collected as well; ``torch.compile`` would run it."""
        return self._compile(*given, backend=self.collector if backend == "inductor" else backend, **options)

    def block(self, name: str) -> dict[str, Any]:
        """Forward, loss and backward of a block; of several documents too where they are kept apart."""
        return self._steps(cases.block(name), name.startswith(cases.OF_DOCUMENTS))

    def preset(self, name: str) -> dict[str, Any]:
        """The same of each kind of layer of a preset."""
        return self._steps(cases.published(name), True)

    def decode(self, name: str) -> dict[str, Any]:
        """One token of a preset's layers after a prompt, with caches."""
        self.collector.writes = False
        return {"operations": decode(cases.published(name))}

    def attending(self, name: str) -> dict[str, Any]:
        """The kernels that a preset's attention gets, none of which may hold all scores."""
        passes = attention_kernels(compose(cases.published(name), device="meta"), {"here": self.gpu.capability})["here"]
        if MATH in every(passes):
            raise AssertionError(f"torch would hold all scores: {passes}")
        return {"named": "; ".join(f"{kind} {', '.join(names)}" for kind, names in passes.items() if names)}

    def compiled(self, name: str) -> dict[str, Any]:
        """A block's layer compiled without a graph break, and its kernels built."""
        return self._collected(lambda: step(cases.block(name), False, self._prepare))

    def compiled_preset(self, name: str) -> dict[str, Any]:
        """The same of each kind of layer of a preset."""
        return self._collected(lambda: step(cases.published(name), False, self._prepare))

    def launches(self, name: str) -> dict[str, Any]:
        """Each kind of layer of a preset compiled, for what is called then; its kernels are written, not built."""
        torch._dynamo.reset()
        self.collector.writes = True
        return {"operations": step(cases.published(name), False, self._prepare)}

    def graphs(self, name: str) -> dict[str, Any]:
        """A preset's layers compiled as a run does, all of them: layers that compute alike share a graph."""
        torch._dynamo.reset()
        counted = CompileCounter()
        with MODE, torch.autocast("cuda", torch.bfloat16):
            decoder = layers_of(cases.published(name), every=True)
            compile_layers(decoder, backend=counted, fullgraph=True)  # type: ignore[arg-type]
            decoder.hidden(torch.zeros(1, 512, dtype=torch.long, device="cuda"))
        return {"named": f"{counted.frame_count} for {len(decoder.layers)} layers"}

    def timed(self, name: str) -> dict[str, Any]:
        """What tests/gpu times, at its real size."""
        with MODE:
            work(name, small=False, device="cuda", compiled=False).step()
        return {}

    def attention(self, name: str) -> dict[str, Any]:
        """FlexAttention's kernels for one way to score."""
        return self._collected(lambda: attend(cases.ATTENTIONS[name]))

    def coded(self, name: str) -> dict[str, Any]:
        """A product of attention to codes, built."""
        return self._fitting({name: build_coded(*cases.CODED[name], self.gpu)})

    def planted(self, name: str) -> dict[str, Any]:
        """A fault of planted.py, of which none may pass."""
        if name == "too_wide":
            return self._collected(lambda: attend(planted.TOO_WIDE, backward=False))
        if name == "all_scores_held":
            with planted.groups_kept():
                return self.attending("gemma4_e2b")
        config = cases.block("ffn/swiglu")
        if name == "graph_broken":
            return self._collected(lambda: step(config, False, lambda d: (planted.plant(name)(d), self._prepare(d))))
        if name == "number_read_decoding":
            return {"operations": decode(config, planted.plant("number_read"))}
        return {"operations": step(config, False, planted.plant(name))}

    def _steps(self, config: dict[str, Any], documents: bool) -> dict[str, Any]:
        self.collector.writes = False
        operations = step(config, False)
        if documents:
            step(config, True)
        return {"operations": operations}

    def _prepare(self, decoder: Decoder) -> None:
        compile_layers(decoder, fullgraph=True)

    def _collected(self, run: Any) -> dict[str, Any]:
        torch._dynamo.reset()
        self.collector.sources.clear()
        self.collector.writes = True
        run()
        return self._build()

    def _build(self) -> dict[str, Any]:
        if not self.collector.sources:
            raise AssertionError("no kernel was written")
        for source, name in self.collector.sources.items():
            if source not in self.built:
                self.built[source] = build(source, name, self.gpu)
        return self._fitting(
            {f"{name} {i}": self.built[s] for i, (s, name) in enumerate(self.collector.sources.items())}
        )

    def _fitting(self, made: dict[str, Built]) -> dict[str, Any]:
        """Figures of kernels by name, all of which the GPU can launch."""
        if faults := [f"{name} {fault}" for name, built in made.items() if (fault := built.fault(self.gpu))]:
            raise AssertionError("; ".join(faults))
        most = max(built.shared for built in made.values())
        return {"kernels": len(made), "shared": most, "spilled": max(built.spilled for built in made.values())}

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import check_lengths
from blockwright.plugins.alignment.rollouts.engine.native import Engine, Request
from blockwright.plugins.alignment.rollouts.record import Rollout, at_tokens
from blockwright.plugins.hub.exporting import export_decoder
from blockwright.registry import ConfigError, register
from blockwright.registry.errors import require
from blockwright.registry.ranges import Positive
from blockwright.registry.schema import Place

Share = Annotated[float, Gt(0), Lt(1)]


@register("engine", "vllm")
class Vllm(Engine):
    """Samples with vLLM (Kwon et al. 2023, arXiv 2309.06180) on weights exported to it before each rollout.

    Needs the package vllm and a model that exports as a published family. For one process with whole weights; vLLM
    takes a part of the same GPU. Its kernels round otherwise than the trainer's, so give ``task.correction``, and watch
    ``train/sampler_gap``. After each exchange of weights the trainer scores a completion itself: an exchange that
    failed would otherwise show as rewards of 0. Experts and the tokens sampled among are not reported: ``task.replay``
    has no effect on its rollouts, and top_k, top_p and min_p are refused.

    Not run by this project's tests, which hold its calls to a stand-in with vLLM's signatures (0.11).

    Args:
        memory: share of the GPU's memory that vLLM takes
        tolerance: largest mean difference of log-probabilities in nats, between vLLM and the trainer
        folder: for the exported weights; null for a temporary one, better on a RAM disk
    """

    def __init__(self, memory: Share = 0.3, tolerance: Positive = 0.1, folder: Place | None = None) -> None:
        self.memory, self.tolerance = memory, tolerance
        self.folder = folder
        self._engine: Any = None

    def sample(self, decoder: Decoder, request: Request) -> Rollout:
        check_lengths(decoder, request.prompts, request.new_tokens)
        if request.together:
            rule = "samples from whole weights in one process"
            raise ConfigError("task.engine", "vllm", rule, "Write task.engine=native, or trainer.devices=1")
        if request.sampling.narrows:
            rule = "does not report which tokens were sampled among, so updates could not be normalised over them"
            raise ConfigError("task.engine", "vllm", rule, "Write task.engine=native, or leave out top_k, top_p, min_p")
        self._exchange(decoder)
        found = self._generate(request)
        self._check(decoder, found, request.sampling.temperature)
        return found

    def _exchange(self, decoder: Decoder) -> None:
        """Give vLLM the present weights: it is started on them, later it reads them again."""
        require("vllm", "vllm", path="task.engine", value="vllm")
        if self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="blockwright-vllm-")
        out = Path(self.folder) / "weights"
        shutil.rmtree(out, ignore_errors=True)
        export_decoder(decoder, out)
        if self._engine is None:
            from vllm import LLM

            self._engine = LLM(
                model=str(out),
                skip_tokenizer_init=True,
                max_model_len=decoder.config["max_positions"],
                gpu_memory_utilization=self.memory,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
            )
        else:
            self._engine.collective_rpc("reload_weights")
            self._engine.reset_prefix_cache()

    def _generate(self, request: Request) -> Rollout:
        from vllm import SamplingParams

        prompts = [list(prompt) for prompt in request.prompts for _ in range(request.copies)]
        settings = [
            SamplingParams(
                temperature=request.sampling.temperature,
                seed=seed % 2**63,
                max_tokens=request.new_tokens,
                stop_token_ids=sorted(request.ends),
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for seed in request.seeds
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [each.outputs[0] for each in self._engine.generate(given, settings, use_tqdm=False)]
        completions = [list(answer.token_ids) for answer in answers]
        sampler = [
            [step[token].logprob for token, step in zip(ids, answer.logprobs, strict=True)]
            for ids, answer in zip(completions, answers, strict=True)
        ]
        return Rollout(prompts, completions, sampler, [answer.finish_reason == "stop" for answer in answers])

    @torch.no_grad()
    def _check(self, decoder: Decoder, found: Rollout, temperature: float) -> None:
        prompt, completion = found.prompts[0], found.completions[0]
        device = decoder.embedding.weight.device
        tokens = torch.tensor([[*prompt, *completion]], device=device, dtype=torch.int64)
        logits = decoder(tokens)[0, len(prompt) - 1 : -1] / (temperature or 1.0)
        own = at_tokens(logits, tokens[0, len(prompt) :])
        gap = float((own - torch.tensor(found.sampler[0], device=device, dtype=torch.float32)).abs().mean())
        if temperature and not gap <= self.tolerance:
            rule = f"its log-probabilities differ from the trainer's by {gap:.3g} nats per token: it has other weights"
            raise ConfigError("task.engine.tolerance", self.tolerance, rule, "Report it, or write task.engine=native")

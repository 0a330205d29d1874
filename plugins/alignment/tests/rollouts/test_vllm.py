"""Rollouts by vLLM, which is not installed here: a stand-in has the signatures that this project calls, and no others.

It loads what was exported and samples with this project's decoder, so files, arguments and answers are checked, and
that it serves the weights of each rollout; vLLM itself is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from aligned import MLA

import blockwright.plugins.alignment.rollouts.engine.vllm as engine
from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.rollouts.engine.native import Native, Request
from blockwright.plugins.alignment.rollouts.engine.vllm import Vllm
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError


class SamplingParams:
    def __init__(self, *, temperature: float, seed: int, max_tokens: int, stop_token_ids: list[int],
                 logprobs: int, detokenize: bool) -> None:  # fmt: skip
        self.__dict__ |= locals()


class LLM:
    """``vllm.LLM`` as far as it is called."""

    stale = False  # keeps serving the first weights
    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, *, skip_tokenizer_init: bool, max_model_len: int, gpu_memory_utilization: float,
                 logprobs_mode: str) -> None:  # fmt: skip
        assert skip_tokenizer_init and logprobs_mode == "processed_logprobs" and 0 < gpu_memory_utilization < 1
        self.folder, self.loads = Path(model), 0
        self.collective_rpc("reload_weights")
        LLM.made.append(self)

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        if self.loads and LLM.stale:
            return
        out = self.folder.parent / f"read{self.loads}"
        import_folder(self.folder, out)
        self.decoder = load(out, device=torch.device("cpu"))
        self.loads += 1

    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], *, use_tqdm: bool) -> Any:
        answers = []
        for prompt, how in zip(prompts, params, strict=True):
            sampling = Sampling(how.temperature)
            given = ([prompt["prompt_token_ids"]], [how.seed], how.max_tokens, sampling, how.stop_token_ids)
            request = Request(*given)
            found = Native().sample(self.decoder.eval(), request)
            steps = zip(found.completions[0], found.sampler[0], strict=True)
            logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in steps]
            reason = "stop" if found.ended[0] else "length"
            said = SimpleNamespace(token_ids=found.completions[0], logprobs=logprobs, finish_reason=reason)
            answers.append(SimpleNamespace(outputs=[said]))
        return answers


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(engine, "require", lambda *_, **__: None)
    monkeypatch.setattr(LLM, "stale", False)
    return LLM


@pytest.fixture
def decoder(tiny: Callable[..., Any], randomise: Callable[..., None]) -> Decoder:
    made = compose(tiny(moe=True, vocab_size=16, attention=MLA), seed=1)
    randomise(made, scale=2.0)
    return made.eval()


def request(**changes: Any) -> Request:
    given = {"prompts": [[5, 3, 9], [7]], "seeds": [1, 2, 3, 4], "new_tokens": 9, "sampling": Sampling(0.7)}
    return Request(**{**given, "ends": {1, 2, 3}, **changes})


@pytest.mark.slow
def test_completions_are_those_of_the_present_weights_and_stale_ones_are_noticed(
    vllm: type[LLM], decoder: Decoder, tmp_path: Path
) -> None:
    sampler = Vllm(folder=str(tmp_path))
    for _ in range(2):
        found, own = sampler.sample(decoder, request()), Native().sample(decoder, request())
        assert (found.prompts, found.completions, found.ended) == (own.prompts, own.completions, own.ended)
        for a, b in zip(found.sampler, own.sampler, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
        with torch.no_grad():
            decoder.output_weight.mul_(3)
    assert vllm.made[-1].loads == 2 and not found.experts
    vllm.stale = True
    with pytest.raises(ConfigError) as refusal:
        sampler.sample(decoder, request())
    assert refusal.value.path == "task.engine.tolerance"


def test_what_it_cannot_do_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ConfigError) as missing:
        Vllm().sample(decoder, request())
    assert "blockwright[vllm]" in missing.value.remedy
    for changes in ({"together": True}, {"sampling": Sampling(top_p=0.9)}):  # ranks; which tokens were left
        with pytest.raises(ConfigError) as refusal:
            Vllm().sample(decoder, request(**changes))
        assert refusal.value.path == "task.engine"

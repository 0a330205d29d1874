"""Memory of a GRPO step: at most 1.3 times that of pre-training on the same tokens."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.policy import Clip, Completions, PolicyObjective, TokenAverage, TokenRatio
from blockwright.plugins.alignment.rollouts.engine.native import Native, Request
from blockwright.plugins.alignment.rollouts.record import completion_mask, padded, score

ROWS, PROMPT, COMPLETION, V = 16, 32, 161, 32_768  # the last token of a completion is not read: 192 tokens a row
WIDTHS = {"kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
MLA = {"name": "mla", "n_heads": 4, **WIDTHS}


def pretrain(decoder: Decoder, rows: int = ROWS) -> None:
    tokens = torch.randint(0, V, (rows, PROMPT + COMPLETION))
    hidden, _ = decoder.hidden(tokens[:, :-1])
    (decoder.nll(hidden, tokens[:, 1:]) / tokens[:, 1:].numel()).backward()


def align(decoder: Decoder) -> None:
    """A rollout and its update, as ``task=grpo`` makes them."""
    prompts = torch.randint(0, V, (ROWS // 8, PROMPT)).tolist()
    found = Native().sample(decoder.eval(), Request(prompts, range(ROWS), COMPLETION, Sampling(), ()))
    logp = score(decoder.train(), found, 1.0).logp
    mask, advantage = completion_mask(found).float(), torch.randn(ROWS)
    objective = PolicyObjective(Clip(TokenRatio()), TokenAverage())
    loss, _ = objective(logp, Completions(logp.detach(), advantage, mask, padded(found.sampler)))
    (loss / mask.sum()).backward()


def _peak(step: Callable[[Decoder], None], decoder: Decoder, answer: Any) -> None:
    torch.manual_seed(0)
    pretrain(decoder, rows=1)  # what is only made once
    decoder.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests of this process have freed would be filled first
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmHWM")
    step(decoder)
    answer.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.slow
def test_step_of_grpo_takes_little_more_memory_than_pretraining(tiny: Callable[..., dict[str, Any]]) -> None:
    changes = {"vocab_size": V, "d_model": 256, "n_layers": 4, "max_positions": 256, "attention": MLA}
    decoder = compose(tiny(moe=True, **changes), seed=1)
    context, peaks = multiprocessing.get_context("fork"), []
    for step in (pretrain, align):
        answer = context.Queue()
        process = context.Process(target=_peak, args=(step, decoder, answer))
        process.start()
        peaks.append(answer.get(timeout=300))
        process.join()
    assert peaks[1] < 1.3 * peaks[0], peaks

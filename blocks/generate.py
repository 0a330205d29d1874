"""Continue a prompt: prefill the caches, then decode a token at a time.

Left out here: ragged batches, nucleus sampling, streaming. Every row of the prompt has the same length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.decoder import Decoder


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Sample a continuation.

    Args:
        decoder: in evaluation mode
        prompt: [B,T] int64, T ≥ 1
        new_tokens: how many to add
        temperature: divides the logits; 0 takes the likeliest token
        top_k: sample among the k likeliest only; None among all
        seed: of the draws

    Returns:
        [B,T + new_tokens]
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    caches = decoder.new_caches(prompt.shape[0], prompt.shape[1] + new_tokens)
    tokens, step = prompt, prompt
    for _ in range(new_tokens):
        hidden, _routings = decoder.hidden(step, caches=caches)
        logits = decoder.logits(hidden[:, -1]).float()
        step = sample(logits, temperature, top_k, generator)[:, None]
        tokens = torch.cat((tokens, step), 1)
    return tokens


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Logits [B,V] → a token for each row, [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

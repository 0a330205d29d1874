"""A memory by token: a row for each pair of tokens."""

import torch
from torch import nn

from blockwright import Memory, State, Table, register


@register("memory", "bigram")
class Bigram(Memory):
    """y_t = s ⊙ E[v_{t−1} · V + v_t mod rows], with a factor s for each channel."""

    silent, reach = ("scale",), 1

    def __init__(self, d_model: int, vocab_size: int, rows: int = 997) -> None:
        super().__init__()
        self.vocab_size, self.table, self.scale = vocab_size, Table(rows, d_model), nn.Parameter(torch.empty(d_model))

    def forward(self, x, given):
        ids, held = self.ids(given) + 1, given.cache
        ids = ids if held is None else held.without_padding(ids)
        history = torch.cat((torch.zeros_like(ids[:, :1]) if held is None else held.held["last"], ids), 1)
        before = history[:, :-1]
        if given.segments is not None:
            before = before * nn.functional.pad(given.segments.diff(dim=1) == 0, (1, 0))
        if held is not None:
            held.advance(ids.shape[1], {"last": held.tails("last", history)})
        y = self.scale * self.table((before * self.vocab_size + ids) % len(self.table.weight))
        return (y if x.ndim == 3 else y[:, :, None]).expand_as(x)

    def new_cache(self, batch, length, dtype, device):
        return State(batch, length, {"last": ((1,), torch.int64)}, device)

    def parallel_plan(self):
        return {"table.weight": "replicate", "scale": "replicate"}

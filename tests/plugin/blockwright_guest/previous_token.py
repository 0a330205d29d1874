"""A task in ten lines: docs/how-to/add-a-task.md."""

import torch

from blockwright import Scored, Task, register


def previous(batch):
    """The token before each, −100 where none is scored: at the first, and where the data scores none."""
    before = torch.cat([torch.full_like(batch["tokens"][:, :1], -100), batch["tokens"][:, :-1]], dim=1)
    return before.masked_fill(batch["targets"] == -100, -100)


@register("task", "previous_token")
class PreviousToken(Task):
    """Predicts the previous token."""

    def objective(self, batch, stage):
        hidden, routings = self.model.hidden(batch["tokens"])
        targets = previous(batch)
        return Scored(self.model.nll(hidden, targets), (targets != -100).sum(), routings=routings)

    def counts(self, batch):
        return {"total": (previous(batch) != -100).sum()}

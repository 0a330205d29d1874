"""Preference optimisation: DPO and its relatives, on pairs of answers."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blockwright.blocks.checkpoint.sharded import is_folder
from blockwright.blocks.checkpoint.source import checkpoint_of, load, read_composition
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.linear import switched_off
from blockwright.plugins.alignment.preferences import Answers, PreferenceLoss
from blockwright.plugins.alignment.tasks.pairs import Pairwise, of_sequences
from blockwright.registry import ConfigError, register
from blockwright.registry.replacing import replaced
from blockwright.registry.schema import Place
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.tasks.base import Batch
from blockwright.training.tasks.making import Setup

# --- log-probabilities of preferences under a reference policy, on disk: named by all that they depend on -------------


Logs = dict[str, Tensor]  # split → [pairs, 2], of the chosen and the rejected answer


def digest_of(start: Path, changes: Sequence[Any] = ()) -> str:
    """A digest of the files of weights in a run, a checkpoint or an imported folder.

    Args:
        start: the run, the checkpoint or the folder
        changes: as plain types, what else decides what the reference computes

    Raises:
        ConfigError: at ``init_from``: there are none
    """
    found = checkpoint_of(start)
    folder = start if found is None else found if is_folder(found) else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else [found]
    digest = hashlib.sha256()
    for path in files:
        assert path is not None
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if changes:
        digest.update(json.dumps(changes, sort_keys=True).encode())
    return digest.hexdigest()


def place(folder: Path, weights: str, pairs: str, precision: str) -> Path:
    """The file of log-probabilities.

    Args:
        folder: of all of them
        weights: digest of the reference
        pairs: digest of the data
        precision: of the forward pass, as the trainer names it
    """
    key = hashlib.sha256(json.dumps(["reference 1", weights, pairs, precision]).encode()).hexdigest()[:32]
    return folder / f"reference-{key}.npz"


def read(file: Path) -> Logs | None:
    """The log-probabilities in a file; None if there is none, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {split: torch.from_numpy(stored[split]) for split in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write(file: Path, logs: Logs) -> None:
    """Write a file atomically."""
    arrays: dict[str, Any] = {split: values.cpu().numpy() for split, values in logs.items()}
    with replaced(file) as partial, partial.open("wb") as stream:  # to a path NumPy would add .npz
        np.savez(stream, **arrays)


@register("task", "preference")
class Preference(Pairwise):
    """Raises the chosen answer of a pair above the rejected one.

    Rafailov et al. 2023 (DPO), arXiv 2305.18290; the loss is a registered kind, so IPO, SimPO and others are choices of
    ``task/preference``.

    Losses that compare with a reference policy need its log-probabilities of every answer. They are computed once, with
    the weights that training starts from, before the first step, and stored in ``data.cache_dir`` under a digest of
    weights, changes of the model, data and precision: no second model is in memory, and a resumed run reads the same
    numbers. Only where the reference is another model than the one at hand (another ``reference``, or a resumed run
    without its file) is it loaded, and freed before training. With an adapter, it is the model without it.

    Args:
        setup: the model and how it is trained
        preference: the loss of a pair
        reference: folder of the run or import that the policy is compared with; by default ``init_from``
    """

    improves: ClassVar[bool] = True
    default_children: ClassVar[Mapping[str, Any]] = {"preference": "sigmoid"}

    def __init__(self, setup: Setup, preference: PreferenceLoss, reference: Place | None = None) -> None:
        super().__init__(setup)
        self.loss = preference
        self.reference = setup.trained if reference is None else reference
        self._weights: str | None = None  # digest of the reference's, of this run or of the one that it resumes
        self._logs: Logs = {}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.loss.compares or self.reference is None or self._weights is not None:
            return
        try:
            checkpoint_of(Path(self.reference))
        except ConfigError as error:
            raise ConfigError("task.reference", error.value, error.rule, error.remedy) from None

    def on_train_start(self) -> None:
        super().on_train_start()
        self._compare()

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._compare()

    def compare(self, hidden: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        logp, tokens = answers_of(self.model, hidden, batch)
        known = self._logs[stage].to(logp.device)[batch["pair"]].unbind(1) if self.loss.compares else (None, None)
        n = len(batch["pair"])
        chosen, rejected = Answers(logp[:n], tokens[:n], known[0]), Answers(logp[n:], tokens[n:], known[1])
        return self.loss(chosen, rejected), self.loss.reward(chosen), self.loss.reward(rejected)

    # --- the reference --------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Read the log-probabilities under the reference, or compute and store them; together on all ranks."""
        if not self.loss.compares or self._logs:
            return
        digest = self._weights or self._digest()
        file = place(self.data.cache_dir, digest, self.data.key, str(self.trainer.precision))
        found = self.trainer.strategy.broadcast(read(file) if self.trainer.is_global_zero else None)
        if found is None:
            if self._weights not in (None, self._digest()):
                rule = "holds another model than this run was compared with, whose log-probabilities are gone"
                remedy = f"Restore {file}, or name a folder with that model"
                raise ConfigError("task.reference", self.reference, rule, remedy)
            found = self._compute()
            if self.trainer.is_global_zero:
                write(file, found)
        self._weights, self._logs = digest, found

    def _digest(self) -> str:
        if self.reference is None:
            rule = f"the loss {type(self.loss).__name__} compares with the weights that training began with"
            remedy = "Name them: init_from=RUN; or use a loss without a reference: task/preference=simpo"
            raise ConfigError("task.reference", None, rule, remedy)
        return digest_of(Path(self.reference), self._changes())

    def _changes(self) -> list[Any]:
        """What the model that training begins with depends on beyond the weights in ``reference``; empty if it is the
        model there. A resumed run does not make that model again."""
        if self.reference is None or self.reference != self.configured.trained or self.trainer.ckpt_path is not None:
            return []
        recipe = next((start.recipe() for start in self.configured.starts if start.derives), None)
        if recipe is None and read_composition(Path(self.reference)) == self.model_config:
            return []
        return [self.model_config, self.seed, recipe]

    @torch.no_grad()
    def _compute(self) -> Logs:
        first = self.trainer.ckpt_path is None and self.trainer.global_step == 0
        decoder = self.model if first and self.reference == self.configured.trained else self._load()
        decoder.eval()
        found: Logs = {}
        with self.as_in_a_step, switched_off(decoder):
            for split in SPLITS:
                found[split] = self.ranks().sum(self._compute_split(decoder, split)).cpu()
        self.model.train(self.trainer.training)
        return found

    def _load(self) -> Decoder:
        like = self.model.embedding.weight
        decoder = load(Path(str(self.reference)), dtype=like.dtype, device=like.device)
        return decoder.choose_kernels(self.configured.kernels)

    def _compute_split(self, decoder: Decoder, split: Split) -> Tensor:
        """This rank's part, 0 elsewhere [pairs, 2]."""
        logs = torch.zeros(self.data.number(split), 2, device=self.device, dtype=torch.float32)
        for batch in self.data.every(split):
            there = self.trainer.strategy.batch_to_device(batch)
            hidden, _ = decoder.hidden(there["tokens"], there["positions"], there["segments"])
            logp, _ = answers_of(decoder, hidden, there)
            logs[there["pair"]] = logp.view(2, -1).T
        return logs

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self._weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._weights = checkpoint.get("reference")


def answers_of(decoder: Decoder, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability and scored tokens of each conversation of a batch of pairs, [2·P]."""
    scored, number = batch["sequence"] >= 0, 2 * len(batch["pair"])
    sequence = batch["sequence"][scored]
    logits = decoder.logits(hidden[scored]).float()
    logp = -F.cross_entropy(logits, batch["targets"][scored], reduction="none")
    return of_sequences(logp, sequence, number), of_sequences(torch.ones_like(logp), sequence, number)

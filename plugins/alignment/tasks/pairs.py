"""Tasks on pairs of answers: preference optimisation (DPO and its relatives), and reward models."""

from __future__ import annotations

import hashlib
import json
import zipfile
from abc import abstractmethod
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
from blockwright.plugins.alignment.data.preferences import PreferenceDataModule
from blockwright.plugins.alignment.preferences import Answers, PreferenceLoss, bradley_terry
from blockwright.plugins.alignment.tasks.needed_data import data_of
from blockwright.registry import ConfigError, register
from blockwright.registry.folder import replaced
from blockwright.registry.ranges import NonNegative
from blockwright.registry.schema import Place
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.figure import EVERY, Figure, names_in
from blockwright.training.tasks.base import Batch, Task
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.means import Scored


class Pairwise(Task):
    """A task on pairs of a chosen and a rejected answer. A subclass defines ``compare``.

    The loss is the mean over all pairs of the optimizer step. Multi-token prediction is not trained.
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("loss", "nats per pair", "less", EVERY),
        Figure("accuracy", "of pairs", "more", EVERY),
        Figure("margin", "of reward", "more", EVERY),
        Figure("chosen", "of reward", None, EVERY),  # of DPO both may fall, of a reward model both may be shifted
        Figure("rejected", "of reward", None, EVERY),
    )
    steady: ClassVar[bool] = False  # a batch is as long as its longest answer
    reads: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segments", "positions", "sequence", "pair")

    @abstractmethod
    def compare(self, hidden: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards of the chosen and of the rejected answers, [P] each.

        Args:
            hidden: of the batch's tokens [B,T,D]
            batch: of ``PreferenceDataModule``
            stage: ``train``, ``val`` or ``test``
        """

    def configure_model(self) -> None:
        super().configure_model()
        if any(p.requires_grad for p in self.model.mtp.parameters()):
            rule = "a task on pairs trains no multi-token prediction"
            frozen = list(self.configured.frozen)
            raise ConfigError("task.frozen", frozen, rule, "Freeze it: task.frozen=[mtp]; or model.mtp=null")

    def on_fit_start(self) -> None:
        _ = self.data  # refused before the first batch
        super().on_fit_start()

    @property
    def data(self) -> PreferenceDataModule:
        """The data module; another kind is refused."""
        rule = "this task compares answers, which the data does not give"
        return data_of(self, PreferenceDataModule, rule, "Use data=preferences, or experiment=preference_sort")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"total": torch.tensor(len(batch["pair"]), dtype=torch.int64)}

    def objective(self, batch: Batch, stage: str) -> Scored:
        hidden, routings = self.model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        loss, chosen, rejected = self.compare(hidden, batch, stage)
        with torch.no_grad():
            each = {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected}
            sums = {name: value.sum() for name, value in {**each, "chosen": chosen, "rejected": rejected}.items()}
        count = torch.tensor(len(loss), device=loss.device, dtype=torch.int64)
        if stage == "train":
            figures = {name: self.step.mean(value, "total") for name, value in sums.items()}
            return Scored(loss.sum(), count, figures=figures, routings=routings)
        for name, value in {**sums, "loss": loss.sum(), "pairs": count}.items():
            self._measured[name] = self._measured.get(name, 0) + value.detach().double()
        return Scored(loss.sum(), count, routings=routings)

    def _begin(self, stage: str) -> None:
        super()._begin(stage)
        self._measured: dict[str, Tensor] = {}

    def _conclude(self, stage: str) -> None:
        names = [name for name in names_in(stage, self.figures) if name in self._measured]
        *sums, pairs = self.ranks().sum(torch.stack([self._measured[name] for name in (*names, "pairs")]))
        for name, value in zip(names, sums, strict=True):
            self.log(f"{stage}/{name}", (value / pairs).float())
        self.log_dict(self.loads.figures(stage))


def of_sequences(values: Tensor, sequence: Tensor, number: int) -> Tensor:
    """Sums of values [n] over the sequences that they belong to, [number]; in a fixed order, unlike ``index_add``.

    Args:
        values: of scored tokens
        sequence: the number of the sequence of each [n]
        number: of sequences
    """
    own = sequence == torch.arange(number, device=sequence.device)[:, None]
    return (own * values).sum(1)


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


@register("task", "reward")
class RewardModel(Pairwise):
    """Scores the chosen answer of a pair above the rejected one.

    Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155: −log σ(score(chosen) − score(rejected)). The score of an answer
    is a linear function of the last hidden state at the token that ends it. Its weights are the row of the output layer
    for the tokenizer's end token, as NVIDIA's Nemotron reward models use a row of theirs: so a reward model has the
    shape of the model that it starts from, and is sharded, resumed, exported and opened like it. Others add a layer.

    The reward ``reward_model`` scores completions with such a run.

    Args:
        setup: the model and how it is trained
        centre: weight of (score(chosen) + score(rejected))², which keeps scores around 0; 0.01 in TRL's examples
    """

    def __init__(self, setup: Setup, centre: NonNegative = 0.0) -> None:
        super().__init__(setup)
        self.centre = centre

    def compare(self, hidden: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor, Tensor]:
        number = 2 * len(batch["pair"])
        flat, own = batch["sequence"].flatten(), torch.arange(number, device=hidden.device)[:, None]
        places = torch.arange(len(flat), device=hidden.device)
        last = torch.where(flat == own, places, -1).amax(1) + 1  # the target there is the end token, read one later
        scores = self.model.logits(hidden.flatten(0, 1)[last])[:, self.data.tokenizer.eos].float()
        chosen, rejected = scores.view(2, -1).unbind()
        return bradley_terry(chosen, rejected, self.centre), chosen, rejected

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also store how conversations are written, for the reward ``reward_model``."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_model"] = {"chat": self.data.chat.node()}

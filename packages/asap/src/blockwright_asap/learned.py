"""A trained composition as a correction: any decoder that the registry can compose, over the last steps of each robot.

A decoder reads tokens; here it reads features. They are written as a weighted sum of its embeddings, one for each
feature and one for a constant, and the first numbers of its logits are what it says. So nothing stands before or behind
the decoder, and every block, plan, optimizer and checkpoint is that of a language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import blockwright
from blockwright_asap.labels import BOUND
from blockwright_asap.replay import N_FEATURES, features
from blockwright_asap.robot import NS, NU

WIDTH = {"action": NU, "state": NS}  # what is corrected → numbers of a correction
NEEDED = max(N_FEATURES + 1, *WIDTH.values())  # vocab_size, at least


def predict(decoder: blockwright.Decoder, x: Tensor, width: int, caches: Any = None) -> tuple[Tensor, Any]:
    """Standardised features [B,T,17] → corrections [B,T,width] in their own standard deviations, and the routings.

    Args:
        decoder: of a vocabulary of at least 18
        x: features
        width: numbers of a correction
        caches: of the decoder, with the steps before
    """
    ones = torch.ones_like(x[..., :1])
    embedded = torch.cat([x, ones], -1) @ decoder.embedding.weight[: N_FEATURES + 1].to(x.dtype)
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    hidden, routings = decoder.hidden(tokens, embedded=embedded * decoder.embedding_scale, caches=caches)
    return decoder.logits(hidden)[..., :width], routings


class Learned:
    """A correction that remembers the last features of each robot, and a prompt of measured ones if it learnt with one.

    The prompt is read once, into the decoder's caches; each step is read behind it. A robot that begins an episode has
    no past: its steps are read from the first on, as the first steps of a window are in learning.

    Args:
        decoder: trained
        statistics: ``mean`` and ``std`` of the features [17], ``scale`` of the labels [width]
        facts: ``corrects``, ``history`` and ``prompt`` of the data
        limit: largest correction [width]
    """

    def __init__(
        self,
        decoder: blockwright.Decoder,
        statistics: dict[str, Tensor],
        facts: Mapping[str, Any],
        limit: np.ndarray,
    ) -> None:
        self.decoder, self.statistics, self.limit = decoder.eval(), statistics, limit
        self.corrects, self.history, self.prompt = facts["corrects"], facts["history"], facts["prompt"]
        self._past: Tensor | None = None  # features [N,history+1,17], the first ``known`` of each robot
        self._known = np.zeros(0, int)
        self._prompted: list[tuple[Any, Any]] = []  # caches, and where the prompt ends in them

    def action(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return self._say(qpos, qvel, command) if self.corrects == "action" else np.zeros((len(qpos), NU))

    def state(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        return self._say(qpos, qvel, command) if self.corrects == "state" else np.zeros((len(qpos), NS))

    def forget(self, who: np.ndarray) -> None:
        if len(self._known) != len(who):
            self._past, self._known = None, np.zeros(len(who), int)
        self._known = np.where(who, 0, self._known)

    @torch.no_grad()
    def show(self, measured: np.ndarray) -> None:
        x, length = self._standard(measured), self.history + 1
        last = x[:, -length:]
        self._past = torch.cat([last, last.new_zeros(len(x), length - last.shape[1], x.shape[-1])], 1)
        self._known = np.full(len(x), last.shape[1])
        if self.prompt:
            caches = self.decoder.new_caches(len(x), self.prompt + length)
            predict(self.decoder, x[:, -self.prompt :], WIDTH[self.corrects], caches)
            self._prompted = [(cache, cache.mark()) for cache in caches]

    def state_dict(self) -> dict[str, np.ndarray]:
        return {} if self._past is None else {"past": self._past.numpy().copy(), "known": self._known.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._past = torch.from_numpy(np.array(state["past"])) if state else None
        self._known = np.array(state["known"]) if state else np.zeros(0, int)

    @torch.no_grad()
    def _say(self, qpos: np.ndarray, qvel: np.ndarray, command: np.ndarray) -> np.ndarray:
        past, now = self._remember(self._standard(features(qpos, qvel, command)))
        for cache, mark in self._prompted:
            cache.rewind(mark)
        caches = [cache for cache, _ in self._prompted] or None
        said, _ = predict(self.decoder, past, WIDTH[self.corrects], caches)
        return np.clip((said[now] * self.statistics["scale"]).double().numpy(), -self.limit, self.limit)

    def _standard(self, found: np.ndarray) -> Tensor:
        return (torch.from_numpy(found).float() - self.statistics["mean"]) / self.statistics["std"]

    def _remember(self, x: Tensor) -> tuple[Tensor, tuple[np.ndarray, np.ndarray]]:
        """The past of each robot with the present, and where in it the present is; the rest is not read."""
        if self._past is None or len(self._past) != len(x):
            self._past, self._known = x.new_zeros(len(x), self.history + 1, x.shape[-1]), np.zeros(len(x), int)
        full = torch.from_numpy(self._known > self.history)
        self._past = torch.where(full[:, None, None], self._past.roll(-1, 1), self._past)
        now = (np.arange(len(x)), np.minimum(self._known, self.history))
        self._past[now] = x
        self._known = now[1] + 1
        return self._past, now


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def read(run: Path) -> Learned:
    """The correction that a run of ``experiment=asap_delta`` has trained.

    Raises:
        ConfigError: there is no such checkpoint, or it is of another task
    """
    file = checkpoint(run)
    decoder = blockwright.load(file)
    state = torch.load(file, weights_only=True, mmap=True)
    facts = state["hyper_parameters"].get("asap")
    if facts is None:
        raise blockwright.ConfigError("data.drift", str(run), "is no run of experiment=asap_delta", "Name one")
    statistics = {name: state["state_dict"][name].clone() for name in ("mean", "std", "scale")}
    limit = np.full(NU, BOUND) if facts["corrects"] == "action" else 4 * statistics["scale"].numpy()
    return Learned(decoder, statistics, facts, limit)

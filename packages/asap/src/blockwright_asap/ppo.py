"""PPO with an asymmetric critic and a learning rate held to a KL, as papers on legged robots use it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from blockwright_asap.replacing import replaced

GAMMA, LAMBDA, CLIP, KL = 0.99, 0.95, 0.2, 0.016
HORIZON, EPOCHS, MINIBATCHES = 24, 5, 4
SLOWEST, FASTEST = 1e-4, 2e-3  # learning rates


class Environment(Protocol):
    """What PPO needs of a world of robots; Tracking is one, and the replay of real rollouts (ppo_delta.py)."""

    progress: float

    def observe(self) -> tuple[np.ndarray, np.ndarray]: ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any, np.ndarray]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def mlp(inputs: int, outputs: int, hidden: tuple[int, ...] = (128, 128)) -> nn.Sequential:
    widths, layers = (inputs, *hidden), []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class ActorCritic(nn.Module):
    """Two MLPs over standardised observations, and a standard deviation for each action.

    Args:
        n_actor, n_critic: numbers that each sees
        n_actions: of the actor
        std: of the actions, at the start
        seed: of the weights
    """

    count: Tensor  # of observations in the statistics

    def __init__(self, n_actor: int, n_critic: int, n_actions: int, std: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.critic = mlp(n_actor, n_actions), mlp(n_critic, 1)
        with torch.no_grad():
            last = self.actor[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(0.05)
            last.bias.zero_()
        self.log_std = nn.Parameter(torch.full((n_actions,), math.log(std)))
        for name, width in (("actor", n_actor), ("critic", n_critic)):
            self.register_buffer(f"{name}_mean", torch.zeros(width, dtype=torch.float32))
            self.register_buffer(f"{name}_var", torch.ones(width, dtype=torch.float32))
        self.register_buffer("count", torch.tensor(1e-3, dtype=torch.float32))

    def see(self, actor: Tensor, critic: Tensor) -> None:
        """Add observations to the statistics. Only between iterations: within one, every ratio would be wrong."""
        share = actor.shape[0] / (self.count + actor.shape[0])
        for x, name in ((actor, "actor"), (critic, "critic")):
            mean, var = getattr(self, f"{name}_mean"), getattr(self, f"{name}_var")
            off = x.mean(0) - mean
            mean += off * share
            var += (x.var(0, unbiased=False) - var + off * off * (1 - share)) * share
        self.count += actor.shape[0]

    def act(self, observed: Tensor) -> Tensor:
        """Means of the actions."""
        return self.actor(self._standard(observed, "actor"))

    def value(self, observed: Tensor) -> Tensor:
        return self.critic(self._standard(observed, "critic")).squeeze(-1)

    def __call__(self, observed: np.ndarray) -> np.ndarray:
        """The likeliest actions, as arrays: what is deployed."""
        with torch.no_grad():
            return self.act(_tensor(observed)).double().numpy()

    def _standard(self, x: Tensor, name: str) -> Tensor:
        mean, var = getattr(self, f"{name}_mean"), getattr(self, f"{name}_var")
        return ((x - mean) / (var + 1e-4).sqrt()).clamp(-8, 8)


class PPO:
    """Training that can be stopped after any iteration and continued bit for bit.

    Args:
        environment: of the robots
        net: trained in place
        iterations: in all; the environment's curriculum runs over them
        seed: of actions and minibatches
        lr: at the start; then held to the KL
        entropy: weight
        statistics: iterations in which the statistics of observations are updated; 0 to keep those of ``net``
        least_std: of the actions
    """

    def __init__(
        self,
        environment: Environment,
        net: ActorCritic,
        iterations: int,
        seed: int,
        lr: float = 1e-3,
        entropy: float = 0.003,
        statistics: int = 60,
        least_std: float = 0.1,
    ) -> None:
        self.environment, self.net, self.iterations = environment, net, iterations
        self.lr, self.entropy, self.statistics, self.least_std = lr, entropy, statistics, least_std
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        self.done, self.rewards = 0, list[float]()
        self.seen = [_tensor(each) for each in environment.observe()]
        if statistics:
            net.see(*self.seen)

    def train(self, file: Path | None = None, every: int = 20) -> None:
        """Run all iterations.

        Args:
            file: of the state, written every so many iterations; one that is there is continued
            every: iterations
        """
        if file is not None and file.exists():
            self.load_state_dict(torch.load(file, weights_only=True))
        while self.done < self.iterations:
            self.iterate()
            if file is not None and (self.done % every == 0 or self.done == self.iterations):
                state = self.state_dict()
                with replaced(file) as partial:
                    torch.save(state, partial)

    def iterate(self) -> None:
        """Act for ``HORIZON`` steps with every robot, then update."""
        self.environment.progress = self.done / max(1, self.iterations)
        batch, fresh = self._collect()
        for _ in range(EPOCHS):
            order = torch.randperm(len(batch["advantage"]), generator=self.generator)
            for part in order.split(len(order) // MINIBATCHES):
                self._update({name: value[part] for name, value in batch.items()})
        if self.done < self.statistics:
            self.net.see(*fresh)
        self.done += 1

    @torch.no_grad()
    def _collect(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        net, std, steps = self.net, self.net.log_std.exp(), []
        for _ in range(HORIZON):
            actor, critic = self.seen
            mean = net.act(actor)
            action = mean + std * torch.randn(mean.shape, generator=self.generator, dtype=torch.float32)
            reward, done, timeout, seen, last = self.environment.step(action.double().numpy())
            gained, late = _tensor(reward), _tensor(timeout)
            if timeout.any():  # an episode that ends by its time alone would have continued
                gained = gained + GAMMA * net.value(_tensor(last)) * late
            log_probability = _log_probability(action, mean, std)
            steps.append((actor, critic, action, mean, log_probability, net.value(critic), gained, _tensor(done)))
            self.seen = [_tensor(each) for each in seen]
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        actor, critic, action, mean, log_probability, value, rewards, ended = columns
        advantage = _advantages(rewards, value, ended, net.value(self.seen[1]))
        self.rewards.append(float(rewards.mean()))
        spread = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        batch = {"actor": actor, "critic": critic, "action": action, "mean": mean, "before": log_probability}
        batch |= {"value": value, "aim": advantage + value, "advantage": spread}
        flat = {name: each.flatten(0, 1) for name, each in batch.items()}
        flat["std"] = std.expand_as(flat["action"])
        return flat, (flat["actor"], flat["critic"])

    def _update(self, part: dict[str, Tensor]) -> None:
        net = self.net
        mean, std = net.act(part["actor"]), net.log_std.exp()
        self._hold_to_kl(part, mean.detach(), std.detach())
        ratio = (_log_probability(part["action"], mean, std) - part["before"]).exp()
        gain = part["advantage"]
        policy = torch.max(-gain * ratio, -gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        value = net.value(part["critic"])
        near = part["value"] + (value - part["value"]).clamp(-CLIP, CLIP)
        fit = torch.max((value - part["aim"]) ** 2, (near - part["aim"]) ** 2).mean()
        loss = policy + fit - self.entropy * net.log_std.sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            net.log_std.clamp_(min=math.log(self.least_std))

    def _hold_to_kl(self, part: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
        """A larger rate where the policy hardly moved since the rollout, a smaller one where it moved too far."""
        old = part["std"]
        moved = (std.log() - old.log() + (old**2 + (part["mean"] - mean) ** 2) / (2 * std**2) - 0.5).sum(-1).mean()
        if moved > 2 * KL:
            self.lr = max(SLOWEST, self.lr / 1.5)
        elif moved < KL / 2:
            self.lr = min(FASTEST, self.lr * 1.5)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "environment": _as_tensors(self.environment.state_dict()),
            "generator": self.generator.get_state(),
            "seen": self.seen,
            "plain": {"lr": self.lr, "done": self.done, "rewards": self.rewards},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.environment.load_state_dict(_as_arrays(state["environment"]))
        self.generator.set_state(state["generator"])
        self.seen = state["seen"]
        self.lr, self.done, self.rewards = (state["plain"][name] for name in ("lr", "done", "rewards"))


def _advantages(reward: Tensor, value: Tensor, done: Tensor, after: Tensor) -> Tensor:
    """Generalised advantage estimates [T,N], from the last step back."""
    running, found = torch.zeros_like(after), []
    for t in reversed(range(len(reward))):
        delta = reward[t] + GAMMA * after * (1 - done[t]) - value[t]
        running = delta + GAMMA * LAMBDA * (1 - done[t]) * running
        found.append(running)
        after = value[t]
    return torch.stack(found[::-1])


def _log_probability(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of independent normal actions, without the constant."""
    return (-0.5 * ((action - mean) / std) ** 2 - std.log()).sum(-1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


def _as_tensors(state: Any) -> Any:
    """Arrays as tensors, so that a file holds plain data and tensors alone."""
    if isinstance(state, dict):
        return {name: _as_tensors(value) for name, value in state.items()}
    return torch.from_numpy(state) if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _as_arrays(value) for name, value in state.items()}
    return state.numpy() if isinstance(state, Tensor) else state

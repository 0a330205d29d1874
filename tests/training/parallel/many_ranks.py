"""Several ranks in one test: forked processes that train tiny models through Lightning, over gloo."""

from __future__ import annotations

import io
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup
from tests.training.parallel.quiet import quiet_trainer

VOCABULARY, LENGTH, WINDOWS, BATCHES = 40, 12, 8, 4
LEAST = 1e-2

DENSE = """
vocab_size: 40
d_model: 32
n_layers: 2
attention: {name: gqa, n_heads: 4, n_kv_heads: 2}
position: rope
ffn: {name: swiglu, d_ff: 48}
norm: rmsnorm
residual: prenorm
init: {std: 0.1}
"""
MOE = (
    DENSE.replace("ffn: {name: swiglu, d_ff: 48}", "ffn: {name: moe, n_experts: 8}")
    + """
gating: {name: softmax_topk, top_k: 2, balance: [{name: hf_expert, alpha: 0.02}, {name: z_loss}]}
experts: {name: swiglu, d_ff: 16}
"""
)
DEEPSEEK = """
vocab_size: 40
d_model: 32
n_layers: 3
attention: {name: mla, n_heads: 4, q_lora_rank: 12}
position: rope
ffn: {name: moe, n_experts: 8, shared: {name: swiglu, d_ff: 24}}
gating:
  {name: group_limited, n_groups: 4, top_groups: 2, top_k: 3, scaling: 2.0, balance: [{name: expert}, {name: device}]}
experts: {name: swiglu, d_ff: 16}
norm: rmsnorm
residual: prenorm
layout: {ffn: swiglu*1 ffn*}
init: {std: 0.1}
"""
BIASED = DEEPSEEK.replace(
    "{name: group_limited, n_groups: 4, top_groups: 2, top_k: 3, scaling: 2.0,",
    "{name: sigmoid_bias, top_k: 3, bias_step: 0.05,",
)
SOLVED = BIASED.replace("sigmoid_bias, top_k: 3, bias_step: 0.05,", "sigmoid_quantile, top_k: 3,")
GPT = (
    DENSE.replace("n_kv_heads: 2}", "n_kv_heads: 4, bias: true}")
    .replace("{name: swiglu, d_ff: 48}", "{name: gelu, d_ff: 48, bias: true}")
    .replace("position: rope", "position: learned\nmax_positions: 16\ntie_embeddings: true")
)
ALIBI = DENSE.replace("rope", "alibi")
MTP = BIASED + "mtp: {depth: 2, loss_weight: 0.3}\n"
STREAMS = (
    DENSE.replace("residual: prenorm", "residual: mhc").replace("n_layers: 2", "n_layers: 3")
    + "values: value_residual\nmtp: {depth: 1, loss_weight: 0.3}\n"
)
# What crosses depth, and losses of attentions, both of which layers fill for those above them.
CARRIED = DENSE.replace(
    "n_kv_heads: 2}", "n_kv_heads: 2, selector: {name: dsa, n_heads: 4, head_dim: 8, top_k: 3}}"
) + ("values: value_residual\n")
SOURCES = STREAMS.replace("residual: mhc", "residual: {name: attention_residual, block: 2}")
PLUGIN = (
    MOE.replace("{name: gqa, n_heads: 4, n_kv_heads: 2}", "{name: retention, n_heads: 4}")
    .replace("position: rope", "position: xpos")
    .replace("{name: softmax_topk, top_k: 2,", "{name: noisy_topk, noise: 0, top_k: 2,")
)
MODELS = {"dense": DENSE, "moe": MOE, "deepseek": DEEPSEEK}


class Descent(OptimizerRecipe):
    """Plain gradient descent: a gradient that is a factor off shows at once, as Adam hides it."""

    def build(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.3, foreach=False)


class Tokens(Dataset[dict[str, Tensor]]):
    """Windows whose numbers of scored tokens differ, several documents in each where they are packed."""

    def __init__(self, packed: bool = False) -> None:
        draw = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCABULARY, (WINDOWS * BATCHES, LENGTH + 1), generator=draw)
        self.scored = torch.randint(3, LENGTH + 1, (WINDOWS * BATCHES,), generator=draw)
        self.cuts = torch.randint(1, LENGTH, (WINDOWS * BATCHES,), generator=draw) if packed else None

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        tokens = self.tokens[rows]
        place = torch.arange(LENGTH).expand(len(rows), -1)
        targets = tokens[:, 1:].masked_fill(place >= self.scored[rows, None], IGNORED)
        batch = {"tokens": tokens[:, :-1], "targets": targets, "positions": place, "n_bytes": self.scored[rows]}
        if self.cuts is not None:
            batch["segments"] = (place >= self.cuts[rows, None]).long()
            batch["positions"] = place - batch["segments"] * self.cuts[rows, None]
        return batch


class Order(Sampler[list[int]]):
    """The rest of an epoch of global batches, from where training stands; each rank's slice of them."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        sharing = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        share = WINDOWS // sharing["num_replicas"]
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed % BATCHES
        for batch in range(first, BATCHES):
            begin = batch * WINDOWS + sharing["rank"] * share
            yield list(range(begin, begin + share))


class Windows(L.LightningDataModule):
    """The same global batches at any number of ranks."""

    def __init__(self, data: Dataset[dict[str, Tensor]]) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_sampler=Order(self.trainer), collate_fn=lambda batch: batch)


class Double(CausalLM):
    """In double precision, which Lightning does not offer where it shards: rounding can then explain no difference."""

    def configure_model(self) -> None:
        fresh = self.decoder is None
        super().configure_model()
        if fresh:
            self.decoder.double()  # type: ignore[union-attr]


class Curve(L.Callback):
    """The loss of each optimizer step, as the task logs it."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


class Restored(L.Callback):
    """Keeps the weights with which training continues."""

    def on_train_start(self, trainer: Any, task: Any) -> None:
        from blockwright.training.parallel.local import whole

        self.weights = {name: whole(t.detach()).clone() for name, t in task.decoder.state_dict().items()}


def train(
    model: str,
    *,
    strategy: Mapping[str, Any] | str = "auto",
    devices: int = 1,
    steps: int = 20,
    optimizer: Any = None,
    task: Mapping[str, Any] | None = None,
    packed: bool = False,
    data: Dataset[dict[str, Tensor]] | None = None,
    double: bool = False,
    ckpt_path: str | None = None,
    save: str | None = None,
    then: Callable[[L.Trainer, CausalLM], Any] | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    """Train, and tell the losses and, on rank 0, all final weights."""
    from blockwright.training.parallel.strategy import Parallel

    torch.manual_seed(0)
    curve = Curve()
    own = {key: value for key, value in (task or {}).items() if key == "z_loss"}
    how = {key: value for key, value in (task or {}).items() if key not in own}
    setup = Setup(read_model(model), optimizer or AdamW(lr=3e-3), Constant(), **how)
    learner = (Double if double else CausalLM)(setup, **own)
    runner = quiet_trainer(
        devices=devices,
        strategy=strategy if isinstance(strategy, str) else Parallel(**strategy),
        callbacks=[curve, *trainer.pop("callbacks", [])],
        **{"max_steps": steps, "log_every_n_steps": 1, "gradient_clip_val": 0.5, **trainer},
    )
    runner.fit(learner, Windows(data or Tokens(packed)), ckpt_path=ckpt_path, weights_only=True)
    if save is not None:
        runner.save_checkpoint(save)
    extra = then(runner, learner) if then else None
    from blockwright.training.parallel.local import whole

    weights = {name: whole(tensor.detach()).cpu().clone() for name, tensor in learner.decoder.state_dict().items()}  # type: ignore[union-attr]
    return {"losses": curve.losses, "weights": weights if runner.is_global_zero else {}, "extra": extra}


def read_model(text: str) -> dict[str, Any]:
    from blockwright.blocks.compose import check

    return check(text)


def far(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    """The greatest relative difference of losses, and of weights, each tensor's as a share of its norm.

    A norm below LEAST counts as LEAST: a bias of keys has no gradient but noise, for the softmax does not see it.
    """
    losses = [abs(a - b) / abs(b) for a, b in zip(one["losses"], two["losses"], strict=True)]
    assert one["weights"].keys() == two["weights"].keys()
    apart = []
    for name, weight in one["weights"].items():
        other = two["weights"][name].double()
        apart.append(float((weight.double() - other).norm() / other.norm().clamp(min=LEAST)))
    return float(torch.tensor(losses).max()), float(torch.tensor(apart).max())  # NaN if one is


def spawn(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``work(*arguments)`` on so many forked ranks that see one another as torchrun's would; their results."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.SimpleQueue()
    over = context.Event()  # a rank that left early would reset the connections that the others still read
    processes = [
        context.Process(target=_rank, args=(r, ranks, port, queue, over, work, arguments)) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    results: dict[int, tuple[str | None, Any]] = {}
    for _ in processes:
        _await(queue, processes)
        rank, outcome = torch.load(io.BytesIO(queue.get()), weights_only=False)
        results[rank] = outcome
        if outcome[0]:  # the others may wait for it; or it is the one that missed a rank that was killed
            _raise_if_killed(processes)
            for process in processes:
                process.kill()
            break
    else:
        over.set()  # not after a kill: it would wait for those to wake that were killed while they waited
    for process in processes:
        process.join()
    broken = {rank: error for rank, (error, _) in results.items() if error}
    assert not broken, "\n".join(f"rank {rank}:\n{error}" for rank, error in broken.items())
    return [results[rank][1] for rank in range(ranks)]


class EndedError(Exception):
    """A rank ended without a result, by its exit code."""


def _await(queue: Any, processes: Sequence[Any]) -> None:
    """Wait for a result, or end all ranks if one of them was killed."""
    while queue.empty():
        _raise_if_killed(processes)
        time.sleep(0.01)


def _raise_if_killed(processes: Sequence[Any]) -> None:
    killed = [process.exitcode for process in processes if (process.exitcode or 0) < 0]
    if killed:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        raise EndedError(killed)


def _rank(
    rank: int, ranks: int, port: int, queue: Any, over: Any, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo")  # once: Lightning takes what is there, and a test may train many times
    try:
        outcome: tuple[str | None, Any] = (None, work(*arguments))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    try:
        packed = io.BytesIO()  # whole bytes: tensors would be shared with a process that is about to end
        torch.save((rank, outcome), packed)
        queue.put(packed.getvalue())
        over.wait()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

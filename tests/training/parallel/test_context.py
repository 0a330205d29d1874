"""Context parallelism computes what one process does: checked on what two or four ranks have computed."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from counting import FirstStep
from many_ranks import BIASED, DEEPSEEK, DENSE, GPT, MOE, MTP, STREAMS, Descent, EndedError, Restored, far, spawn, train
from pairwise import each
from torch import Tensor, nn

from blockwright.blocks.attention.base import Attention, even_heads
from blockwright.blocks.attention.scoring import score_bias
from blockwright.blocks.base import Keys, Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import attention as attending
from blockwright.blocks.position.base import Position
from blockwright.registry import register
from blockwright.training.checkpoints.saving import SealedCheckpoints
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.parallel.arithmetic import holdings, traffic, weight_numbers
from blockwright.training.parallel.context import Context
from blockwright.training.parallel.ranks import DataRanks, balance_over
from blockwright.training.parallel.sizes import sizes_of
from blockwright.training.tasks.causal_lm import count_scored

pytestmark = pytest.mark.xdist_group("context")

CLOSE = 1e-5  # relative, fp32
# A sum of terms that cancel, as the gradient of a factor of all heads, differs by more than CLOSE in fp32.
PRECISION = {2: torch.float32, 4: torch.float64}
LENGTH, ROWS, WORDS = 48, 2, 80

CHOOSES = {"name": "dsa", "n_heads": 4, "head_dim": 8, "top_k": 9}
GQA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "mha": {"name": "mha", "n_heads": 4},
    "gqa": {**GQA, "qk_norm": "per_head", "scores": "sinks"},
    "gated": {**GQA, "output_gate": "elementwise", "scores": {"name": "softcap"}},
    "mqa": {"name": "mqa", "n_heads": 4},
    "composed": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "scores": {"name": "dcmha", "rank": 1, "width": 5}},
    "window": {"name": "sliding_window", "n_heads": 4, "window": 11},
    "mla": {"name": "mla", "n_heads": 4},
    "mla, queries compressed": {"name": "mla", "n_heads": 4, "q_lora_rank": 12},
    "gqa, dsa": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "selector": CHOOSES},
    "mla, shared": {"name": "mla", "n_heads": 4, "selector": {"name": "shared", "of": CHOOSES, "every": 2}},
    "mha, block": {"name": "mha", "n_heads": 4, "selector": {"name": "block", "block_size": 5, "top_k": 2}},
    "plug-in": {"name": "plain_plugin", "n_heads": 4},
    "differential": {"name": "differential", "n_heads": 4},
    "differential, dsa": {"name": "differential", "n_heads": 4, "selector": CHOOSES},
    "canon": {"name": "gqa", "n_heads": 4, **dict.fromkeys(("query_conv", "key_conv"), "canon"), "value_conv": "silu"},
    "mla, canon": {"name": "mla", "n_heads": 4, "query_conv": "canon", "latent_conv": {"name": "canon", "taps": 8}},
    "shared_kv": {"name": "shared_kv", "n_heads": 4, "n_groups": 2, "window": 11},
    "gqa, borrowed": {**GQA, "kv_source": "borrowed"},
    "window, borrowed": {"name": "sliding_window", "n_heads": 4, "window": 11, "kv_source": "borrowed"},
    "mla, borrowed": {"name": "mla", "n_heads": 4, "kv_source": "borrowed"},
}
POSITIONS = ("none", "rope", "rope_linear", "rope_llama3", "rope_ntk", "yarn", "alibi", "learned", "sinusoidal")
NO_EXPERTS = {"ffn": {"name": "swiglu", "d_ff": 24}}
OF_DEVICES = {"device": {"n_devices": 4}, "communication": {"n_devices": 4, "top_devices": 2}}
BALANCES = [{"name": name, "alpha": 0.5, **OF_DEVICES.get(name, {})} for name in ("expert", *OF_DEVICES)]
BALANCES += [{"name": name, "alpha": 0.5} for name in ("hf_expert", "z_loss")]
EXPERTS = {
    "ffn": {"name": "moe", "n_experts": 8, "shared": {"name": "swiglu", "d_ff": 24}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": BALANCES},
    "experts": {"name": "swiglu", "d_ff": 16},
}
FEEDS: dict[str, dict[str, Any]] = {"dense": NO_EXPERTS, "moe": EXPERTS, "moe, mtp": {**EXPERTS, "mtp": {"depth": 2}}}
WIDE = {"name": "canon", "taps": 14}  # a chunk and more
FEEDS["canon"] = {"ffn": {**NO_EXPERTS["ffn"], "gate_conv": WIDE, "up_conv": "silu"}, "mtp": {"depth": 2}}
FEEDS["canon"]["residual"] = {"name": "convolved", "residual": "prenorm", "attention_conv": "canon", "ffn_conv": "silu"}
FEEDS["canon"]["residual"] |= {"attention_out_conv": WIDE, "ffn_out_conv": "canon"}
OWN = [name for name, node in ATTENTIONS.items() if "kv_source" not in node]
ALL = each(OWN[::2], POSITIONS, ("packed", "whole"), ("moe, mtp",))
SOME = [
    ("mha", "alibi", "packed", "dense"), ("gqa", "yarn", "packed", "moe"),
    ("gated", "rope_llama3", "packed", "dense"), ("mqa", "learned", "whole", "moe"),
    ("window", "rope", "packed", "moe, mtp"), ("window", "alibi", "whole", "dense"),
    ("mla", "yarn", "packed", "moe, mtp"), ("mla, queries compressed", "none", "whole", "moe, mtp"),
    ("mla", "alibi", "packed", "dense"), ("gqa, dsa", "rope", "packed", "moe, mtp"),
    ("mla, shared", "rope", "packed", "moe"), ("mha, block", "none", "packed", "moe"),
    ("plug-in", "rope", "packed", "moe"), ("plug-in", "alibi", "packed", "dense"),
    ("differential", "rope", "packed", "moe"), ("differential", "alibi", "whole", "dense"),
    ("differential, dsa", "rope", "packed", "moe"), ("gqa", "banded", "packed", "dense"),
    ("window", "banded", "whole", "dense"), ("mla", "log_scaled", "packed", "dense"),
    ("composed", "between", "packed", "dense"), ("window", "between", "packed", "dense"),
    ("shared_kv", "rope", "packed", "dense"), ("gqa, borrowed", "rope", "packed", "dense"),
    ("window, borrowed", "alibi", "whole", "moe"), ("mla, borrowed", "rope", "packed", "dense"),
    ("canon", "rope", "packed", "canon"), ("mla, canon", "alibi", "whole", "canon"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def plug_in(blocks_of_the_module: None) -> Iterator[None]:
    """Blocks that know a contract alone, as another package would write them."""

    @register("attention", "plain_plugin")
    class PlainPlugin(Attention):
        def __init__(self, d_model: int, position: Position, n_heads: int = 4) -> None:
            super().__init__()
            self.head_dim, self.position = even_heads(d_model, n_heads), position
            self.project = nn.Linear(d_model, 3 * d_model, bias=False)
            self.output = nn.Linear(d_model, d_model, bias=False)

        def forward(self, x: Tensor, given: Pass) -> Tensor:
            segments, cache = given.segments, given.cache
            q, k, v = self.project(x).unflatten(-1, (-1, self.head_dim)).chunk(3, 2)
            q, k = self.position.rotate(q, k, given.positions)
            k, v = (k, v) if cache is None else cache.append(k, v)
            scores = torch.einsum("btnh,bsnh->bnts", q, k) / self.head_dim**0.5
            bias = score_bias(self.position, Queries(x, q, given.positions), given)
            scores = scores if bias is None else scores + bias
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)[None, None]
            if segments is not None:
                hidden = hidden | (segments[:, None, :, None] != segments[:, None, None])
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            return self.output(torch.einsum("bnts,bsnh->btnh", weights, v).flatten(-2))

        def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
            heads = self.output.in_features // self.head_dim
            return Cache(batch, length, dict.fromkeys(("k", "v"), (heads, self.head_dim)), dtype, device)

        def parallel_plan(self) -> dict[str, Any]:
            return {"project.weight": "replicate", "output.weight": "replicate"}

    @register("position", "between")
    class Between(Position):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.gate = nn.Linear(d_model, n_heads, bias=False)

        def slots(self) -> dict[str, tuple[int, ...]]:
            return {"fade": (self.gate.out_features,)}

        def remember(self, x: Tensor, positions: Tensor, declared: int) -> tuple[Tensor, ...]:
            return (torch.nn.functional.logsigmoid(self.gate(x)),)

        def bias(self, queries: Queries, keys: Keys) -> Tensor:
            since = keys.noted[0].cumsum(1)
            return since[:, -queries.q.shape[1] :].mT[..., None] - since.mT[:, :, None]

        def parallel_plan(self) -> dict[str, Any]:
            return {"gate.weight": "column"}

    yield


def model(attention: str, position: str, feed: str) -> Decoder:
    composition = {
        "vocab_size": WORDS, "d_model": 32, "n_layers": 2, "max_positions": 64, "attention": ATTENTIONS[attention],
        "position": position, "norm": "rmsnorm", "residual": "prenorm", "init": {"std": 0.1}, **FEEDS[feed],
    }  # fmt: skip
    if "kv_source" in ATTENTIONS[attention]:  # the first layer lends what the second reads
        composition["overrides"] = [{"layers": 0, "attention": {"kv_source": "lent"}}]
    return compose(copy.deepcopy(composition), seed=1)


def batch(packing: str) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    # No token twice in a row: where nothing rotates, their keys are equal, and rounding decides which is chosen.
    tokens = torch.stack([torch.randperm(WORDS, generator=draw)[: LENGTH + 1] for _ in range(ROWS)])
    place, targets = torch.arange(LENGTH).expand(ROWS, -1), tokens[:, 1:].clone()
    targets[0, :7] = -100
    if packing == "whole":
        return {"tokens": tokens[:, :-1], "targets": targets, "positions": place[:1], "segments": None}
    begins = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    for row, cut in ((0, 5), (0, 29), (1, 12), (1, 24), (1, 47)):  # inside chunks and at their borders
        begins[row, cut] = cut
    starts = begins.cummax(1).values
    segments = (begins > 0).long().cumsum(1)
    return {"tokens": tokens[:, :-1], "targets": targets, "positions": place - starts, "segments": segments}


def loss(decoder: Decoder, given: dict[str, Any], share: Any) -> tuple[dict[str, Tensor], list[Any], int]:
    """Sums over this rank's tokens, its mean balance losses, the loads."""
    at = given["positions"], given["segments"]
    hidden, routings = decoder.hidden(given["tokens"], *at, share=share)
    targets = given["targets"] if share is None else share.take(given["targets"])
    sums = {"nll": decoder.nll(hidden, targets)}
    if len(decoder.mtp):
        depths, further = decoder.mtp_nll(hidden, given["tokens"], given["targets"], *at, share=share)
        routings = [*routings, *further]
        sums |= {f"mtp{k}": nll for k, (nll, _) in enumerate(depths)}
    means = [value for r in routings if r is not None for value in r.losses.values()]
    balance = torch.stack(means).sum() if means else hidden.new_zeros(())
    loads = [r.load for r in routings if r is not None]
    return {**sums, "balance": balance}, loads, int(count_scored(targets))


def compared(case: tuple[str, str, str, str]) -> dict[str, float]:
    """How far this rank's share of a pass, summed over ranks, is from one process's, relative to the greatest."""
    attention, position, packing, feed = case
    n, given = dist.get_world_size(), batch(packing)
    whole, spread = (model(attention, position, feed).to(PRECISION[n]) for _ in range(2))
    ranks = DataRanks(n, dist.get_rank())
    balance_over(spread, ranks, ranks)
    one_by_one = packing == "packed"  # one head at a time, or all
    attending.KEPT, attending.EXPANDED = (0, 1) if one_by_one else (2**26, 2**28)
    share = Context(dist.group.WORLD, n, dist.get_rank()).share(LENGTH)  # type: ignore[arg-type]
    values, loads, scored = loss(whole, given, None)
    own, own_loads, own_scored = loss(spread, given, share)
    torch.stack(list(values.values())).sum().backward()
    # a mean is averaged over ranks, a sum is not
    torch.stack([value / (n if name == "balance" else 1) for name, value in own.items()]).sum().backward()
    found = {"scored": abs(float(ranks.sum(torch.tensor(own_scored))) - scored)}
    for name, value in values.items():
        total = ranks.sum(own[name]) / (n if name == "balance" else 1)
        found[name] = float((total - value).abs() / value.abs().clamp(min=1e-6))
    found["load"] = max(
        (float((ranks.sum(o) - w).abs().max()) for w, o in zip(loads, own_loads, strict=True)), default=0
    )
    greatest = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    for (name, p), q in zip(whole.named_parameters(), spread.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = max(float(p.grad.abs().max()), 1e-3 * greatest)
            found[f"gradient of {name}"] = float((ranks.sum(q.grad) - p.grad).abs().max()) / scale
    return found


STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "context": (2, {"context": 2}),
    "shards": (4, {"context": 2}),
    "copies": (4, {"context": 2, "replicate": 2}),
    "heads": (4, {"context": 2, "tensor": 2}),
    "experts": (4, {"context": 2, "expert": 4}),
}
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mtp, packed": (MTP, {"packed": True}),
    "mtp, packed, recomputed": (MTP, {"packed": True, "task": {"activation_checkpointing": "full"}}),
    "batch-wide balance, accumulated": (MOE, {"accumulate_grad_batches": 2}),
    "biases and tied embeddings": (GPT, {}),
    "deepseek, z loss": (DEEPSEEK, {"task": {"z_loss": 0.01, "activation_checkpointing": "selective"}}),
    "dense, packed": (DENSE, {"packed": True}),
    "streams, packed": (STREAMS, {"packed": True}),
}
TRAINED = [
    ("context", "mtp, packed, recomputed"), ("context", "batch-wide balance, accumulated"),
    ("context", "biases and tied embeddings"), ("context", "streams, packed"), ("shards", "dense, packed"),
    ("copies", "dense, packed"), ("heads", "deepseek, z loss"), ("experts", "mtp, packed"),
]  # fmt: skip


def bits_per_byte(trainer: L.Trainer, task: Any) -> float:
    """As logged: text is counted with whole windows, losses with shares of them."""
    return float(trainer.callback_metrics["train/bits_per_byte"])


def training(case: str, strategy: Any = "auto", devices: int = 1, **more: Any) -> dict[str, Any]:
    text, settings = TRAININGS[case]
    return train(
        text,
        strategy=strategy,
        devices=devices,
        **{"optimizer": Descent(), "steps": 2, "then": bits_per_byte, **settings, **more},
    )


def trainings(devices: int) -> dict[tuple[str, str], Any]:
    chosen = [(name, case) for name, case in TRAINED if STRATEGIES[name][0] == devices]
    return {(name, case): training(case, STRATEGIES[name][1], devices) for name, case in chosen}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_training_under_each_strategy_is_that_of_one_process(devices: int) -> None:
    for (name, case), found in spawn(devices, trainings, devices)[0].items():
        alone = training(case)
        losses, weights = far(found, alone)
        assert losses < CLOSE and weights < CLOSE, (name, case, losses, weights)
        assert found["extra"] == pytest.approx(alone["extra"], rel=CLOSE), (name, case)


OTHERS: dict[str, Any] = {"tensor": {"tensor": 2}, "ddp": "ddp"}
HALF = {"optimizer": AdamW(lr=1e-3), "steps": 2}
REST = {"optimizer": AdamW(lr=1e-3), "steps": 4}


def settings_of(strategy: Any, devices: int = 2) -> dict[str, Any]:
    plugins = {} if isinstance(strategy, dict) else {"plugins": [SealedCheckpoints()]}  # which reads folders too
    return {"strategy": strategy, "devices": devices, **plugins}


def resumed(path: Path, strategy: Any, devices: int = 2) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that were restored, and the rest of the training."""
    restored = Restored()
    rest = train(BIASED, ckpt_path=str(path), callbacks=[restored], **settings_of(strategy, devices), **REST)
    return restored.weights, rest


def handed_over(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each checkpoint holds, and what is resumed from it."""
    context, saved = {"context": 2}, {}
    for form in ("file", "folder"):
        written = {**context, "sharded_checkpoints": form == "folder"}
        saved[form] = train(BIASED, save=str(folder / form), **settings_of(written), **HALF)["weights"]
    found = {(form, name): resumed(folder / form, OTHERS[name]) for form, name in each([*saved], list(OTHERS))}
    saved["ddp"] = train(BIASED, save=str(folder / "ddp"), **settings_of("ddp"), **HALF)["weights"]
    found["ddp", "context"] = resumed(folder / "ddp", context)
    return saved, found


@pytest.mark.slow
def test_checkpoint_is_bitwise_the_same_under_any_other_strategy(tmp_path: Path) -> None:
    saved, found = spawn(2, handed_over, tmp_path)[0]
    found["folder", "alone"] = resumed(tmp_path / "folder", "auto", 1)
    whole = train(BIASED, **REST)
    assert len(found) == 4
    for (source, name), (weights, rest) in found.items():
        assert all(torch.equal(weights[key], value) for key, value in saved[source].items()), (source, name)
        losses, apart = far(rest, {**whole, "losses": whole["losses"][2:]})
        assert losses < CLOSE and apart < CLOSE, (source, name)


class Killed(L.Callback):
    """Saves after every step; a rank of it kills itself in the middle of the third."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _trained(path: Path | None = None, **more: Any) -> dict[str, Any]:
    settings = {"optimizer": AdamW(lr=3e-3), "steps": 4, "packed": True, **more}
    return train(MTP, strategy={"context": 2}, devices=2, ckpt_path=path and str(path), **settings)


def _killed(path: Path) -> None:
    _trained(callbacks=[Killed(path)])


@pytest.mark.slow
def test_killed_run_resumes_bitwise(tmp_path: Path) -> None:
    whole = spawn(2, _trained)[0]
    with pytest.raises(EndedError):
        spawn(2, _killed, tmp_path / "last.ckpt")
    rest = spawn(2, _trained, tmp_path / "last.ckpt")[0]
    assert len(rest["losses"]) == 2 and rest["losses"] == whole["losses"][2:]
    assert all(torch.equal(value, rest["weights"][name]) for name, value in whole["weights"].items())


UNBALANCED = DEEPSEEK.replace("balance: [{name: expert}, {name: device}]", "balance: null")  # counts are not traffic
assert UNBALANCED != DEEPSEEK


def travelled(names: list[str]) -> dict[str, dict[str, int]]:
    done = {}
    for name in names:
        spy, (devices, strategy) = FirstStep(), STRATEGIES[name]
        train(UNBALANCED, strategy=strategy, devices=devices, steps=1, callbacks=[spy])
        done[name] = {kind: n for kind, n in spy.counted.bytes.items() if n}
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "names"), [(2, ["context"]), (4, ["heads"])])
def test_bytes_that_travel_are_those_of_the_formula(devices: int, names: list[str]) -> None:
    decoder, tokens = compose(UNBALANCED, device="meta"), 8 * 12
    for rank in spawn(devices, travelled, names):
        for name, counted in rank.items():
            sizes = sizes_of(STRATEGIES[name][1], devices)
            plan = traffic(decoder, sizes, tokens // sizes.data // sizes.context)
            assert counted == {kind: n for kind, n in plan.items() if n}, name
            # MLA: C + R numbers of each token of the windows that a rank shares, a layer
            weights = 4 * weight_numbers(holdings(decoder, sizes), sizes)["all_gather"]
            assert counted["all_gather"] - weights == 4 * 3 * (32 + 4) * tokens // sizes.data, name


def work(cases: list[tuple[str, str, str, str]]) -> dict[Any, dict[str, float]]:
    return {case: compared(case) for case in cases}


def check(ranks: int, cases: list[tuple[str, str, str, str]]) -> None:
    for case, found in spawn(ranks, work, cases)[0].items():
        bounds = {name: (5 if ranks == 2 and name.endswith("factors") else 1) * CLOSE for name in found}
        far = {name: value for name, value in found.items() if not value < bounds[name]}
        assert not far, (case, far)


@pytest.mark.slow
def test_two_ranks_that_share_sequences_compute_what_one_does() -> None:
    check(2, SOME)


@pytest.mark.slow
def test_every_position_whole_and_packed_on_four_ranks() -> None:
    check(4, ALL)

"""Whatever the strategy, training is that of one process: checked on what two or four ranks have computed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import many_ranks
import pytest
import torch
from counting import FirstStep
from many_ranks import BIASED, DEEPSEEK, MODELS, PLUGIN, Descent, Restored, far, read_model, spawn, train
from pairwise import each

from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.compose import compose
from blockwright.training.checkpoints.saving import SealedCheckpoints
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.matrices import HeadMuon, Muon
from blockwright.training.parallel import exchange
from blockwright.training.parallel.arithmetic import held_bytes, traffic
from blockwright.training.parallel.dry_run import Meter
from blockwright.training.parallel.local import regions
from blockwright.training.parallel.sizes import Sizes, sizes_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("agreement")]  # its fixtures run whole programs, once

ROOT = Path(__file__).parent.parent.parent.parent
CLOSE = 1e-5  # relative, fp32
STRATEGIES: dict[str, tuple[int, Any]] = {
    "ddp": (2, "ddp"), "fsdp": (2, {}), "tp": (2, {"tensor": 2}), "ep": (2, {"expert": 2}),
    "hsdp": (4, {"replicate": 2}), "fsdp_tp": (4, {"tensor": 2}), "fsdp_ep": (4, {"expert": 2}),
    "tp_ep": (4, {"tensor": 2, "expert": 2}),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": (DEEPSEEK, {}),
    "dense": (many_ranks.DENSE, {}),
    "biased, packed, accumulated, recomputed": (
        BIASED,
        {"packed": True, "accumulate_grad_batches": 2, "task": {"activation_checkpointing": "full"}},
    ),
    "solved, selective": (many_ranks.SOLVED, {"task": {"activation_checkpointing": "selective"}}),
    "biases and tied embeddings": (many_ranks.GPT, {}),
    "heads that cannot be split": (many_ranks.ALIBI, {}),
    "batch-wide balance": (many_ranks.MOE, {}),
    "multi-token prediction": (many_ranks.MTP, {"packed": True}),
    "muon": (DEEPSEEK, {"optimizer": Muon(lr=1e-2, ns_dtype="float32")}),
    "muon by head": (DEEPSEEK, {"optimizer": HeadMuon(lr=1e-2, ns_dtype="float32")}),
    "plug-in": (PLUGIN, {}),
    "streams": (many_ranks.STREAMS, {"packed": True, "task": {"activation_checkpointing": "full"}}),
    "sources": (many_ranks.SOURCES, {}),
    "carried": (many_ranks.CARRIED, {"packed": True, "task": {"activation_checkpointing": "full"}}),
}
PAIR = [
    *(
        ("fsdp", case)
        for case in ("biased, packed, accumulated, recomputed", "muon", "muon by head", "sources", "carried")
    ),
    *(
        ("tp", case)
        for case in ("deepseek", "biases and tied embeddings", "heads that cannot be split", "plug-in", "streams")
    ),
    *(("ep", case) for case in ("batch-wide balance", "solved, selective", "multi-token prediction", "plug-in")),
]
FOUR = [("hsdp", "deepseek"), ("fsdp_tp", "dense"), ("fsdp_ep", "biased, packed, accumulated, recomputed")]
FOUR += [("tp_ep", "deepseek"), ("tp_ep", "muon"), ("tp_ep", "muon by head")]
HALF = {"optimizer": AdamW(lr=1e-3), "steps": 2}  # in the middle of an epoch
REST = {"optimizer": AdamW(lr=1e-3), "steps": 4}


class Traffic(FirstStep):
    """Counts the rows that experts exchange, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows, self.exchange = width, list[float](), exchange.exchange

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        exchange.exchange = self._spy if trainer.global_step == 0 else self.exchange
        super().on_train_batch_start(trainer)

    def _spy(self, received: list[int], sent: list[int], group: Any, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if any(part.shape[1] == self.width for part in parts):
            self.rows.append((sum(received) + sum(sent)) / 2)
        return self.exchange(received, sent, group, *parts)

    def on_train_end(self, *_: Any) -> None:
        exchange.exchange = self.exchange


def run(case: str, strategy: Any = "auto", devices: int = 1, **more: Any) -> dict[str, Any]:
    text, settings = CASES[case]
    return train(text, strategy=strategy, devices=devices, **{"optimizer": Descent(), "steps": 2, **settings, **more})


def work(todo: list[tuple[str, str]], measured: list[str]) -> dict[Any, Any]:
    done: dict[Any, Any] = {}
    for name, case in todo:
        devices, strategy = STRATEGIES[name]
        done[name, case] = run(case, strategy, devices)
    for name in measured:
        devices, strategy = STRATEGIES[name]
        meter, counted = Meter(), Traffic(32)
        train(DEEPSEEK, strategy=strategy, devices=devices, steps=1, callbacks=[meter, counted])
        done["measured", name] = meter.bytes, dict(counted.counted.bytes), counted.rows
    return done


@pytest.fixture(scope="module", autouse=True)
def plugin(blocks_of_the_module: None) -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tests" / "plugin"))
    forget_plugin()  # an earlier test may have imported it and removed its names again
    import blockwright_guest.noisy_topk
    import blockwright_guest.retention
    import blockwright_guest.xpos  # noqa: F401

    yield
    sys.path.remove(str(ROOT / "tests" / "plugin"))
    forget_plugin()


def forget_plugin() -> None:
    for name in [name for name in sys.modules if name.startswith("blockwright_guest")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def alone(plugin: None) -> dict[str, Any]:
    return {case: run(case) for case in dict.fromkeys(case for _, case in PAIR + FOUR)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def pair(plugin: None) -> list[dict[Any, Any]]:
    return spawn(2, work, PAIR, ["fsdp", "tp", "ep"])


@pytest.fixture(scope="module")
def four(plugin: None) -> list[dict[Any, Any]]:
    return spawn(4, work, FOUR, ["tp_ep"])


@pytest.mark.parametrize(("strategy", "case"), PAIR + FOUR, ids=lambda v: v)
def test_ranks_train_what_one_does(strategy, case, pair, four, alone):
    found = (pair if STRATEGIES[strategy][0] == 2 else four)[0][strategy, case]
    losses, weights = far(found, alone[case])
    assert losses < CLOSE and weights < CLOSE


def _measured(name: str, pair: list[Any], four: list[Any]) -> tuple[Sizes, list[Any]]:
    devices, strategy = STRATEGIES[name]
    return sizes_of(strategy, devices), [rank["measured", name] for rank in (pair if devices == 2 else four)]


@pytest.mark.parametrize("name", ["fsdp", "tp", "ep", "tp_ep"])
def test_what_each_rank_holds_and_what_travels_is_what_the_plan_says(name, pair, four):
    sizes, ranks = _measured(name, pair, four)
    decoder = compose(DEEPSEEK, device="meta")
    holds = held_bytes(decoder, sizes, AdamW())
    layers = [region.name for region in regions(decoder, dense=False)]
    for held, counted, rows in ranks:
        for key, value in holds.items():
            assert held[key] == pytest.approx(value, rel=0.02), key
        # rows: to the experts of a layer and back, layer by layer
        plan = traffic(decoder, sizes, 8 * 12 // sizes.data, dict(zip(layers, rows[::2], strict=False)))
        assert {k: v for k, v in counted.items() if v} == {k: v for k, v in plan.items() if v}


def test_folder_and_file_hold_the_same_to_the_bit(saved: dict[str, Any], folder: Path) -> None:
    one, other = (dict(_leaves(read_checkpoint(folder / name))) for name in ("ep.file", "ep.folder"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


def test_consolidated_folder_holds_the_full_checkpoint(saved: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from blockwright.blocks.checkpoint.source import open_source
    from blockwright.lab.consolidate import main

    assert main([str(folder / "ep.folder"), str(tmp_path / "out"), "--checkpoint"]) == 0
    full = read_checkpoint(folder / "ep.file")
    model = {k.removeprefix("decoder."): v for k, v in full["state_dict"].items() if k.startswith("decoder.")}
    written = open_source(tmp_path / "out")
    assert written.tensors.keys() == model.keys() and written.model == read_model(BIASED)
    assert all(torch.equal(written.tensors[name], value) for name, value in model.items())
    states = load_file(tmp_path / "out" / "optimizer.safetensors")
    for which, names in enumerate(full["optimizer_parameters"]):
        for index, values in full["optimizer_states"][which]["state"].items():
            for key, value in values.items():
                assert torch.equal(states[f"{names[index]}.{key}"], value)
    again = read_checkpoint(tmp_path / "out" / "last.ckpt")
    assert all(torch.equal(value, again["state_dict"][name]) for name, value in full["state_dict"].items())


def _leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"task": {"activation_checkpointing": "full"}},
    # Its first step is on all windows. One gradient of them is 1e-8, Adam's ε, and rounding is a tenth of it: even one
    # process with its windows in another order ends 2e-5 apart. A larger ε bounds what rounding can do, and shows a
    # gradient that is a factor off.
    "accumulated": {"accumulate_grad_batches": 4, "steps": 5, "optimizer": AdamW(lr=1e-3, eps=1e-4)},
    "packed": {"packed": True},
}
WHAT = [*((model, "plain") for model in (*MODELS, "biased", "plug-in"))]
WHAT += [("deepseek", variant) for variant in VARIANTS if variant != "plain"]
GRID = [
    (strategy, model, variant)
    for strategy, (model, variant) in each(list(STRATEGIES), WHAT)
    if not ("ep" in strategy and model == "dense")
]


def grid_run(strategy: str, model: str, variant: str, alone: bool = False) -> dict[str, Any]:
    devices, chosen = (1, "auto") if alone else STRATEGIES[strategy]
    text = {**MODELS, "biased": BIASED, "plug-in": PLUGIN}[model]
    # The plug-in's attention has no softmax: rounding grows a hundredfold in some steps of Adam, under DDP as well.
    # Two plain steps of it agree in single precision (above); those of Adam do in double.
    settings: dict[str, Any] = {"optimizer": AdamW(lr=1e-3), "steps": 4, "double": model == "plug-in"}
    return train(text, strategy=chosen, devices=devices, **{**settings, **VARIANTS[variant]})


def grid_work(devices: int) -> dict[Any, Any]:
    return {cell: grid_run(*cell) for cell in GRID if STRATEGIES[cell[0]][0] == devices}


def test_steps_of_adamw_agree_over_the_grid(plugin: None) -> None:
    references = {(m, v): grid_run("", m, v, alone=True) for _, m, v in GRID}
    found = {**spawn(2, grid_work, 2)[0], **spawn(4, grid_work, 4)[0]}
    assert len(found) == len(GRID)
    for cell, result in found.items():
        losses, weights = far(result, references[cell[1:]])
        assert losses < CLOSE and weights < CLOSE, (cell, losses, weights)


def settings_of(name: str) -> dict[str, Any]:
    devices, strategy = STRATEGIES.get(name, (1, "auto"))
    plugins = {} if isinstance(strategy, dict) else {"plugins": [SealedCheckpoints()]}  # which reads folders too
    return {"devices": devices, "strategy": strategy, **plugins}


def save_all(devices: int, folder: Path) -> dict[str, Any]:
    done = {}
    for source in (source for source in SAVED if STRATEGIES[source.partition(".")[0]][0] == devices):
        name, _, form = source.partition(".")
        settings = settings_of(name)
        if form == "folder":
            settings["strategy"] = {**settings["strategy"], "sharded_checkpoints": True}
        done[source] = train(BIASED, save=str(folder / source), **settings, **HALF)["weights"]
    return done


SAVED = ["ddp.file", "fsdp.folder", "tp.file", "ep.folder", "hsdp.file", "fsdp_tp.folder", "fsdp_ep.file", "ep.file"]
# Under each strategy what another has saved; and a folder in one process.
LOADS = [*each(list(STRATEGIES), SAVED[1:7] + SAVED[:1]), ("alone", "fsdp_tp.folder")]


def load_all(devices: int, folder: Path) -> dict[Any, Any]:
    done = {}
    for name, source in LOADS:
        if settings_of(name)["devices"] == devices:
            restored = Restored()
            rest = train(BIASED, ckpt_path=str(folder / source), callbacks=[restored], **settings_of(name), **REST)
            done[name, source] = restored.weights, rest
    return done


@pytest.fixture(scope="module")
def saved(plugin: None, folder: Path) -> dict[str, Any]:
    """The weights of each checkpoint in the folder."""
    return {**spawn(2, save_all, 2, folder)[0], **spawn(4, save_all, 4, folder)[0]}


def test_every_strategy_resumes_from_the_checkpoint_of_any_other(saved: dict[str, Any], folder: Path) -> None:
    found = {**spawn(2, load_all, 2, folder)[0], **spawn(4, load_all, 4, folder)[0], **load_all(1, folder)}
    reference = train(BIASED, **REST)
    reference["losses"] = reference["losses"][2:]
    assert saved.keys() == {*SAVED} and found.keys() == {*LOADS}
    for (name, source), (weights, rest) in found.items():
        assert weights.keys() == saved[source].keys(), (name, source)
        assert all(torch.equal(weights[k], saved[source][k]) for k in weights), (name, source)
        losses, apart = far(rest, reference)
        assert losses < CLOSE and apart < CLOSE, (name, source, losses, apart)

"""``blockwright export RUN DIR --to ENGINE``: what is written, which keys an engine has, what is refused."""

from __future__ import annotations

import ast
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.hf_export import main
from blockwright.plugins.planner.handover.export import ENGINES
from blockwright.plugins.planner.handover.megatron_bridge import stages
from blockwright.plugins.planner.handover.training import Rates, Training, rates
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import WarmupStableDecay

LAYOUTS = [
    Layout(recompute="full"),
    Layout(tensor=2, pipeline=4, interleave=2, expert=4, recompute="selective"),
    Layout(pipeline=8, context=2, shard=True),
]
RATES = [Rates("cosine", 20, 0.1), Rates("WSD", 20, 0.0, 100, "minus_sqrt")]


def made(layout: Layout = LAYOUTS[1], rates: Rates = RATES[0], weights: bool = True, **changes: Any) -> Training:
    """A training on 64 GPUs."""
    given = {"folder": Path("/model"), "has_weights": weights, "n_layers": 27, "n_predicted": 1, "steps": 1000}
    given |= {"job": Job(64, 1024, 4096), "layout": layout, "optimizer": AdamW(lr=2e-4), "rates": rates}
    return Training(**{**given, "clip": 1.0, "seed": 3, **changes})


TRAINED = ["optimizer=adamw", "trainer.max_steps=500", "data.batch_size=64", "data.sequence_length=64"]
PLANNED = ["gpus=8", "gpu=h100"]
ONE = ["tensor=1", "pipeline=1", "micro_batch=1", "context=1"]  # layout, which is found at once


@pytest.fixture
def llama(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> Path:
    """A composition's file."""
    file = tmp_path / "llama.yaml"
    file.write_text(yaml.safe_dump(tiny(n_layers=9)))
    return file


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., dict[str, Any]]) -> Path:
    """A run's folder."""
    folder = tmp_path / "run"
    decoder = compose(tiny(), seed=3)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    for part in ("checkpoints", ".hydra"):
        (folder / part).mkdir(parents=True)
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, folder / "checkpoints/last.ckpt")
    given = [
        *TRAINED,
        "optimizer.lr=0.003",
        "scheduler.warmup=5",
        "data.batch_size=8",
        "trainer.accumulate_grad_batches=2",
    ]
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(given))
    return folder


def test_a_preset_is_handed_to_megatron_bridge(llama: Path, tmp_path: Path) -> None:
    sizes = ["tensor=2", "pipeline=4", "interleave=2", "micro_batch=1", "recompute=full"]
    out = tmp_path / "out"
    assert main([str(llama), str(out), "--to", "megatron-bridge", *PLANNED, *sizes, *TRAINED]) == 0
    found = yaml.safe_load((out / "megatron_bridge.yaml").read_text())
    model = found["model"]
    assert [model[f"{k}_model_parallel_size"] for k in ("tensor", "pipeline", "virtual_pipeline")] == [2, 4, 2]
    assert model["pipeline_model_parallel_layout"] == "Ett|t|t|t|t|t|t|tL" and model["sequence_parallel"]
    assert model["recompute_granularity"] == "full" and model["recompute_num_layers"] == 1
    assert found["train"] == {"train_iters": 500, "global_batch_size": 64, "micro_batch_size": 1}
    assert found["scheduler"]["lr_warmup_iters"] == 10 and found["scheduler"]["end_weight_decay"] == 0.1
    assert found["optimizer"]["min_lr"] == pytest.approx(0.1 * found["optimizer"]["lr"])
    assert found["checkpoint"] == {} and found["tokenizer"]["tokenizer_model"] == "???"
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 9


@pytest.mark.slow
def test_a_run_is_handed_to_automodel_with_its_weights_and_settings(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(run), str(out), "--to", "automodel", *PLANNED, "pipeline=2", "micro_batch=1", "tensor=1"]) == 0
    found = yaml.safe_load((out / "automodel.yaml").read_text())
    for part in (found["model"], found["dataset"]["tokenizer"]):
        assert part["pretrained_model_name_or_path"] == str(out)
    assert found["optimizer"]["lr"] == 0.003 and found["lr_scheduler"]["lr_warmup_steps"] == 5
    scheduled = found["step_scheduler"]
    assert scheduled["global_batch_size"] == 16 and scheduled["local_batch_size"] == 16 // 4
    assert found["distributed"]["pipeline"]["pp_microbatch_size"] == 1
    model, tokens = AutoModelForCausalLM.from_pretrained(out).eval(), torch.arange(20)[None]
    torch.testing.assert_close(model(tokens).logits, load(run)(tokens), rtol=0, atol=1e-5)


def test_what_is_given_changes_what_the_run_had(run: Path, tmp_path: Path) -> None:
    given = ["optimizer.lr=0.001", "scheduler=warmup_stable_decay", "trainer.max_steps=1000"]
    main([str(run), str(tmp_path / "out"), "--to", "megatron-bridge", *PLANNED, "pipeline=1", "tensor=1", *given])
    found = yaml.safe_load((tmp_path / "out" / "megatron_bridge.yaml").read_text())
    assert found["optimizer"]["lr"] == 0.001 and found["checkpoint"]["pretrained_checkpoint"] == str(tmp_path / "out")
    kept = {k: v for k, v in found["scheduler"].items() if k.startswith("lr_")}
    lengths = {"lr_warmup_iters": 5, "lr_decay_iters": 1000, "lr_wsd_decay_iters": 200}
    assert kept == {"lr_decay_style": "WSD", "lr_wsd_decay_style": "minus_sqrt", **lengths}


# 9 micro-batches over 2 interleaved stages: Megatron's schedule refuses the last round.
NINE = ["pipeline=2", "tensor=1", "context=1", "micro_batch=1", "data.batch_size=36", "interleave=2"]
REFUSED = [  # model, engine, what is given, and a part of the message
    ("llama", "megatron-bridge", [*PLANNED, *ONE, "shard=true"], "shard=false"),
    ("llama", "automodel", [*PLANNED, *ONE[:-1], "context=2"], "does not do this with llama"),
    ("llama", "automodel", [*PLANNED, *ONE, "optimizer=muon"], "the engines compute AdamW"),
    ("llama", "automodel", [*PLANNED, *ONE, "scheduler=warmup_step_decay"], "no such schedule"),
    ("llama", "automodel", [*PLANNED, *ONE, "trainer.gradient_clip_val=null"], "always clip"),
    ("llama", "megatron-bridge", [*PLANNED, "pipeline=4", "tensor=1", "interleave=4"], "no layout divides"),
    ("llama", "megatron-bridge", [*PLANNED, *NINE], "write interleave=1"),
    ("llama", "hf", ["gpus=8"], "says nothing of how to train"),
    ("alibi", "automodel", PLANNED, "no family of transformers"),
    ("gpt2", "megatron-bridge", PLANNED, "It has llama, "),
    ("tiny", "automodel", [*PLANNED, "--dtype", "float16"], "error: --dtype"),
]


@pytest.mark.parametrize(("model", "to", "given", "said"), REFUSED)
def test_what_cannot_be_handed_over_is_refused(
    model: str, to: str, given: list[str], said: str, llama: Path, tmp_path: Path, tiny: Any, capsys: Any
) -> None:
    (tmp_path / "alibi.yaml").write_text(yaml.safe_dump(tiny(position="alibi")))
    source = str(tmp_path / f"{model}.yaml") if model in ("llama", "alibi") else model
    trained = TRAINED if model != "tiny" else []
    assert main([source, str(tmp_path / "out"), "--to", to, *trained, *given]) == 64
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_stages_hold_every_layer_once() -> None:
    for pipeline in (1, 3, 4):
        written = stages(made(Layout(pipeline=pipeline, interleave=2), n_layers=11))
        parts = written.split("|")
        assert len(parts) == 2 * pipeline and written.count("t") == 11
        assert max(p.count("t") for p in parts) - min(p.count("t") for p in parts) <= 1
        assert parts[0][0] == "E" and parts[-1].endswith("mL")


def test_a_fraction_becomes_steps() -> None:
    found = rates(WarmupStableDecay(warmup=0.1, decay=0.25, shape="linear", min_ratio=0.2), 200)
    assert (found.style, found.warmup, found.decay, found.shape, found.floor) == ("WSD", 20, 50, "linear", 0.2)


KEYS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("engine_keys.yaml").read_text())


def sections(tree: Mapping[str, Any], names: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, set[str]]]:
    """Section → the keys in it, for each section that is recorded."""
    yield at, set(tree)
    for key, value in tree.items():
        inner = f"{at}.{key}" if at else key
        if isinstance(value, Mapping) and inner in names:
            yield from sections(value, names, inner)


def named(engine: str, tree: Mapping[str, Any]) -> list[str]:
    """The keys that the engine does not have."""
    known = KEYS[engine]
    found = []
    for at, keys in sections(tree, known):
        found += [f"{at}.{key}" for key in keys - {*known[at]["keys"], *known[at].get("others", ())}]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_only_keys_of_the_engine_are_written(engine: str) -> None:
    for layout, rate, weights in itertools.product(LAYOUTS, RATES, (True, False)):
        for family in ENGINES[engine].families:
            tree = yaml.safe_load(ENGINES[engine].text(made(layout, rate, weights), family))
            assert not named(engine, tree)
            assert not {s for s, v in tree.items() if isinstance(v, dict)} - KEYS[engine].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_recorded_keys_are_those_of_an_installed_engine(engine: str) -> None:
    """Read from its sources, which need not be importable."""
    for section, recorded in KEYS[engine].items():
        declared = set().union(*(fields(*place.split()) for place in recorded["declared"])) or set(recorded["keys"])
        assert not set(recorded["keys"]) - declared, section


def fields(package: str, file: str, name: str) -> set[str]:
    """The annotated attributes of a class in a package's sources."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / file).read_text())
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_automodel_reads_how_the_gpus_are_shared_out(layout: Layout, family: str) -> None:
    reader = pytest.importorskip("nemo_automodel.recipes._dist_utils", exc_type=ImportError)
    from nemo_automodel.components.distributed.pipelining.functional import calculate_virtual_stages

    tree = yaml.safe_load(ENGINES["automodel"].text(made(layout), family))
    found = reader.parse_distributed_section(tree["distributed"])
    assert [found[f"{k}_size"] for k in ("tp", "pp", "cp", "ep")] == [
        *(layout.tensor, layout.pipeline, layout.context, layout.expert)
    ]
    pipeline = found["pipeline_config"]
    assert (pipeline is not None) == (layout.pipeline > 1)
    if pipeline is not None:
        single = layout.interleave == 1
        given = (27, pipeline.layers_per_stage, layout.pipeline, single, pipeline.round_virtual_stages_to_pp_multiple)
        assert calculate_virtual_stages(*given)[1] == layout.interleave


@pytest.mark.parametrize(("pipeline", "interleave"), [(4, 1), (8, 3), (2, 2)])
def test_megatron_reads_which_layers_a_stage_has(pipeline: int, interleave: int) -> None:
    name = "megatron.core.transformer.pipeline_parallel_layer_layout"
    reader: Any = pytest.importorskip(name, exc_type=ImportError).PipelineParallelLayerLayout
    layout = Layout(pipeline=pipeline, interleave=interleave)
    tree = yaml.safe_load(ENGINES["megatron-bridge"].text(made(layout), "deepseek_v3"))
    found = reader(tree["model"]["pipeline_model_parallel_layout"], pipeline)
    found.validate_layer_layout(27, 1)
    assert found.virtual_pipeline_model_parallel_size == interleave

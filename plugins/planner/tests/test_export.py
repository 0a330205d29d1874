"""``blockwright export RUN DIR --to ENGINE``: what is written, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trainings import made
from transformers import AutoConfig, AutoModelForCausalLM

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.hf_export import main
from blockwright.plugins.planner.handover.megatron_bridge import stages
from blockwright.plugins.planner.handover.training import rates
from blockwright.plugins.planner.layout import Layout
from blockwright.training.schedulers.warmup_stable_decay import WarmupStableDecay

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
    given = [*TRAINED, "optimizer.lr=0.003", "scheduler.warmup=5", "data.batch_size=8"]
    given += ["trainer.accumulate_grad_batches=2"]
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(given))
    return folder


def test_a_preset_is_handed_to_megatron_bridge(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "not yet run with that engine" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_handed_to_automodel_with_its_weights_and_settings(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(run), str(out), "--to", "automodel", *PLANNED, "pipeline=2", "micro_batch=1", "tensor=1"]) == 0
    found = yaml.safe_load((out / "automodel.yaml").read_text())
    assert (
        found["model"]["pretrained_model_name_or_path"]
        == found["dataset"]["tokenizer"]["pretrained_model_name_or_path"]
        == str(out)
    )
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
    assert kept == {
        "lr_decay_style": "WSD",
        "lr_warmup_iters": 5,
        "lr_decay_iters": 1000,
        "lr_wsd_decay_iters": 200,
        "lr_wsd_decay_style": "minus_sqrt",
    }


@pytest.mark.parametrize(
    ("to", "given", "said"),
    [
        ("megatron-bridge", ["gpu=h100"], "gpus = null"),
        ("megatron-bridge", [*PLANNED, *ONE, "shard=true"], "Write shard=false, or leave it out"),
        ("automodel", [*PLANNED, *ONE[:-1], "context=2"], "NeMo AutoModel does not do this with llama"),
        ("automodel", [*PLANNED, *ONE, "optimizer=muon"], "the engines compute AdamW"),
        ("automodel", [*PLANNED, *ONE, "scheduler=warmup_step_decay"], "the engines have no such schedule"),
        ("automodel", [*PLANNED, *ONE, "trainer.gradient_clip_val=null"], "always clip"),
        ("megatron-bridge", [*PLANNED, "pipeline=4", "tensor=1", "interleave=4"], "no layout divides"),
        ("megatron-bridge", [*PLANNED, "pipelin=4"], "pipelin"),
        ("hf", ["gpus=8"], "says nothing of how to train"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(
    to: str, given: list[str], said: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(llama), str(tmp_path / "out"), "--to", to, *TRAINED, *given]) == 64
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_type_of_weights_that_there_are_none_of_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tiny", str(tmp_path / "out"), "--to", "automodel", "gpus=1", "gpu=h100", "--dtype", "float16"]
    assert main(given) == 64
    assert "error: --dtype" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "to"), [("gpt2", "megatron-bridge")])
def test_a_model_that_an_engine_lacks_is_refused_with_those_it_has(
    model: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, str(tmp_path / "out"), "--to", to, *PLANNED, *TRAINED]) == 64
    assert "It has llama, " in capsys.readouterr().err


def test_a_model_of_no_family_is_refused_with_the_difference(
    tmp_path: Path, tiny: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny(position={"name": "alibi"})))
    assert main([str(tmp_path / "own.yaml"), str(tmp_path / "out"), "--to", "automodel", *PLANNED, *TRAINED]) == 64
    assert "no family of transformers describes this model: not" in capsys.readouterr().err


def test_micro_batches_fill_the_rounds_of_interleaved_stages(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """9 micro-batches over 2 interleaved stages: Megatron's schedule refuses the last round."""
    sizes = ["pipeline=2", "tensor=1", "context=1", "micro_batch=1", *TRAINED[:2], TRAINED[3], "data.batch_size=36"]
    asked = [str(llama), str(tmp_path / "out"), "--to", "megatron-bridge", *PLANNED, *sizes]
    assert main([*asked, "interleave=2"]) == 64
    assert "write interleave=1" in capsys.readouterr().err


@pytest.mark.parametrize("pipeline", [1, 3, 4])
def test_stages_hold_every_layer_once(pipeline: int) -> None:
    written = stages(made(Layout(pipeline=pipeline, interleave=2), n_layers=11))
    parts = written.split("|")
    assert len(parts) == 2 * pipeline and written.count("t") == 11
    assert max(p.count("t") for p in parts) - min(p.count("t") for p in parts) <= 1
    assert parts[0][0] == "E" and parts[-1].endswith("mL")


def test_a_fraction_becomes_steps() -> None:
    found = rates(WarmupStableDecay(warmup=0.1, decay=0.25, shape="linear", min_ratio=0.2), 200)
    assert (found.style, found.warmup, found.decay, found.shape, found.floor) == ("WSD", 20, 50, "linear", 0.2)

"""``blockwright plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from blockwright.lab.models import load
from blockwright.plugins.planner.__main__ import main
from blockwright.plugins.planner.answer import command, refusal
from blockwright.plugins.planner.hardware import coefficients
from blockwright.plugins.planner.layout import Job
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.request import read_request
from blockwright.plugins.planner.search import search
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command

ASKED = ["model=deepseek_v2_lite", "model.n_layers=2", "gpus=8", "gpu=h100", "tensor=1", "pipeline=1", "context=1"]


@pytest.mark.slow
def test_the_plan_is_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "tokens=1e12", "price.gpu_hour=2", "--explain"])
    out = capsys.readouterr().out
    labels = {re.split("  +", line.strip())[0] for line in out.splitlines()}
    first, second = (next(line for line in out.splitlines() if line.startswith(f"{number}  ")) for number in (1, 2))
    assert first.endswith(": best") and "slower (a tie)" in second
    assert {"GPU-hours", "money", "all to all"} <= labels
    assert "dense products" in out and "█" not in out and "…" not in out
    assert "blockwright train model=deepseek_v2_lite model.n_layers=2 trainer=fsdp" in out
    figures = [line for line in out.splitlines() if line.startswith(("seconds", "memory", "  "))]
    assert figures and max(len(line) for line in figures if "blockwright" not in line) <= 76  # and a space at each side


@pytest.mark.slow
def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "tokens=1e12", "price.gpu_hour=2", "price.kwh=0.1", "power.overhead=1.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["job"] == {"gpus": 8, "batch": 64, "length": 4096, "precision": "bf16"}
    best = found["layouts"][0]
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert best["tokens_per_second_and_gpu"] == pytest.approx(64 * 4096 / 8 / best["step_seconds"])
    assert best["gpu_hours"] == pytest.approx(1e12 / best["tokens_per_second_and_gpu"] / 3600)
    assert best["kwh"] == pytest.approx(best["gpu_hours"] * 0.7 * 1.5)
    assert best["money"] == pytest.approx(2 * best["gpu_hours"] + 0.1 * best["kwh"])
    assert best["tie"] and best["slower_than_best"] == 0
    for other in found["layouts"][1:]:
        assert other["tie"] == (other["slower_than_best"] <= 0.12)


def test_generation_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED[:2], "gpus=1", "gpu=h100", "length=2048", "cache.bits=6", "--generation"])
    out = capsys.readouterr().out
    assert "1 h100, 2,048 tokens in each cache, 16-bit weights, 6-bit caches" in out
    assert "attention, if it computes" in out


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus", "length"), [("deepseek_v2_lite", 64, 32768), ("olmo_hybrid_7b", 64, 8192)])
def test_a_run_refuses_nothing_of_the_command_that_is_printed(model: str, gpus: int, length: int) -> None:
    asked = read_request([f"model={model}", f"gpus={gpus}", "gpu=h100", "recompute=full", "micro_batch=1"])
    job = Job(gpus, asked.batch, length, "bf16")
    found = search(measure(load(model, [])), job, asked.settings.device, coefficients(), asked.settings.chosen)
    assert found.here is not None
    assert refusal(asked, found.here, job) is None
    assert f"trainer.num_nodes={gpus // 8}" in command(asked, found.here, job)


SMALL = "model=tiny gpus=8 gpu=h100"
REFUSED = [  # a command line, the path that is refused, and a part of the remedy
    ("gpus=8 gpu=h100", "model", "model=deepseek_v2"),
    ("model=tiny gpu=h100", "gpus", "gpus=1024"),
    ("model=tiny gpus=8 gpu=h10", "gpu", "'h100'"),
    (f"{SMALL} token=1e9", "token", "'tokens'"),
    (f"{SMALL} price.kwh=-1", "price.kwh", ""),
    (f"{SMALL} tensor=2,0", "tensor", ""),
    (f"{SMALL} shard=2", "shard", ""),
    (f"{SMALL} recompute=some", "recompute", ""),
    (f"{SMALL} precision=fp4", "precision", "'fp8'"),
    (f"{SMALL} length=100000", "length", "max_positions"),
    (f"{SMALL} --explian", "command line", "'--explain'"),
    (f"{SMALL} price.kwh=0.2", "price.kwh", "tokens=1e12"),
    (f"{SMALL} weights.bits=4", "weights.bits", "--generation"),
    (f"{SMALL} tokens=1e9 --generation", "tokens", ""),
    (f"{SMALL} --explain --generation", "--explain", ""),
    ("--published gpus=8", "command line", ""),
    ("model=tiny gpus=7 gpu=h100 batch=3", "gpus", ""),
    (
        "model=llama3_1_8b model.n_layers=1 model.vocab_size=9000000 gpus=1 gpu=h100 --generation",
        "gpus",
        "",
    ),  # too large
    ("model=tiny model/attention=none gpus=1 gpu=h100 --generation", "model.attention", ""),  # no cache limits it
]


def test_mistakes_are_refused_with_path_and_remedy() -> None:
    for line, path, remedy in REFUSED:
        with pytest.raises(ConfigError) as refused:
            main(line.split())
        assert refused.value.path == path and remedy in refused.value.remedy, line


def test_a_refusal_is_exit_code_64_and_help_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["model=tiny", "gpus=8", "gpu=nothing"]) == 64
    assert capsys.readouterr().err.count("error:") == 1
    assert run_command(main, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("blockwright plan")


def test_what_lies_beyond_every_published_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["model=tiny", "gpu=h100", "tensor=1", "pipeline=1", "context=1", "expert=1", "micro_batch=1"]
    main([*few, "gpus=20000", "--json"])
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 1


@pytest.mark.slow
def test_nothing_is_trained_here_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "precision=fp8"])
    out = capsys.readouterr().out
    assert "None of these fit with what this project trains itself" in out and "blockwright train" not in out

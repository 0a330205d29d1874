"""Mistakes of ``blockwright throughput``: one message before anything is measured or written."""

from __future__ import annotations

import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from blockwright.plugins.equal_memory import answer as answers
from blockwright.plugins.equal_memory.__main__ import main
from blockwright.plugins.equal_memory.request import Settings, read_request
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command

ARMS = ["model=tiny", "model/attention=mha,gqa"]
FEW = [*ARMS, "memory=1MB"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("64MiB", 2**26), ("1.5 GB", 1_500_000_000), ("2kb", 2000), ("1TiB", 2**40), ("8B", 8)],
)
def test_memory_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert Settings(memory=text).budget == size


def test_arms_are_those_of_a_sweep() -> None:
    request = read_request([*FEW, "bits=null,6", "context=64,256", "baseline=gqa", "paths.log_dir=logs", "--json"])
    assert list(request.arms) == ["mha", "gqa"] and request.arms["gqa"] == ["model=tiny", "model/attention=gqa"]
    assert (request.settings.bits, request.settings.context) == ((None, 6), (64, 256))
    assert request.baseline == "gqa" and request.log_dir == ["paths.log_dir=logs"] and request.as_json


@pytest.mark.parametrize(
    ("arguments", "path", "remedy"),
    [
        ([], "memory", "memory=64MB"),
        (["memory=1MB"], "model", "model=tiny"),
        (ARMS, "memory", "memory=64MB"),
        ([*ARMS, "memory=64"], "memory", "memory=64MB"),
        ([*ARMS, "memory=0MB"], "memory", "memory=64MB"),
        ([*ARMS, "memory=-1MB"], "memory", "memory=64MB"),
        ([*ARMS, "memory=64XB"], "memory", "memory=64MB"),
        ([*ARMS, "memory=1e3MB"], "memory", "memory=64MB"),
        ([*ARMS, "memory="], "memory", "memory=64MB"),
        ([*FEW, "memory=2MB"], "memory", "Leave one of them out"),
        ([*FEW, "bits=5"], "bits", "bits=null,6"),
        ([*FEW, "bits=six"], "bits", "bits=null,6"),
        ([*FEW, "bits=null,null"], "bits", "bits=null"),
        ([*FEW, "bits=[]"], "bits", "bits="),
        ([*FEW, "context=0"], "context", "context=256,1024"),
        ([*FEW, "context=long"], "context", "context=256,1024"),
        ([*FEW, "context=64,64"], "context", "context=64"),
        ([*FEW, "context=5"], "context", "lower steps"),
        ([*FEW, "context=64", "steps=63"], "context", "lower steps"),
        ([*FEW, "baseline=mqa"], "baseline", "gqa"),
        ([*FEW, "rows=0"], "rows", "rows=1"),
        ([*FEW, "repeats=0"], "repeats", "repeats=1"),
        ([*FEW, "repeats=often"], "repeats", "repeats"),
        ([*FEW, "steps=0"], "steps", "steps=1"),
        ([*FEW, "threads=0"], "threads", "threads=1"),
        ([*FEW, "dtype=float31"], "dtype", "float32"),
        ([*FEW, "device=tpu"], "device", "cpu"),
        ([*FEW, "device=meta"], "device", "device=cpu"),
        ([*FEW, "optimizer.lr=1"], "optimizer.lr", ""),
        ([*FEW, "repeat=3"], "repeat", "Did you mean 'repeats'"),
        ([*FEW, "--jsn"], "command line", "--json"),
        ([*FEW, "tiny"], "command line", "model=tiny"),
        (["model=tiny", "model/attention=mha,mha", "memory=1MB"], "command line", "once"),
        (["model=tiny", "model/attention=mla,mlaa", "memory=8MB"], "arm mlaa: model/attention", "mla"),
        (["model=tiny", "model.attention.n_heads=7", "memory=1MB"], "arm model: model.attention.n_heads", ""),
        ([*FEW, "context=5000"], "arm mha: context", "max_positions"),
        ([*FEW, "context=2000"], "arm mha: memory", "memory=13MB"),
        ([*ARMS, "memory=900TB"], "arm mha: memory", "Lower it"),
        (["model=tiny", "model/attention=none", "memory=1MB"], "arm model: rows", "rows=64"),
        ([*FEW, "context=64", "paths.log_dir=null"], "paths.log_dir", "FOLDER"),
        ([*FEW, "context=64", "paths.log_dir=file/logs"], "paths.log_dir", "FOLDER"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    arguments: list[str], path: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused:
        main(arguments)
    assert refused.value.path == path and remedy in refused.value.remedy
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, KeyboardInterrupt(), RuntimeError("a defect")])
def test_a_measurement_that_ends_early_leaves_no_folder(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "read_arms", lambda *_: [])
    monkeypatch.setattr(answers, "measure", Mock(side_effect=error))
    with pytest.raises(ConfigError if error in OUT_OF_MEMORY else type(error)) as raised:
        main([*FEW, f"paths.log_dir={tmp_path}"])
    assert not list((tmp_path / "throughput").iterdir())
    if error in OUT_OF_MEMORY:
        assert raised.value.path == "memory" and "rows=N" in raised.value.remedy  # type: ignore[attr-defined]


def test_examples_of_the_page_are_command_lines() -> None:
    page = (Path(answers.__file__).parent / "README.md").read_text().replace("\\\n", " ")
    examples = [
        shlex.split(line, comments=True)[2:] for line in page.splitlines() if line.startswith("blockwright throughput")
    ]
    requests = [read_request(example) for example in examples]
    assert len(requests) == 4 and all(len(request.arms) > 1 for request in requests)


def test_a_refusal_is_one_message_with_exit_code_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*FEW, "bits=5"]) == 64
    assert capsys.readouterr().err.count("error: ") == 1
    assert run_command(main, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("blockwright throughput")

"""``blockwright diff`` as a command: what it prints, its document, its picture, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from run_folder import write_run

from blockwright.blocks.compose import compose, preset
from blockwright.command import run
from blockwright.lab.card import flat
from blockwright.lab.difference.difference import Side, difference
from blockwright.lab.difference.picture import side_by_side
from blockwright.lab.difference.settings import read as settings
from blockwright.registry.command import run_command

YAML = "inherits: tiny\nvocab_size: 257\nattention: {name: gqa, n_heads: 8, n_kv_heads: 2}\n"


def lines(said: str) -> dict[str, list[str]]:
    """Sign and label of each line of the table → its other cells."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines() if line[:1] in "≠="]
    return {f"{sign} {label}": cells for sign, label, *cells in rows}


@pytest.mark.slow
def test_preset_and_a_file_in_lines_that_grep_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(YAML)
    assert run_command(run, ["diff", "tiny", str(tmp_path / "mine.yaml")]) == 0
    said = lines(capsys.readouterr().out)
    assert said["≠ attention"] == ["mla", "gqa"] and said["= ffn.gating"] == ["softmax_topk", "softmax_topk"]
    assert said["≠ cache bytes a token, bf16"] == ["864", "768", "−11.1 %"]
    assert "≠ ffn.gating.top_k" not in said


@pytest.mark.slow
def test_document_has_the_figures_of_describe_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, ["describe", "model=tiny,gpt2", "against=tiny", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert run_command(run, ["diff", "tiny", "gpt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == described["models"] and found["change"] == described["changes"][0]["change"]
    assert found["schema"] == "blockwright.diff/1" and found["runs"] is None
    known = {each["path"]: each for each in found["settings"]}
    assert known["d_model"] == {"path": "d_model", "same": False, "a": 192, "b": 768}
    assert known["mtp"] == {"path": "mtp", "same": True, "a": None, "b": None}
    assert known["position"] == {"path": "position", "same": False, "b": "learned"}
    parts = [(pair["part"], pair["layers"]) for pair in found["layers"]]
    assert parts[0] == ("attention", {"a": [0, 1, 2, 3], "b": [*range(12)]})
    assert ("ffn", {"a": [1, 2, 3]}) in parts


@pytest.mark.slow
def test_model_against_itself_changed_differs_in_what_is_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, ["diff", "tiny", "model.gating.top_k=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = [*found["settings"], *(each for pair in found["layers"] for each in pair["settings"])]
    assert [each for each in settings if not each["same"]] == [
        {"path": "ffn.gating.top_k", "same": False, "a": 4, "b": 2}
    ]
    assert found["b"] == "tiny model.gating.top_k=2"
    assert not [key for key in flat(found["change"]) if key.startswith("parameters.total") and found["change"][key]]


@pytest.mark.slow
def test_picture_is_one_document_that_fetches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "both.svg"
    assert run_command(run, ["diff", "tiny", "model/attention=gqa", "--out", str(file)]) == 0
    root = ET.fromstring(file.read_text())
    assert [each.get("data-side") for each in root.iter() if each.get("data-side")] == ["a", "b"]
    assert not re.findall(r"(?:href|src)=|url\((?!#)|@import|<script|\son\w+=", file.read_text())
    assert "≠ attention" in {each.text for each in root.iter()}


@pytest.mark.slow
def test_every_depth_of_multi_token_prediction_has_a_mark() -> None:
    ours, theirs = (preset("tiny", {"vocab_size": 257, "n_layers": 1, "mtp": {"depth": depth}}) for depth in (1, 2))
    root = ET.fromstring(side_by_side(difference(Side("a", settings(ours)), Side("b", settings(theirs)))))
    of_b = next(each for each in root.iter() if each.get("data-side") == "b")
    shown = {each.get("data-path", ""): each.get("class") for each in of_b.iter()}
    assert [shown[f"mtp.{k}"] for k in range(2)] == ["same", "added"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in their rate and their losses."""
    made = []
    for i, (rate, loss) in enumerate(((0.01, 2.5), (0.02, 2.25))):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        write_run(folder, compose(preset("tiny", {"vocab_size": 257, "n_layers": 2}), seed=i), "a text\n")
        settings = folder / ".hydra/config.yaml"
        more = f"model:\n  d_model: {i}\noptimizer:\n  lr: {rate}\n  betas: [0.9, 0.95]\n"
        more += "paths:\n  output_dir: ${hydra:runtime.output_dir}\n"
        settings.write_text(settings.read_text() + more)
        figures = {"val/loss": {"unit": "nats per token", "better": "less"}}
        result = {
            "status": "completed",
            "steps": 40,
            "metrics": {"val/loss": loss, "val_load/x": 1.0},
            "figures": figures,
        }
        (folder / "results.json").write_text(json.dumps(result))
        (folder / "curves.json").write_text(json.dumps({"tokens_per_step": 100, "train": [], "val": []}))
        made.append(folder)
    return made


@pytest.mark.slow
def test_runs_are_compared_in_settings_data_and_losses_without_a_verdict(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(run, ["diff", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    differing = {each["path"]: (each["a"], each["b"]) for each in found["settings"] if not each["same"]}
    places = {path for path in differing if path.startswith("data.")}  # each run names files of its own folder
    assert {k: v for k, v in differing.items() if k not in places} == {"optimizer.lr": (0.01, 0.02)}
    assert {
        "path": "paths.output_dir",
        "same": True,
        "a": "${hydra:runtime.output_dir}",
        "b": "${hydra:runtime.output_dir}",
    } in found["settings"]
    (figure,) = found["figures"]
    assert (figure["path"], figure["difference"], figure["unit"]) == ("val/loss", -0.25, "nats per token")
    assert found["whole"] and (found["verdict"], found["why"]) == ("none", "one_seed")
    known = {each["path"]: each["a"] for each in found["data"]}
    assert known["tokenizer.kind"] == "bytes" and known["tokens"] == 4000


@pytest.mark.slow
def test_checkpoint_and_run_are_compared_in_what_both_record(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(run, ["diff", str(runs[0]), str(runs[1] / "checkpoints/last.ckpt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert not found["whole"] and [*found["results"]] == ["a"]


@pytest.mark.slow
def test_run_and_a_preset_are_compared_as_models(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, ["diff", "gpt2", str(runs[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] is None


@pytest.mark.slow
def test_runs_in_lines_whose_names_move_no_cursor(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings = runs[0] / ".hydra/config.yaml"
    settings.write_text(settings.read_text() + 'tags: ["\\e[2J\\e]0;x\\a[bold]"]\n"\\e[31mkey": 1\n')
    assert run_command(run, ["diff", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\a" not in text and "[bold]" in text
    said = lines(text)
    assert said["≠ optimizer.lr"] == ["0.01", "0.02"]
    assert said["≠ val/loss, nats per token"] == ["2.5000", "2.2500", "−0.2500"]
    assert "one seed cannot say" in text


FILES = {
    "broken.yaml": "x: [1",
    "unknown.yaml": "inherits: tiny\nvocab_size: 257\nattention: {name: nope}\n",
    "class.yaml": "_target_: os.system\n",
    "plain.ckpt": "no checkpoint",
}
# Command line → path of the refusal.
REFUSED = {
    "": "A",
    "tiny": "B",
    "runs/none tiny": "A: model",
    "tiny broken.yaml": "B: model",
    "tiny unknown.yaml": "B: model.attention.name",
    "class.yaml tiny": "A: model._target_",
    "plain.ckpt tiny": "A: model",
    "tiny gpt2 --out both.gif": "--out",
    "tiny gpt2 --out folder.svg": "--out",
    "tiny optimizer.lr=1": "optimizer.lr",
}


@pytest.mark.parametrize("line", REFUSED)
def test_mistake_is_one_message_before_a_file_is_written(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "folder.svg"):
        (tmp_path / name).mkdir()
    for name, contents in FILES.items():
        (tmp_path / name).write_text(contents)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(run, ["diff", *shlex.split(line)]) == 64
    out, said = capsys.readouterr()
    (found,) = re.findall(r"^error: (.+) = .*\n  rule:   .+\n  remedy: .+$", said, re.M)
    assert found == REFUSED[line] and not out and sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_process_prints_80_columns_on_a_terminal(tmp_path: Path) -> None:
    """What a user sees, in a pseudo-terminal of 80 columns."""
    script = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'blockwright', 'diff', 'gemma2_9b', 'gemma3_27b']))"
    )
    environment: dict[str, Any] = {"COLUMNS": "80", "TERM": "xterm"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout).replace("\r", "")
    assert "≠" in plain and max(map(len, plain.splitlines())) <= 80, plain

"""The differences of four pairs of models, as files: rows of the table, and the mark of every box of the picture.

They hold what is compared and drawn, not how: no coordinate, no colour. After a change that is meant, write them
again and read what changed: ``python -m tests.lab.difference.test_golden``.
"""

import json
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from run_folder import write_run

from blockwright.blocks.compose import compose, preset
from blockwright.command import run
from blockwright.lab.card import flat
from blockwright.lab.difference import views
from blockwright.lab.difference.difference import Side, difference
from blockwright.lab.difference.settings import read
from blockwright.lab.difference.settings import read as settings
from blockwright.lab.difference.views import SIGNS, SVG, marks, side_by_side
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry.command import run_command

GOLDEN = Path(__file__).with_name("golden")
FILE = """
inherits: tiny
attention: {name: gqa, n_heads: 8, n_kv_heads: 2}
gating: {top_k: 2}
layout: {ffn: dense*2 ffn*}
"""
PAIRS = (
    ("deepseek_v2", "deepseek_v3"),
    ("tiny", "file"),
    ("gemma2_9b", "gemma3_27b"),
    ("nemotron_h_8b", "olmo_hybrid_7b"),
)


def side(name):
    words = {"vocab_size": 257}
    if name == "file":
        return Side("file.yaml", read(f"vocab_size: 257{FILE}"))
    return Side(name, read(preset(name, words if name == "tiny" else None)))


def written(found):
    """The contents of the file of a difference."""
    table = ["\t".join(row) for row in (*views.costs(found), *views.composition(found))]
    sides = (("a", found.a), ("b", found.b))
    boxes = [
        f"{x} {path} {mark}" for x, of in sides for path, mark in marks(found, scheme(of.model.decoder), x).items()
    ]
    return "\n".join([*table, "", *sorted(boxes)]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_difference_is_that_of_the_file(a, b):
    found = difference(side(a), side(b))
    golden = (GOLDEN / f"{a}-{b}.txt").read_text()
    assert written(found) == golden
    marked = {tuple(line.split()) for line in golden.partition("\n\n")[2].splitlines()}
    drawn = list(boxes_of(ET.fromstring(side_by_side(found))))
    assert len(drawn) > 10 and {box for box in drawn if box[2]} <= marked
    assert {path for _, path, mark in drawn if not mark} <= {f"layers.{i}" for i in range(99)}  # panels that differ


def boxes_of(root):
    """Each box of a picture: its side, its path and its mark, which has the sign of it too."""
    for place in root.iter(f"{{{SVG}}}g"):
        for group in place.iter(f"{{{SVG}}}g") if place.get("data-side") else ():
            if path := group.get("data-path"):
                mark, signs = group.get("class", ""), [each.text for each in group if each.get("class") == "sign"]
                assert signs == [SIGNS[mark]] if mark in SIGNS else signs == [], path
                yield place.get("data-side", ""), path, mark


def write():
    for a, b in PAIRS:
        (GOLDEN / f"{a}-{b}.txt").write_text(written(difference(side(a), side(b))))


if __name__ == "__main__":
    sys.exit(write())


YAML = "inherits: tiny\nvocab_size: 257\nattention: {name: gqa, n_heads: 8, n_kv_heads: 2}\n"


def lines(said):
    """Sign and label of each line of the table → its other cells."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines() if line[:1] in "≠="]
    return {f"{sign} {label}": cells for sign, label, *cells in rows}


@pytest.mark.slow
def test_document_has_the_figures_of_describe_and_every_setting(capsys):
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
def test_every_depth_of_multi_token_prediction_has_a_mark():
    ours, theirs = (preset("tiny", {"vocab_size": 257, "n_layers": 1, "mtp": {"depth": depth}}) for depth in (1, 2))
    root = ET.fromstring(side_by_side(difference(Side("a", settings(ours)), Side("b", settings(theirs)))))
    of_b = next(each for each in root.iter() if each.get("data-side") == "b")
    shown = {each.get("data-path", ""): each.get("class") for each in of_b.iter()}
    assert [shown[f"mtp.{k}"] for k in range(2)] == ["same", "added"]


@pytest.fixture
def runs(tmp_path):
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
        metrics = {"val/loss": loss, "val_load/x": 1.0}
        result = {"status": "completed", "steps": 40, "metrics": metrics, "figures": figures}
        (folder / "results.json").write_text(json.dumps(result))
        (folder / "curves.json").write_text(json.dumps({"tokens_per_step": 100, "train": [], "val": []}))
        made.append(folder)
    return made


FILES = {"broken.yaml": "x: [1", "class.yaml": "_target_: os.system\n", "plain.ckpt": "no checkpoint"}
# Command line → path of the refusal.
REFUSED = {
    "": "A",
    "tiny": "B",
    "runs/none tiny": "A: model",
    "tiny broken.yaml": "B: model",
    "class.yaml tiny": "A: model._target_",
    "plain.ckpt tiny": "A: model",
    "tiny gpt2 --out both.gif": "--out",
    "tiny gpt2 --out folder.svg": "--out",
    "tiny optimizer.lr=1": "optimizer.lr",
}


def told(capsys, *words):
    assert run_command(run, ["diff", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_preset_and_a_file_in_lines_that_grep_sees_and_a_picture_that_fetches_nothing(tmp_path, capsys):
    (file := tmp_path / "mine.yaml").write_text(YAML)
    drawn = tmp_path / "both.svg"
    assert run_command(run, ["diff", "tiny", str(file)]) == 0
    said = lines(capsys.readouterr().out)
    assert run_command(run, ["diff", "tiny", str(file), "--out", str(drawn)]) == 0
    assert said["≠ attention"] == ["mla", "gqa"] and said["= ffn.gating"] == ["softmax_topk", "softmax_topk"]
    assert said["≠ cache bytes a token, bf16"] == ["864", "768", "−11.1 %"] and "≠ ffn.gating.top_k" not in said
    root = ET.fromstring(drawn.read_text())
    assert [each.get("data-side") for each in root.iter() if each.get("data-side")] == ["a", "b"]
    assert not re.findall(r"(?:href|src)=|url\((?!#)|@import|<script|\son\w+=", drawn.read_text())
    assert "≠ attention" in {each.text for each in root.iter()}


@pytest.mark.slow
def test_model_against_itself_changed_differs_in_what_is_changed(capsys):
    found = told(capsys, "tiny", "model.gating.top_k=2")
    settings = [*found["settings"], *(each for pair in found["layers"] for each in pair["settings"])]
    differing = [each for each in settings if not each["same"]]
    assert differing == [{"path": "ffn.gating.top_k", "same": False, "a": 4, "b": 2}]
    assert found["b"] == "tiny model.gating.top_k=2"
    assert not [key for key in flat(found["change"]) if key.startswith("parameters.total") and found["change"][key]]


@pytest.mark.slow
def test_runs_are_compared_in_settings_data_and_losses_without_a_verdict(runs, capsys):
    settings = runs[0] / ".hydra/config.yaml"
    settings.write_text(settings.read_text() + 'tags: ["\\e[2J\\e]0;x\\a[bold]"]\n"\\e[31mkey": 1\n')
    found = told(capsys, *runs)["runs"]
    differing = {each["path"]: (each["a"], each["b"]) for each in found["settings"] if not each["same"] and "b" in each}
    places = {path for path in differing if path.startswith("data.")}  # each run names files of its own folder
    assert {k: v for k, v in differing.items() if k not in places} == {"optimizer.lr": (0.01, 0.02)}
    place = "${hydra:runtime.output_dir}"
    assert {"path": "paths.output_dir", "same": True, "a": place, "b": place} in found["settings"]
    (figure,) = found["figures"]
    assert (figure["path"], figure["difference"], figure["unit"]) == ("val/loss", -0.25, "nats per token")
    assert found["whole"] and (found["verdict"], found["why"]) == ("none", "one_seed")
    known = {each["path"]: each["a"] for each in found["data"]}
    assert known["tokenizer.kind"] == "bytes" and known["tokens"] == 4000
    half = told(capsys, runs[0], runs[1] / "checkpoints/last.ckpt")["runs"]
    assert not half["whole"] and [*half["results"]] == ["a"]
    assert told(capsys, "gpt2", runs[0])["runs"] is None
    assert run_command(run, ["diff", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\a" not in text and "[bold]" in text and "one seed cannot say" in text
    assert lines(text)["≠ optimizer.lr"] == ["0.01", "0.02"]
    assert lines(text)["≠ val/loss, nats per token"] == ["2.5000", "2.2500", "−0.2500"]


@pytest.mark.parametrize("line", REFUSED)
def test_mistake_is_one_message_before_a_file_is_written(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    for name, contents in FILES.items():
        (tmp_path / name).write_text(contents)
    before = sorted(tmp_path.rglob("*"))
    assert run_command(run, ["diff", *shlex.split(line)]) == 64
    out, said = capsys.readouterr()
    (found,) = re.findall(r"^error: (.+) = .*\n  rule:   .+\n  remedy: .+$", said, re.M)
    assert found == REFUSED[line] and not out and sorted(tmp_path.rglob("*")) == before

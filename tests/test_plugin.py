"""Another distribution adds blocks, and everything here knows them; no line of this project is changed for it.

tests/plugin is that distribution. It is put in place as pip would put it, though without pip, whose build would need a
recent setuptools: what is installed is read from its pyproject.toml.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import Outcome, run_all
from warm import Warm

from blockwright import command

pytestmark = pytest.mark.xdist_group("plugin")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path(__file__).resolve().parent / "plugin"


def install(site: Path, project: dict[str, Any]) -> None:
    """Leave the metadata of a distribution as an installer does."""
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    groups = [[f"[{group}]", *map(" = ".join, points.items())] for group, points in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n\n".join(map("\n".join, groups)) + "\n")


Said = dict[str, Outcome]


def run(warm: Warm, commands: dict[str, list[str]], site: Path, environment: dict[str, str], cwd: Path) -> Said:
    return run_all(warm.run, commands, cwd=cwd, env={**environment, "PYTHONPATH": str(site)})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the plug-in is installed."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        shutil.copytree(PLUGIN / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    install(site, project["project"])
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin")


LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def quick(small: list[str]) -> list[str]:
    return [*small, "logger=none", "callbacks.report.sample_tokens=0", "callbacks.throughput=null"]


REFUSED = {  # path → what is written, and what the message says
    "model.attention.first_decay": (
        ["model/attention=retention", "model.attention.first_decay=slow"],
        "must be a number",
    ),
    "model.position.widow": (["model/position=xpos", "+model.position.widow=3"], "position 'xpos' has no parameter"),
    "model.gating.noise": (["model/gating=noisy_topk", "model.gating.noise=-1"], "must not be negative"),
    "task.kernels.attention": (["task.kernels.attention=bant"], "Did you mean 'band'"),
    "experiment": (["experiment=retentiv"], "Did you mean 'retentive'"),
    "data.largest_step": (["experiment=zigzags", "data.largest_step=64"], "Climb by smaller steps"),
    "data.larges_step": (["experiment=zigzags", "data.larges_step=3"], "Did you mean 'largest_step'?"),
    "data.batches": (["experiment=zigzags", "data.batches=many"], ""),
}


@pytest.fixture(scope="module")
def said(quick: list[str], warm: Warm, site: Path, environment: dict[str, str], folder: Path) -> Said:
    def at(run: str) -> str:
        return f"hydra.run.dir={folder}/{run}"

    chosen = ["model/attention=retention", "model/position=xpos", "model/gating=noisy_topk"]
    loop = ["+model/loop=mirror", "model.loop.first=1", "model.loop.visits=2", "model.loop.entry=diagonal"]
    children = ["model/attention=gqa", "model.attention.key_conv=smear", "+model/readout=sub_norm"]
    children += ["model/residual=convolved", "model.residual.residual=prenorm", "trainer.max_steps=2"]
    children += ["model.residual.attention_conv=smear", "model.residual.ffn_out_conv=smear"]
    lent = ["+model/kv_source=lent", "+model.layout.kv_source=lent relayed", "+model/memory=bigram"]
    sweep = ["trainer.max_steps=2", "trainer.val_check_interval=2", f"hydra.sweep.dir={folder}/sweep"]
    # The data and the task of the plug-in: a run, and the same in two parts.
    without_data = [o for o in quick if not o.startswith(("data", "logger"))]
    climbs = ["experiment=zigzags", "optimizer/constraint=row_sphere", *without_data, "logger=csv"]
    climbs += ["trainer.max_steps=3", "trainer.val_check_interval=3", "scheduler=constant"]
    commands = {
        "catalogue": ["blocks"],
        "block": ["blocks", "gating/noisy_topk"],
        "presets": ["blocks", "model/ret*"],
        "help": ["--help"],
        "card": ["describe", "model=tiny"],
        "card of a memory": ["describe", "model=tiny", "+model/memory=bigram", "--json"],
        "preset": ["model=retentive_tiny", "model/position=of/tiny", "--cfg", "job", "--package", "model"],
        "an experiment": ["experiment=retentive", "--cfg", "job"],
        "trains": [*quick, *chosen, *loop, "model.attention.first_decay=4", at("run")],
        "drops": [*quick, "model/residual=dropped_tokens", at("drops")],
        "shares": [*quick, *lent, at("shares")],
        "trains children": [*quick, *children, "callbacks.report.sample_tokens=3", at("children")],
        "data": [*climbs, "trainer.max_steps=6", at("whole")],
        "data, half": [*climbs, at("parts")],
        "data, resumed": [*climbs, "trainer.max_steps=6", at("parts"), f"ckpt_path={folder}/parts/{LAST}"],
        "sweep": ["-m", *quick, *sweep, "model/attention=glob([mqa,ret*])"],
        **{
            path: [*(o for o in quick if "zigzags" not in given[0] or not o.startswith("data")), *given, at("x")]
            for path, (given, _) in REFUSED.items()
        },
    }
    return run(warm, commands, site, environment, folder)


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / LAST, weights_only=True)["state_dict"]


def assert_learnt(text: str) -> None:
    losses = [float(loss) for loss in re.findall(r"train/loss=(\S+)", text)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_every_command_ends_as_it_should(said: Said) -> None:
    for name, found in said.items():
        assert found.code == (64 if name in REFUSED else 0) and "Traceback" not in found.said, found.said
    for path, (_, words) in REFUSED.items():
        assert f"error: {path} = " in said[path].said and words in said[path].said, said[path].said


@pytest.mark.slow
def test_plug_in_is_in_the_catalogue_the_help_and_the_cost_card(said: Said) -> None:
    blocks = ("attention/retention", "attention/gated_linear", "gating/noisy_topk", "position/xpos", "scores/tempered")
    for name in blocks:
        (line,) = [line for line in said["catalogue"].said.splitlines() if f"{name} " in line]
        assert "blockwright-guest" in line
    assert "blockwright-guest" not in next(s for s in said["catalogue"].said.splitlines() if "attention/mla " in s)
    assert "blockwright_guest.noisy_topk.NoisyTopK, provided by blockwright-guest" in said["block"].said
    assert re.search(r"noise +float +1\.0 +factor on the noise", said["block"].said)
    for option in (r"model/attention: .*\bretention\b", r"model/position: .*\bxpos\b", r"experiment: .*\bretentive\b"):
        assert re.search(option, said["help"].said)
    assert re.search(r"attention +band, else blocked, else compiled, else few_queries, else sdpa", said["card"].said)
    assert re.search(r"retentive_tiny .*blockwright-guest", said["presets"].said)


@pytest.mark.slow
def test_plug_in_trains_on_the_command_line(said: Said, folder: Path) -> None:
    assert_learnt(said["trains"].said)
    checkpoint = torch.load(folder / "run" / LAST, weights_only=True)
    model = checkpoint["hyper_parameters"]["model"]
    assert (model["attention"]["name"], model["attention"]["first_decay"]) == ("retention", 4)
    assert (model["position"]["name"], model["gating"]["name"]) == ("xpos", "noisy_topk")
    assert (model["loop"]["name"], model["loop"]["entry"]) == ("mirror", "diagonal")
    assert {"decoder.layers.1.ffn.gating.noise_bias", "decoder.loop.entry.alpha"} <= checkpoint["state_dict"].keys()
    assert json.loads((folder / "run" / "results.json").read_text())["status"] == "completed"
    assert_learnt(said["drops"].said)


@pytest.mark.slow
def test_keys_that_it_shares_over_depth_and_its_memory_train_and_are_counted(said: Any, folder: Path) -> None:
    assert_learnt(said["shares"].said)
    weights = state(folder / "shares")
    assert "decoder.layers.0.attention.kv_down.weight" in weights
    assert "decoder.layers.1.attention.kv_down.weight" not in weights
    assert weights["decoder.layers.1.attention.kv_source.weight"] != 0.9
    model = json.loads(said["card of a memory"].out)["models"][0]
    layers, width = model["shape"]["n_layers"], model["shape"]["d_model"]
    assert model["parameters"]["tables"] == layers * 997 * width
    assert model["parameters"]["families"]["memory"] == layers * 998 * width
    assert model["weights"]["table_bytes"]["bf16"] == 2 * layers * 997 * width


@pytest.mark.slow
def test_its_children_train_and_generate_in_blocks_of_this_project(said: Said, folder: Path) -> None:
    weights = state(folder / "children")
    assert "decoder.layers.0.attention.key_conv.gate" in weights
    assert "decoder.layers.1.residual.ffn_out_conv.strength" in weights
    assert "no sampled text" not in said["trains children"].said


@pytest.mark.slow
def test_its_preset_and_configurations_are_options_like_any_other(said: Said) -> None:
    model = yaml.safe_load(said["preset"].out)
    assert (model["attention"]["name"], model["attention"]["first_decay"]) == ("retention", 4)
    assert (model["position"]["name"], model["d_model"]) == ("rope", 192)
    assert yaml.safe_load(said["an experiment"].out)["model"]["attention"]["name"] == "retention"


@pytest.mark.slow
def test_data_of_the_plug_in_train_its_task_and_resume(said: Said, folder: Path) -> None:
    whole, parts = (json.loads((folder / r / "results.json").read_text())["metrics"] for r in ("whole", "parts"))
    assert all(whole[figure] == parts[figure] for figure in ("val/loss", "train/loss")) and said
    with (folder / "parts" / "csv" / "metrics.csv").open(newline="") as file:
        assert len({row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]}) > 1


@pytest.mark.slow
def test_plug_in_is_swept_by_a_wildcard(said: Said, folder: Path) -> None:
    with (folder / "sweep" / "summary.csv").open(newline="") as file:
        rows = {row["overrides"]: row["status"] for row in csv.DictReader(file)}
    assert said and rows == {f"model/attention={name}": "completed" for name in ("mqa", "retention")}


def test_command_of_the_plug_in_is_one_of_blockwright(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert command.run(["half-life", "0.5"]) is None
    assert capsys.readouterr().out == "0.5: 1.0 tokens\n"
    assert "after how many tokens" in command.usage()


@pytest.mark.slow
def test_start_of_the_plug_in_fills_a_run_which_resumes_without_it(
    quick: list[str], warm: Warm, site: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    file, out, vectors = tmp_path / "vectors.pt", tmp_path / "run", torch.randn(257, 64)
    torch.save(vectors, file)
    plain = [*quick, "callbacks.report=null", "vectors=file", f"hydra.run.dir={out}"]
    start = [*plain, f"vectors.file={file}"]

    def ended(arguments: list[str], code: int, words: str) -> None:
        found = run(warm, {"it": arguments}, site, environment, tmp_path)["it"]
        assert found.code == code and words in found.said, found.said

    ended(plain, 64, "error: vectors.file = ???")
    ended([*start, "trainer.max_steps=3"], 0, "the embedding is that of")
    assert torch.equal(state(out)["decoder.embedding.weight"], vectors)
    file.unlink()
    ended([*start, "ckpt_path=last"], 0, "step=6")
    assert torch.equal(state(out)["decoder.embedding.weight"], vectors)
    ended([*start, f"hydra.run.dir={tmp_path}/other"], 64, "error: vectors.file = ")


CONFORMANCE = """
import pytest
from blockwright.blocks.conformance import cases, kernel_cases

BLOCKS = (
    "attention/retention", "attention/gated_linear", "gating/noisy_topk", "kv_source/relayed", "memory/bigram",
    "position/xpos", "loop/mirror", "entry/diagonal", "position/forgetting", "scores/tempered", "convolution/smear",
    "readout/sub_norm", "residual/dropped_tokens",
)  # fmt: skip

@pytest.mark.parametrize("block", BLOCKS)
def test_conformance(block):
    outcomes = {case.check: case.brief() for case in cases(block)}
    assert not {check: o.reason for check, o in outcomes.items() if o.status == "failed"}
    assert sum(o.status == "passed" for o in outcomes.values()) > 3

@pytest.mark.parametrize("case", [*cases("entry/diagonal"), *kernel_cases("attention/band")], ids=str)
def test_case(case):
    case.run()

def test_kernel_is_chosen_where_it_applies_and_passed_over_elsewhere(monkeypatch):
    import dataclasses
    import torch
    from blockwright.blocks.kernels import seam
    from blockwright import Kernels, Scoring

    ran = []
    one = seam.implementations("attention")["band"]
    spy = lambda *given: ran.append(given[3].window) or one.call(*given)
    monkeypatch.setitem(seam._known["attention"], "band", dataclasses.replace(one, call=spy))
    seam.chain.cache_clear()
    q = torch.randn(1, 70, 2, 8)
    for window in (None, 8, 65):
        Kernels().attend(q, q, q, Scoring(0.3, window=window))
    assert ran == [8]
"""


@pytest.mark.slow
def test_plug_in_proves_its_blocks_by_the_kit_in_its_own_tests(
    site: Path, warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "test_blocks.py").write_text(CONFORMANCE)
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_blocks.py"]
    done = warm.run(*command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = (int(re.search(rf"(\d+) {word}", done.stdout)[1]) for word in ("passed", "skipped"))  # type: ignore[index]
    assert passed > 20 and skipped  # a check that does not apply is a skipped test


@pytest.fixture(scope="module")
def among_bad_company(
    quick: list[str], site: Path, warm: Warm, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Said:
    """The plug-in beside one that takes a taken name, one that cannot be imported, and one that is missing."""
    crowd = tmp_path_factory.mktemp("crowd")
    shutil.copytree(site, crowd, dirs_exist_ok=True)
    (crowd / "copycat.py").write_text(
        "from blockwright.blocks.attention.grouped import MHA\n"
        "from blockwright.registry import register\n\n\n"
        '@register("attention", "mha")\n'
        "class Mine(MHA):\n"
        '    """Takes a name that is taken."""\n'
    )
    (crowd / "wreck.py").write_text("import a_missing_package\n")
    for name, module in {"copycat": "copycat", "wreck": "wreck", "ghost": "ghost:Block"}.items():
        points = {"blockwright.blocks": {name: module}}
        install(crowd, {"name": f"the-{name}", "version": "1.0", "entry-points": points})
    swap = ["model/attention=mha", "model/position=xpos", "trainer.max_steps=2", f"hydra.run.dir={crowd}/run"]
    return run(warm, {"catalogue": ["blocks"], "trains": [*quick, *swap]}, crowd, environment, crowd)


@pytest.mark.slow
def test_plug_ins_that_clash_or_do_not_load_are_named_and_all_else_works(among_bad_company: Said) -> None:
    warnings = "".join(found.said for found in among_bad_company.values())
    (told,) = set(re.findall(r"UserWarning: (attention 'mha' is already .*)", warnings))
    assert "blockwright.blocks.attention.grouped" in told and "the-copycat (copycat)" in told
    (told,) = re.findall(r"UserWarning: (block plug-in 'wreck' .*)", warnings)
    assert "the-wreck" in told and "a_missing_package" in told and "block plug-in 'ghost' of the-ghost" in warnings
    code, text = among_bad_company["catalogue"].code, among_bad_company["catalogue"].said
    assert code == 0 and "attention/retention" in text and "ffn/moe" in text
    assert "blockwright " in next(line for line in text.splitlines() if "attention/mha " in line)
    code, text = among_bad_company["trains"].code, among_bad_company["trains"].said
    assert code == 0 and "validation loss" in text, text


@pytest.mark.slow
def test_plug_in_installs_with_pip(site: Path, environment: dict[str, str], tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 61:
        pytest.skip("this environment's setuptools does not read pyproject.toml, and a newer one would be downloaded")
    source = tmp_path / "source"
    shutil.copytree(PLUGIN, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name = "blockwright_guest-0.1.0.dist-info/entry_points.txt"
    assert set((tmp_path / "site" / name).read_text().split("\n")) == set((site / name).read_text().split("\n"))

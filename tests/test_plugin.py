"""Another distribution adds blocks, and everything here knows them; no line of this project is changed for it.

tests/plugin is that distribution. It is put in place as pip would put it, though without pip, whose build would need a
recent setuptools: what is installed is read from its pyproject.toml.
"""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from warm import Warm

from blockwright import command
from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import generate

pytestmark = pytest.mark.xdist_group("plugin")  # its fixture runs a whole program, once

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path(__file__).resolve().parent / "plugin"

DRIVER = """
import contextlib, io, json, sys, traceback
import blockwright.lab.describe
import blockwright.registry.__main__
from blockwright import train
from hydra.core.global_hydra import GlobalHydra

for name, arguments in json.load(sys.stdin).items():
    GlobalHydra.instance().clear()
    sys.argv = ["train.py", *arguments]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if arguments[0] == "describe":
                blockwright.lab.describe.main(arguments[1:])
            else:
                blockwright.registry.__main__.main(arguments[1:]) if arguments[0] == "registry" else train.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "raised"
    print(json.dumps([name, code or 0, said.getvalue()]))
"""


def install(site: Path, project: dict[str, Any]) -> None:
    """Leave the metadata of a distribution as an installer does."""
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    groups = [[f"[{group}]", *map(" = ".join, points.items())] for group, points in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("\n\n".join(map("\n".join, groups)) + "\n")


def run(
    warm: Warm, commands: dict[str, list[str]], site: Path, environment: dict[str, str], cwd: Path
) -> dict[str, Any]:
    there = {**environment, "PYTHONPATH": str(site)}
    done = warm.run("-c", DRIVER, input=json.dumps(commands), cwd=cwd, env=there)
    assert done.returncode == 0, done.stderr
    outcomes = {name: (code, said) for name, code, said in map(json.loads, done.stdout.splitlines())}
    return {**outcomes, "warnings": done.stderr + "".join(said for _, said in outcomes.values())}


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


def zigzags(folder: Path, quick: list[str]) -> dict[str, list[str]]:
    """Commands with the data and the task of the plug-in: a run, the same in two parts, and mistakes."""
    chosen = [
        "experiment=zigzags",
        "optimizer/constraint=row_sphere",
        *(o for o in quick if not o.startswith(("data", "logger"))),
        "logger=csv",
    ]
    part, last = f"hydra.run.dir={folder}/parts", f"ckpt_path={folder}/parts/checkpoints/last.ckpt"
    half = ["trainer.max_steps=3", "trainer.val_check_interval=3", "scheduler=constant"]  # whatever the number of steps
    return {
        "data": [*chosen, *half, "trainer.max_steps=6", f"hydra.run.dir={folder}/whole"],
        "data, half": [*chosen, *half, part],
        "data, resumed": [*chosen, *half, "trainer.max_steps=6", part, last],
        "data, its own rule": [*chosen, "data.largest_step=64"],
        "data, unknown parameter": [*chosen, "data.larges_step=3"],
        "data, wrong type": [*chosen, "data.batches=many"],
    }


CHILDREN = [
    "model/attention=gqa",
    *("model.attention.key_conv=smear", "+model/readout=sub_norm", "trainer.max_steps=2"),
    *("model/residual=convolved", "model.residual.residual=prenorm"),
    *("model.residual.attention_conv=smear", "model.residual.ffn_out_conv=smear"),
]


@pytest.fixture(scope="module")
def said(small: list[str], warm: Warm, site: Path, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    chosen = ["model/attention=retention", "model/position=xpos", "model/gating=noisy_topk"]
    loop = ["+model/loop=mirror", "model.loop.first=1", "model.loop.visits=2", "model.loop.entry=diagonal"]
    quick = [*small, "logger=none", "callbacks.report.sample_tokens=0", "callbacks.throughput=null"]
    sweep = ["trainer.max_steps=2", "trainer.val_check_interval=2", f"hydra.sweep.dir={folder}/sweep"]
    commands = {
        "catalogue": ["registry"],
        "block": ["registry", "gating/noisy_topk"],
        "help": ["--help"],
        "card": ["describe", "model=tiny"],
        "card of a memory": ["describe", "model=tiny", "+model/memory=bigram", "--json"],
        "unknown kernel": [*quick, "task.kernels.attention=bant", f"hydra.run.dir={folder}/x"],
        "trains": [*quick, *chosen, *loop, "model.attention.first_decay=4", f"hydra.run.dir={folder}/run"],
        "drops": [*quick, "model/residual=dropped_tokens", f"hydra.run.dir={folder}/drops"],
        "remembers": [*quick, "+model/memory=bigram", f"hydra.run.dir={folder}/remembers"],
        "trains children": [*quick, *CHILDREN, "callbacks.report.sample_tokens=3", f"hydra.run.dir={folder}/children"],
        "preset": ["model=retentive_tiny", "model/position=of/tiny", "--cfg", "job", "--package", "model"],
        "presets": ["registry", "model/ret*"],
        "experiment": ["experiment=retentive", "--cfg", "job"],
        "no experiment": ["experiment=retentiv"],
        "wrong type": [*quick, *chosen, "model.attention.first_decay=slow", f"hydra.run.dir={folder}/x"],
        "unknown parameter": [*quick, *chosen, "+model.position.widow=3", f"hydra.run.dir={folder}/x"],
        "its own rule": [*quick, *chosen, "model.gating.noise=-1", f"hydra.run.dir={folder}/x"],
        "shares": [
            *quick,
            "+model/kv_source=lent",
            "+model.layout.kv_source=lent relayed",
            f"hydra.run.dir={folder}/shares",
        ],
        **zigzags(folder, quick),
        "sweep": ["-m", *quick, *sweep, "model/attention=glob(*,exclude=*_*)"],
    }
    return run(warm, commands, site, environment, folder)


@pytest.mark.slow
def test_plug_in_is_in_the_catalogue_with_its_provider(said: dict[str, Any]) -> None:
    code, text = said["catalogue"]
    assert code == 0
    for name in (
        "attention/retention", "attention/gated_linear", "gating/noisy_topk", "position/xpos", "position/forgetting",
        "scores/tempered",
    ):  # fmt: skip
        (line,) = [line for line in text.splitlines() if f"{name} " in line]
        assert "blockwright-guest" in line
    assert "blockwright-guest" not in next(line for line in text.splitlines() if "attention/mla " in line)


@pytest.mark.slow
def test_parameters_of_a_plug_in_are_explained(said: dict[str, Any]) -> None:
    code, text = said["block"]
    assert code == 0
    assert "blockwright_guest.noisy_topk.NoisyTopK, provided by blockwright-guest" in text
    assert re.search(r"noise +float +1\.0 +factor on the noise", text)


@pytest.mark.slow
def test_plug_in_is_in_the_help(said: dict[str, Any]) -> None:
    code, text = said["help"]
    assert code == 0
    assert re.search(r"model/attention: .*\bretention\b", text)
    assert re.search(r"model/position: .*\bxpos\b", text)


@pytest.mark.slow
def test_kernel_of_the_plug_in_is_in_the_cost_card_and_among_the_names(said: dict[str, Any]) -> None:
    code, text = said["card"]
    assert code in (0, None), text
    assert re.search(r"attention +band, else blocked, else few_queries, else sdpa", text), text
    code, text = said["unknown kernel"]
    assert code == 64 and "(auto, fa3, fa4, " in text and "Did you mean 'band'" in text


@pytest.mark.slow
def test_plug_in_trains_on_the_command_line(said: dict[str, Any], folder: Path) -> None:
    code, text = said["trains"]
    assert code == 0, text
    losses = [float(loss) for loss in re.findall(r"train/loss=(\S+)", text)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    model = checkpoint["hyper_parameters"]["model"]
    assert (model["attention"]["name"], model["attention"]["first_decay"]) == ("retention", 4)
    assert (model["position"]["name"], model["gating"]["name"]) == ("xpos", "noisy_topk")
    assert (model["loop"]["name"], model["loop"]["entry"]) == ("mirror", "diagonal")
    assert {"decoder.layers.1.ffn.gating.noise_bias", "decoder.loop.entry.alpha"} <= checkpoint["state_dict"].keys()
    assert json.loads((folder / "run" / "results.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_keys_that_the_plug_in_shares_over_depth_train_and_are_cached_once(said: dict[str, Any], folder: Path) -> None:
    code, text = said["shares"]
    assert code == 0, text
    losses = [float(loss) for loss in re.findall(r"train/loss=(\S+)", text)]
    assert losses[-1] < losses[0] - 0.5
    weights = torch.load(folder / "shares" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert "decoder.layers.0.attention.kv_down.weight" in weights
    assert "decoder.layers.1.attention.kv_down.weight" not in weights
    assert weights["decoder.layers.1.attention.kv_source.weight"] != 0.9


@pytest.mark.slow
def test_layers_of_the_plug_in_that_take_some_tokens_train(said: dict[str, Any]) -> None:
    code, text = said["drops"]
    assert code == 0, text
    losses = [float(loss) for loss in re.findall(r"train/loss=(\S+)", text)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_children_of_the_plug_in_train_and_generate_in_blocks_of_this_project(
    said: dict[str, Any], folder: Path
) -> None:
    code, text = said["trains children"]
    assert code == 0, text
    state = torch.load(folder / "children" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert "decoder.layers.0.attention.key_conv.gate" in state
    assert "decoder.layers.1.residual.ffn_out_conv.strength" in state
    assert "no sampled text" not in text


@pytest.mark.slow
def test_preset_of_the_plug_in_is_a_model_like_any_other(said: dict[str, Any]) -> None:
    code, text = said["preset"]
    assert code == 0, text
    model = yaml.safe_load(text)
    assert (model["attention"]["name"], model["attention"]["first_decay"]) == ("retention", 4)
    assert (model["position"]["name"], model["d_model"]) == ("rope", 192)
    code, text = said["presets"]
    assert code == 0 and re.search(r"retentive_tiny .*blockwright-guest.*Retention in place of attention", text)


@pytest.mark.slow
def test_configurations_of_the_plug_in_are_options_like_any_other(said: dict[str, Any]) -> None:
    code, text = said["experiment"]
    assert code == 0, text
    assert yaml.safe_load(text)["model"]["attention"]["name"] == "retention"
    assert re.search(r"experiment: .*\bretentive\b", said["help"][1])
    code, text = said["no experiment"]
    assert code == 64 and "Did you mean 'retentive'" in text


@pytest.mark.slow
def test_data_of_the_plug_in_train_its_task_and_resume(said: dict[str, Any], folder: Path) -> None:
    results = {}
    for name, run in (("data", "whole"), ("data, half", None), ("data, resumed", "parts")):
        assert said[name][0] == 0, said[name][1]
        if run is not None:
            results[run] = json.loads((folder / run / "results.json").read_text())["metrics"]
    assert results["whole"]["val/loss"] == results["parts"]["val/loss"]
    assert results["whole"]["train/loss"] == results["parts"]["train/loss"]
    with (folder / "parts" / "csv" / "metrics.csv").open(newline="") as file:
        losses = [row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]]
    assert len(set(losses)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "remedy"),
    [
        ("data, its own rule", "data.largest_step", "Climb by smaller steps"),
        ("data, unknown parameter", "data.larges_step", "Did you mean 'largest_step'?"),
        ("data, wrong type", "data.batches", ""),
    ],
)
def test_data_of_the_plug_in_are_typed_like_the_built_ins(
    said: dict[str, Any], name: str, path: str, remedy: str
) -> None:
    code, text = said[name]
    assert code == 64, text
    assert f"error: {path} = " in text and remedy in text and "Traceback" not in text


def test_command_of_the_plug_in_is_one_of_blockwright(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert command.run(["half-life", "0.5"]) is None
    assert capsys.readouterr().out == "0.5: 1.0 tokens\n"
    assert "after how many tokens" in command.usage()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "rule"),
    [
        ("wrong type", "model.attention.first_decay", "must be a number"),
        ("unknown parameter", "model.position.widow", "position 'xpos' has no parameter 'widow'"),
        ("its own rule", "model.gating.noise", "must not be negative"),
    ],
)
def test_plug_in_is_typed_like_the_built_ins(said: dict[str, Any], name: str, path: str, rule: str) -> None:
    code, text = said[name]
    assert code == 64, text
    assert f"error: {path} = " in text and rule in text and "Traceback" not in text


@pytest.mark.slow
def test_plug_in_is_swept_by_a_wildcard(said: dict[str, Any], folder: Path) -> None:
    assert said["sweep"][0] == 0, said["sweep"][1]
    with (folder / "sweep" / "summary.csv").open(newline="") as file:
        rows = {row["overrides"]: row["status"] for row in csv.DictReader(file)}
    assert rows["model/attention=retention"] == "completed"
    assert set(rows) >= {f"model/attention={name}" for name in ("gqa", "mha", "mla", "mqa")}
    assert set(rows.values()) == {"completed"}


@pytest.mark.slow
def test_start_of_the_plug_in_fills_a_run_which_resumes_without_it(
    small: list[str], warm: Warm, site: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    file, out = tmp_path / "vectors.pt", tmp_path / "run"
    vectors = torch.randn(257, 64)
    torch.save(vectors, file)
    quick = [*small, "logger=none", "callbacks.report=null", "callbacks.throughput=null", f"hydra.run.dir={out}"]
    start = [*quick, "vectors=file", f"vectors.file={file}"]

    def embedding() -> torch.Tensor:
        checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        return checkpoint["state_dict"]["decoder.embedding.weight"]

    first = {"unset": [*quick, "vectors=file"], "trains": [*start, "trainer.max_steps=3"]}
    said = run(warm, first, site, environment, tmp_path)
    code, text = said["unset"]
    assert code == 64 and "error: vectors.file = ???" in text
    code, text = said["trains"]
    assert code == 0 and "the embedding is that of" in text and torch.equal(embedding(), vectors), text
    file.unlink()
    again = {"resumes": [*start, "ckpt_path=last"], "begins": [*start, f"hydra.run.dir={tmp_path}/other"]}
    said = run(warm, again, site, environment, tmp_path)
    code, text = said["resumes"]
    assert code == 0 and "step=6" in text and torch.equal(embedding(), vectors), text
    code, text = said["begins"]
    assert code == 64 and "error: vectors.file = " in text


CONFORMANCE = """
import pytest
from blockwright.blocks.conformance import cases, kernel_cases

BLOCKS = (
    "attention/retention", "attention/gated_linear", "gating/noisy_topk", "kv_source/relayed", "memory/bigram",
    "position/xpos", "loop/mirror", "entry/diagonal", "position/forgetting", "scores/tempered", "convolution/smear",
    "readout/sub_norm", "residual/dropped_tokens",
)  # fmt: skip

@pytest.mark.parametrize("case", [case for block in BLOCKS for case in cases(block)], ids=str)
def test_conformance(case):
    case.run()

@pytest.mark.parametrize("case", kernel_cases("attention/band"), ids=str)
def test_kernel(case):
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
def test_memory_of_the_plug_in_trains_and_is_counted(said: dict[str, Any], folder: Path) -> None:
    assert said["remembers"][0] == 0, said["remembers"][1]
    assert (folder / "remembers" / "checkpoints" / "last.ckpt").is_file()
    code, text = said["card of a memory"]
    assert code == 0
    model = json.loads(text)["models"][0]
    layers, width = model["shape"]["n_layers"], model["shape"]["d_model"]
    assert model["parameters"]["tables"] == layers * 997 * width
    assert model["parameters"]["families"]["memory"] == layers * 998 * width
    assert model["weights"]["table_bytes"]["bf16"] == 2 * layers * 997 * width


@pytest.mark.slow
def test_plug_in_proves_its_blocks_by_the_kit_in_its_own_tests(
    site: Path, warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "test_blocks.py").write_text(CONFORMANCE)
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_blocks.py"]
    done = warm.run(*command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = (int(re.search(rf"(\d+) {word}", done.stdout)[1]) for word in ("passed", "skipped"))  # type: ignore[index]
    assert passed > 40
    assert "its attention keeps no cache" in done.stdout
    assert "it does not route tokens" in done.stdout
    # Calls that the kernel does not take, and blocks without a router, indexer or cache.
    assert skipped < passed / 2


@pytest.mark.slow
def test_nothing_here_names_the_plug_in() -> None:
    own = (
        "dropped_tokens",
        "retention",
        "gated_linear",
        "xpos",
        "zigzags",
        "row_sphere",
        "tempered",
        "relayed",
        "bigram",
    )
    names = "|".join(
        ("blockwright_guest", "retentive", "noisy_topk", "dropped_tokens", *(rf"\b{name}\b" for name in own))
    )
    for package in ("registry", "blocks", "training", "lab", "plugins", "conf"):
        for file in (ROOT / package).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                text = file.read_text()
                assert not re.search(names, text), file


@pytest.fixture(scope="module")
def among_bad_company(
    small: list[str], site: Path, warm: Warm, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The plug-in beside one that takes a taken name, one that cannot be imported, and one that is missing."""
    crowd = tmp_path_factory.mktemp("crowd")
    shutil.copytree(site, crowd, dirs_exist_ok=True)
    (crowd / "copycat.py").write_text(
        "from blockwright.blocks.attention.mha import MHA\n"
        "from blockwright.registry import register\n\n\n"
        '@register("attention", "mha")\n'
        "class Mine(MHA):\n"
        '    """Takes a name that is taken."""\n'
    )
    (crowd / "wreck.py").write_text("import a_missing_package\n")
    for name, module in {"copycat": "copycat", "wreck": "wreck", "ghost": "ghost:Block"}.items():
        points = {"blockwright.blocks": {name: module}}
        install(crowd, {"name": f"the-{name}", "version": "1.0", "entry-points": points})
    out = crowd / "run"
    swap = ["model/attention=mha", "model/position=xpos", "trainer.max_steps=2", "callbacks.report.sample_tokens=0"]
    commands = {"catalogue": ["registry"], "trains": [*small, *swap, f"hydra.run.dir={out}"]}
    return run(warm, commands, crowd, environment, crowd)


@pytest.mark.slow
def test_clash_of_names_names_both_owners(among_bad_company: dict[str, Any]) -> None:
    (told,) = set(re.findall(r"UserWarning: (attention 'mha' is already .*)", among_bad_company["warnings"]))
    assert "by blockwright (blockwright.blocks.attention.mha)" in told and "the-copycat (copycat)" in told


@pytest.mark.slow
def test_plugin_that_cannot_be_imported_is_named_with_its_reason(among_bad_company: dict[str, Any]) -> None:
    (told,) = re.findall(r"UserWarning: (block plug-in 'wreck' .*)", among_bad_company["warnings"])
    assert "of the-wreck did not load: ModuleNotFoundError: No module named 'a_missing_package'" in told
    assert "block plug-in 'ghost' of the-ghost did not load" in among_bad_company["warnings"]


@pytest.mark.slow
def test_everything_else_works_in_bad_company(among_bad_company: dict[str, Any]) -> None:
    code, text = among_bad_company["catalogue"]
    assert code == 0 and "attention/retention" in text and "ffn/moe" in text
    assert "blockwright " in next(line for line in text.splitlines() if "attention/mha " in line)
    code, text = among_bad_company["trains"]
    assert code == 0, text
    assert "validation loss" in text


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


@pytest.fixture
def plugin_blocks(site: Path, temporary_blocks: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in's classes in this process, registered until the test ends."""
    monkeypatch.syspath_prepend(str(site))
    for name in ("retention", "gated_linear", "noisy_topk", "xpos", "forgetting", "tempered"):
        monkeypatch.delitem(sys.modules, f"blockwright_guest.{name}", raising=False)
        importlib.import_module(f"blockwright_guest.{name}")


def test_attention_of_the_plug_in_looks_back_only_and_within_its_document(
    plugin_blocks: None, make_block: Callable[..., Any]
) -> None:
    block = make_block("attention", {"name": "retention"}, around={"position": "xpos"})
    x, positions = torch.randn(2, 9, 48, dtype=torch.float64), torch.arange(9)[None]
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(block(x, Pass(positions))[:, :5], block(changed, Pass(positions))[:, :5])
    packed = torch.tensor([[0] * 5 + [1] * 4] * 2)
    restarted = torch.cat((torch.arange(5), torch.arange(4)))[None]
    second = block(x[:, 5:], Pass(torch.arange(4)[None]))
    assert torch.allclose(block(x, Pass(restarted.expand(2, -1), segments=packed))[:, 5:], second)


def test_recurrence_of_the_plug_in_learns_and_generates(
    plugin_blocks: None, tiny: Callable[..., dict[str, Any]]
) -> None:
    decoder = compose(tiny(attention={"name": "gated_linear", "n_heads": 4}), seed=0)
    text = torch.arange(30)[None] % 7
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = decoder.nll(decoder.hidden(text[:, :-1])[0], text[:, 1:]) / 29
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4
    prompt = torch.tensor([[3, 4, 5, 6, 0, 1]])
    assert generate(decoder.eval(), prompt, 9, temperature=0.0)[0, 6:].tolist() == [2, 3, 4, 5, 6, 0, 1, 2, 3]


def test_position_of_the_plug_in_knows_distance_only(plugin_blocks: None, make_block: Callable[..., Any]) -> None:
    block = make_block("position", {"name": "xpos", "scale": 16.0}, head_dim=12, n_heads=2)
    q, k = (torch.randn(1, 1, 2, 12, dtype=torch.float64) for _ in range(2))

    def score(t: int, s: int) -> torch.Tensor:
        turned = block.rotate(q, k, torch.tensor([[t]]))[0], block.rotate(q, k, torch.tensor([[s]]))[1]
        return (turned[0] * turned[1]).sum(-1)

    assert torch.allclose(score(7, 3), score(24, 20), rtol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), rtol=1e-3)

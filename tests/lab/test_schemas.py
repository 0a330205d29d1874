"""JSON Schemas of the YAML that people write: every shipped file conforms, and a mistake does not."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from blockwright.lab.schemas import DOCUMENTS, main
from blockwright.training.configuration import conf

GROUPS = {kind: [kind, f"{kind}s"] for kind in DOCUMENTS}  # as folders of the core and of plug-ins are called


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as editors and OmegaConf do."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"), list("-+0123456789")
)


@functools.cache
def validator(kind: str) -> Draft7Validator:
    document = DOCUMENTS[kind]()
    Draft7Validator.check_schema(document)
    return Draft7Validator(document)


def faults(kind: str, text: str) -> list[str]:
    """Paths of what is wrong, without that of the file itself."""
    errors = validator(kind).iter_errors(yaml.load(text, Loader))
    return sorted({"/".join(map(str, error.absolute_path)) or str(error.message) for error in errors})


def shipped(kind: str) -> list[Path]:
    plugins = conf.CONF.parent / "plugins"
    names = GROUPS[kind]
    return [*conf.CONF.glob(f"{kind}/*.yaml"), *(f for name in names for f in plugins.glob(f"*/**/{name}/*.yaml"))]


# The document of experiments imports every class that an option names.
SLOW = [pytest.param(kind, marks=pytest.mark.slow) if kind == "experiment" else kind for kind in DOCUMENTS]


@pytest.mark.parametrize("kind", SLOW)
def test_every_shipped_file_conforms_and_names_its_schema(kind: str) -> None:
    files = [file for file in shipped(kind) if "tests" not in file.parts]
    assert files
    for file in files:
        text = file.read_text()
        assert faults(kind, text) == [], file
        (named,) = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.M)
        assert (file.parent / named).resolve() == (conf.CONF / ".schema" / f"{kind}.json").resolve(), file


@pytest.mark.parametrize(
    ("kind", "text", "paths"),
    [
        ("preset", "{inherits: tiny, attention: {name: mla, kv_lora_ranks: 3}}", ["attention"]),
        ("preset", "{inherits: tiny, attention: {n_heads: 4}, ffn: {name: moe, n_experts: 0}}", ["ffn"]),
        ("preset", "{inherits: tiny, norm: rms}", ["norm"]),
        ("preset", "{inherits: tiny, variants: {ffn: {dense: {name: swiglu, d_ff: wide}}}}", ["variants"]),
        ("preset", "{inherits: tiny, attention: {name: mla, position: {name: rope, base: 0}}}", ["attention"]),
        ("ablation", "{arms: {a: [], b: x=1, c: {overrides: [y=2], like: a}}, tune: 5, seeds: 3}", []),
        ("ablation", "{arms: {a: [], b: {overide: [x=1]}}, seeds: many}", ["arms", "seeds"]),
        ("ladder", "{arms: {a: []}, sizes: 3, durations: []}", ["sizes"]),
        ("control", "{about: x, expect: better}", []),
        ("control", "{about: x, expect: best}", ["expect"]),
    ],
)
def test_a_mistake_is_found_where_it_is(kind: str, text: str, paths: list[str]) -> None:
    assert faults(kind, text) == paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("{model: {attention: {name: gqa, n_heads: 4.5}}}", ["model/attention"]),
        ("{model: {d_model: '${x}', attention: {n_heads: '${y}'}}}", []),
        ("{defaults: [{override /data: mixtures}]}", ["defaults/0"]),
        ("{optimizer: {lr: fast}, seed: 3}", ["optimizer/lr"]),
        ("{data: {batch_size: 0}}", ["data"]),
        ("{data: {batch_size: 8}, callbacks: {report: {sample_tokens: 0}}}", []),
    ],
)
def test_a_mistake_in_an_experiment_is_found_where_it_is(text: str, paths: list[str]) -> None:
    assert faults("experiment", text) == paths


def test_they_are_written_beside_the_users_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blockwright.lab.schemas.DOCUMENTS", {"ablation": DOCUMENTS["ablation"]})
    assert main([]) == 0 and main(["elsewhere"]) == 0
    written = [tmp_path / folder / "ablation.json" for folder in ("conf/.schema", "elsewhere")]
    first, second = (json.loads(file.read_text()) for file in written)
    assert first == second and first["title"] == "ablation"
    lines = re.findall(r"\$schema=(\S+)", capsys.readouterr().out)
    assert lines == ["../.schema/experiment.json", f"{tmp_path}/elsewhere/experiment.json"]


def test_what_is_known_of_a_parameter_is_shown() -> None:
    definitions: Any = DOCUMENTS["preset"]()["definitions"]
    (mla,) = (
        each["then"]["properties"]
        for each in definitions["attention: mapping"]["allOf"]
        if each["if"].get("properties") == {"name": {"const": "mla"}}
    )
    assert mla["kv_lora_rank"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"type": "null"}]
    assert mla["kv_lora_rank"]["description"]

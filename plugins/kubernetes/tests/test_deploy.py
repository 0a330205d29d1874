"""What an administrator applies, and the image, agree with what the launcher makes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from wrong_manifests import good

from blockwright.command import run
from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.preflight import RESOURCES
from blockwright.plugins.kubernetes.render import ENTRY, TEMPORARY, runtime
from blockwright.registry.command import run_command

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy" / "kubernetes"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())


def test_runtime_is_the_one_that_is_rendered() -> None:
    assert read("runtime") == runtime()


def test_role_allows_what_is_asked_for() -> None:
    allowed = {}
    for rule in read("role")["rules"]:
        for group, kind in itertools.product(rule["apiGroups"], rule["resources"]):
            allowed[f"{kind}.{group}" if group else kind] = set(rule["verbs"])
    for resource in RESOURCES.values():
        assert allowed[resource] >= {"create", "patch", "get", "list", "delete"}
    assert allowed["services"] == {"create", "patch"} and allowed["pods"] == {"get", "list"}
    assert allowed["events"] == {"list"}
    assert all(allowed[kind] == {"get"} for kind in ("pods/log", "persistentvolumeclaims", "namespaces"))
    assert "secrets" not in allowed


def test_claim_and_namespace_are_those_of_the_options() -> None:
    assert read("claim")["metadata"]["name"] == Options().claim
    assert read("claim")["spec"]["accessModes"] == ["ReadWriteMany"]
    assert read("namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert set(read("kustomization")["resources"]) <= {file.name for file in DEPLOY.iterdir()}


def test_image_holds_every_package_and_runs_as_the_pods_user() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    linked = {link.name for link in (ROOT / "src" / "blockwright").iterdir() if link.is_symlink()}
    for folder in {"src", *linked} - {"train.py"}:
        assert f"COPY {folder} {folder}\n" in text
    user = good()[0]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}\n" in text
    entry = re.findall(r"^ENTRYPOINT \[(.*)\]$", text, re.MULTILINE)[0]
    assert [word.strip('"') for word in entry.split(", ")] == ENTRY[:3]
    assert all(f"{name}=/tmp" in text for name in TEMPORARY)
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert {"lab", "tensorboard"} <= set(extras.split(","))  # what a run without overrides needs
    assert re.search(r"^ARG BASE$", text, re.MULTILINE)  # no default: the base is given by its digest


REFUSED = {  # command line → path of the refusal
    "kubernetes logs DIR 0 1": "command line",
    "kubernetes logs DIR first": "command line",
    "kubernetes render OUT hydra.launcher.render=X": "hydra.launcher.render",
    "kubernetes run hydra/launcher=joblib": "hydra/launcher",
}


def test_option_without_effect_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, path in REFUSED.items():
        assert run_command(run, line.split()) == 64
        assert capsys.readouterr().err.startswith(f"error: {path} = ")
        assert not list(tmp_path.iterdir())

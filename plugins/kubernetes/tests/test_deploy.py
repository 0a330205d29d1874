"""What an administrator applies, and the image, agree with what the launcher makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from wrong_manifests import good

from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.preflight import RESOURCES
from blockwright.plugins.kubernetes.render import ENTRY, TEMPORARY, runtime

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy" / "kubernetes"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())


def test_runtime_is_the_one_that_is_rendered() -> None:
    assert read("runtime") == runtime()


def test_role_allows_what_is_asked_for() -> None:
    rules = [
        (group, kind, set(r["verbs"]))
        for r in read("role")["rules"]
        for group in r["apiGroups"]
        for kind in r["resources"]
    ]
    allowed = {f"{kind}.{group}" if group else kind: verbs for group, kind, verbs in rules}
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

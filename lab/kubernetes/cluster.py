"""A cluster, spoken to through kubectl, as launchers for Slurm call sbatch: it has every login plug-in, proxy and
certificate rotation, and every user of a cluster has it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry import ConfigError

TIMEOUT_S = 60  # of a call
WAITS_S = (1, 2, 4, 8, 16, 32)  # before trying again, while an API server is upgraded or a laptop wakes up
TRANSIENT = re.compile(
    r"was refused|connection refused|connection reset|unable to connect|EOF|timeout|timed out|deadline exceeded"
    r"|too many requests|currently unable|ServiceUnavailable|InternalError|etcdserver|no such host"
    r"|network is unreachable|TLS handshake|the object has been modified",
    re.IGNORECASE,
)
UNSET = re.compile(r"localhost:8080|no configuration has been provided|current-context is not set", re.IGNORECASE)
LOGIN = r"unauthorized|must be logged in|provide credentials|token (has|is) expired|refresh token|getting credentials"
REFUSALS: Sequence[tuple[str, str, str, str]] = (  # pattern, option, rule, remedy; the first one counts
    (UNSET.pattern, "context", "kubectl knows no cluster", "Get a kubeconfig: kubectl config get-contexts"),
    (r"context .* does not exist", "context", "is no context of kubectl", "kubectl config get-contexts"),
    (LOGIN, "context", "the login has expired", "Log in again, until kubectl auth whoami answers"),
    (r"x509|certificate", "context", "the certificate is not valid", "Renew the kubeconfig, and check the clock"),
    (r"namespaces? .*not found", "namespace", "does not exist", "kubectl create namespace NAME, or name another"),
    (r"exceeded quota", "parallel", "would exceed the namespace's quota", "Lower it, ask for less, or name a queue"),
    (r"violates? PodSecurity", "namespace", "its pod security level forbids these pods", "Leave capabilities out"),
    (r"no matches for kind|doesn't have a resource type", "kind", "the cluster lacks its definition", "See kind=job"),
    (r"immutable|conflict", "", "exists with other options", "Delete the job, or name another hydra.sweep.dir"),
    (r"forbidden", "namespace", "you may not do this", "Ask for the role of deploy/kubernetes/role.yaml"),
    (r"unknown field|unmarshal|is invalid|quantities must", "", "the server refuses the manifest", "See render=FOLDER"),
)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


class NotFound(Exception):  # noqa: N818 - an answer
    """What was asked for is not in the cluster, or may not be looked at."""


@dataclass
class Cluster:
    """A namespace of a cluster.

    Args:
        context: of kubectl's configuration; None for the current one
        namespace: None for the context's
        run: like ``subprocess.run``
        say: prints a line
    """

    context: str | None = None
    namespace: str | None = None
    run: Run = subprocess.run
    say: Callable[[str], object] = print

    def call(self, *arguments: str, given: Any = None, timeout: float | None = TIMEOUT_S) -> tuple[str, str]:
        """Call kubectl, again after errors that pass.

        Args:
            arguments: of kubectl
            given: plain objects for its stdin
            timeout: of the call, in seconds

        Returns:
            its output, and its warnings

        Raises:
            NotFound: there is no such object
            ConfigError: the cluster refuses, or does not answer
        """
        where = [*(["--context", self.context] if self.context else [])]
        where += ["--namespace", self.namespace] if self.namespace else []
        command, text = ["kubectl", *where, *arguments], None if given is None else json.dumps(given)
        for wait in (*WAITS_S, None):
            error = ""
            try:
                done = self.run(command, input=text, capture_output=True, text=True, timeout=timeout)
                if done.returncode == 0 or (arguments[0] == "auth" and done.stdout.startswith("no")):
                    return done.stdout, done.stderr
                error = done.stderr.strip()
            except subprocess.TimeoutExpired:
                error = f"timed out after {timeout} s"
            except FileNotFoundError:
                remedy = "Install kubectl: https://kubernetes.io/docs/tasks/tools"
                raise ConfigError(
                    "hydra/launcher", "kubernetes", "needs kubectl, which is not installed", remedy
                ) from None
            if not TRANSIENT.search(error) or UNSET.search(error) or wait is None:
                break
            self.say(f"the cluster does not answer ({error.splitlines()[-1][:80]}); trying again in {wait} s")
            time.sleep(wait)
        raise self._refusal(arguments, error)

    def _refusal(self, arguments: Sequence[str], error: str) -> Exception:
        if re.search(r"\(NotFound\)", error) and "namespaces" not in error:
            return NotFound(error)
        short = " ".join(error.removeprefix("Error from server").split())[:300]
        for pattern, option, rule, remedy in REFUSALS:
            if re.search(pattern, error, re.IGNORECASE):
                value = getattr(self, option, None) or " ".join(arguments[:2])
                path = f"hydra.launcher.{option}" if option else "hydra.launcher"
                return ConfigError(path, value, f"{rule} ({short})", remedy)
        rule = f"the cluster refused or did not answer ({short})"
        return ConfigError("hydra.launcher", f"kubectl {arguments[0]}", rule, "Try it by hand, and see render=FOLDER")

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get … -o json``.

        Raises:
            NotFound, ConfigError: as ``call``
        """
        return json.loads(self.call("get", *arguments, "-o", "json")[0])

    def items(self, kinds: str, selector: str) -> list[dict[str, Any]]:
        """Objects of some kinds with some labels."""
        return self.get(kinds, "-l", selector)["items"]

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """An object; None if the user may not look.

        Raises:
            NotFound: there is none
        """
        try:
            return self.get(kind, name)
        except ConfigError as error:
            if "forbidden" in error.rule.lower() or "lacks its definition" in error.rule:
                return None
            raise

    def has(self, group: str) -> bool:
        """Whether the cluster has resources of an API group."""
        return bool(self.call("api-resources", f"--api-group={group}", "-o", "name")[0].strip())

    def may(self, verb: str, resource: str, *more: str) -> bool:
        """Whether the user may do something."""
        return self.call("auth", "can-i", verb, resource, *more)[0].startswith("yes")

    def create(self, manifests: Sequence[Mapping[str, Any]], rehearsed: bool = False) -> str:
        """Create objects under their names, once: what exists as it should is left alone.

        Args:
            manifests: plain objects
            rehearsed: have the server check them, and create nothing

        Returns:
            the server's warnings

        Raises:
            ConfigError: refused
        """
        body = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        how = ["create", "--dry-run=server"] if rehearsed else ["apply", "--server-side", "--field-manager=blockwright"]
        return self.call(*how, "--validate=strict", "-f", "-", given=body)[1]

    def delete(self, kind: str, names: Sequence[str]) -> None:
        """Delete objects, and wait until their pods have saved and ended."""
        if names:
            self.call("delete", kind, *names, "--cascade=foreground", "--wait=true", "--ignore-not-found", timeout=None)

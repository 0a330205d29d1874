"""A cluster, spoken to through kubectl, as launchers for Slurm call sbatch: it has every login plug-in, proxy and
certificate rotation, and every user of a cluster has it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from blockwright.registry import ConfigError

TIMEOUT_S = 60  # of a call
WAITS_S = (1, 2, 4, 8, 16, 32)  # before trying again, while an API server is upgraded or a laptop wakes up
TRANSIENT = re.compile(
    r"was refused|connection refused|connection reset|unable to connect|EOF|timeout|timed out|deadline exceeded"
    r"|too many requests|currently unable|ServiceUnavailable|InternalError|etcdserver|no such host"
    r"|network is unreachable|TLS handshake|the object has been modified",
    re.IGNORECASE,
)
KLOG = re.compile(r"^[EWIF]\d{4} \d\d:\d\d:\d\d.*$", re.MULTILINE)  # what kubectl's library logs beside its answer
UNKNOWN_KIND = r"no matches for kind|doesn't have a resource type"  # also where the server could not be asked
UNSET = re.compile(r"localhost:8080|no configuration has been provided|current-context is not set", re.IGNORECASE)
QUOTA, CERTIFICATE, ROLES = "exceeded quota", "x509|certificate", "forbidden"
LOGIN = r"unauthorized|must be logged in|provide credentials|token (has|is) expired|refresh token|getting credentials"
REFUSALS: Sequence[tuple[str, str, str, str]] = (  # pattern, option, rule, remedy; the first one counts
    (UNSET.pattern, "context", "kubectl knows no cluster", "Get a kubeconfig: kubectl config get-contexts"),
    (r"context .* does not exist", "context", "is no context of kubectl", "kubectl config get-contexts"),
    (LOGIN, "context", "the login has expired", "Log in again, until kubectl auth whoami answers"),
    (CERTIFICATE, "context", "the certificate is not valid", "Renew the kubeconfig, and check the clock"),
    (r"namespaces? .*not found", "namespace", "does not exist", "kubectl create namespace NAME, or name another"),
    (QUOTA, "parallel", "would exceed the namespace's quota", "Lower it, ask for less, or name a queue"),
    (r"violates? PodSecurity", "namespace", "its pod security level forbids these pods", "Leave capabilities out"),
    (UNKNOWN_KIND, "kind", "the cluster lacks its definition", "See kind=job"),
    (r"immutable|conflict", "", "exists with other options", "Delete the job, or name another hydra.sweep.dir"),
    (ROLES, "namespace", "you may not do this", "Ask for the role of deploy/kubernetes/role.yaml"),
    (r"unknown field|unmarshal|is invalid|quantities must", "", "the server refuses the manifest", "See render=FOLDER"),
)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def passes(error: str) -> bool:
    """Whether an error of kubectl is one that passes: the server was not reached, or is overloaded.

    Lines that its library logs count only where kubectl itself says no more than that it knows no such kind.
    """
    own = KLOG.sub("", error).strip()
    if UNSET.search(error) or re.search(f"{LOGIN}|{CERTIFICATE}", error, re.IGNORECASE):
        return False
    vague = not own or re.search(UNKNOWN_KIND, own)
    return bool(TRANSIENT.search(error if vague else own))


def last_line(error: str) -> str:
    """What kubectl says at last."""
    return (KLOG.sub("", error).strip() or error).splitlines()[-1]


def _says_no(arguments: Sequence[str], done: subprocess.CompletedProcess[str]) -> bool:
    """Whether ``kubectl auth can-i`` has answered no, for which it ends with 1."""
    return arguments[0] == "auth" and done.stdout.startswith("no")


class NotFound(Exception):  # noqa: N818 - an answer
    """What was asked for is not in the cluster, or may not be looked at."""


class Unreachable(ConfigError):  # noqa: N818 - a state
    """The API server does not answer, after some tries."""


class NoRoom(ConfigError):  # noqa: N818 - a state
    """A quota of the namespace is used up."""


class Forbidden(ConfigError):  # noqa: N818 - a state
    """The user may not do this, or the server has not read its roles yet."""


STATES: Mapping[str, type[ConfigError]] = {QUOTA: NoRoom, ROLES: Forbidden}


@dataclass
class Cluster:
    """A namespace of a cluster.

    Args:
        context: of kubectl's configuration; None for the current one
        namespace: None for the context's
        run: like ``subprocess.run``
        say: prints a line
        waits: seconds before each further try of a call that was not answered; None for ``WAITS_S``
        said: what was said to be unchecked, once
    """

    context: str | None = None
    namespace: str | None = None
    run: Run = subprocess.run
    say: Callable[[str], object] = print
    waits: Sequence[float] | None = None
    said: set[str] = field(default_factory=set)

    def call(self, *arguments: str, given: Any = None, timeout: float | None = TIMEOUT_S) -> tuple[str, str]:
        """Call kubectl, again after errors that pass.

        A server that starts denies everything until it has read its roles. What it denies is therefore asked again once
        it says that it is ready.

        Args:
            arguments: of kubectl
            given: plain objects for its stdin
            timeout: of the call, in seconds

        Returns:
            its output, and its warnings

        Raises:
            NotFound: there is no such object
            ConfigError: the cluster refuses; ``NoRoom`` for a quota, ``Forbidden`` for a missing right,
                ``Unreachable`` if it does not answer
        """
        text = None if given is None else json.dumps(given)
        for wait in (*(WAITS_S if self.waits is None else self.waits), None):
            done, starting = self._asked(arguments, text, timeout), False
            if wait is not None and self._denied(arguments, done):
                starting = self._asked(("get", "--raw", "/readyz"), None, TIMEOUT_S).stdout.strip() != "ok"
                done = done if starting else self._asked(arguments, text, timeout)
            error = done.stderr.strip()
            if not starting and (done.returncode == 0 or _says_no(arguments, done)):
                return done.stdout, done.stderr
            if wait is None or not (starting or passes(error)):
                break
            why = "it denies what is asked and is not ready" if starting else last_line(error)[:80]
            self.say(f"the cluster does not answer ({why}); trying again in {wait} s")
            time.sleep(wait)
        raise self._refusal(arguments, error)

    def _asked(
        self, arguments: Sequence[str], text: str | None, timeout: float | None
    ) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        try:
            return self._kubectl(command, input=text, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"timed out after {timeout} s")

    def _denied(self, arguments: Sequence[str], done: subprocess.CompletedProcess[str]) -> bool:
        refused = done.returncode != 0 and not _says_no(arguments, done)
        return _says_no(arguments, done) or (
            refused and isinstance(self._refusal(arguments, done.stderr.strip()), Forbidden)
        )

    def follow(self, *arguments: str) -> int:
        """Call kubectl, which writes where this process writes; its exit code.

        Raises:
            ConfigError: it is not installed
        """
        return self._kubectl(self.command(*arguments)).returncode

    def _kubectl(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        try:
            return self.run(command, **options)
        except FileNotFoundError:
            remedy = "Install kubectl: https://kubernetes.io/docs/tasks/tools"
            raise ConfigError("hydra/launcher", "kubernetes", "needs kubectl, which is not installed", remedy) from None

    def command(self, *arguments: str) -> list[str]:
        """A call of kubectl on this cluster and namespace."""
        where = [*(["--context", self.context] if self.context else [])]
        return ["kubectl", *where, *(["--namespace", self.namespace] if self.namespace else []), *arguments]

    def _refusal(self, arguments: Sequence[str], error: str) -> Exception:
        if passes(error):
            rule = f"the cluster does not answer ({last_line(error)[:200]})"
            return Unreachable("hydra.launcher.context", self.context, rule, "Try: kubectl get --raw /readyz")
        error = KLOG.sub("", error).strip()
        others = [line for line in error.splitlines() if QUOTA not in line and not line.startswith("Warning:")]
        error = "\n".join(others).strip() or error  # of several objects: a quota is what may pass
        if re.search(r"\(NotFound\)", error) and "namespaces" not in error:
            return NotFound(error)
        short = " ".join(error.removeprefix("Error from server").split())[:300]
        for pattern, option, rule, remedy in REFUSALS:
            if re.search(pattern, error, re.IGNORECASE):
                value = getattr(self, option) if option in ("context", "namespace") else " ".join(arguments[:2])
                path = f"hydra.launcher.{option}" if option else "hydra.launcher"
                return STATES.get(pattern, ConfigError)(path, value, f"{rule} ({short})", remedy)
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

    def identity(self) -> dict[str, Any]:
        """Which cluster and namespace this is: the context and namespace by name, and the UID of the namespace.

        What kubectl does not know, or the user may not read, is None.
        """
        context, namespace = self.context, self.namespace
        with suppress(ConfigError, NotFound, ValueError):
            view = json.loads(self.call("config", "view", "--minify", "-o", "json")[0] or "{}")
            context = context or view.get("current-context") or None
            own = (view.get("contexts") or [{}])[0].get("context", {})
            namespace = namespace or own.get("namespace") or "default"
        uid = None
        if namespace:
            found = replace(self, context=context, namespace=namespace).find("namespace", namespace)
            uid = (found or {}).get("metadata", {}).get("uid")
        return {"context": context, "namespace": namespace, "uid": uid}

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """An object; None, and a line, if the user may not look.

        Raises:
            NotFound: there is none
        """
        try:
            return self.get(kind, name)
        except Forbidden:
            unread = f"{kind.partition('.')[0]} {name} is not checked: you may not read it"
            if unread not in self.said:
                self.said.add(unread)
                self.say(unread)
            return None

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

    def own(self, owner: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> None:
        """Create objects that are deleted with another one.

        Args:
            owner: apiVersion, kind and name of an object that is there
            manifests: plain objects
        """
        if not manifests:
            return
        there = self.get(owner["kind"].lower(), owner["metadata"]["name"])
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {"name": owner["metadata"]["name"], "uid": there["metadata"]["uid"]}
        self.create([{**m, "metadata": {**m["metadata"], "ownerReferences": [reference]}} for m in manifests])

    def delete(self, kind: str, names: Sequence[str]) -> None:
        """Begin to delete objects: they are gone when their pods have saved and ended."""
        if names:
            self.call("delete", kind, *names, "--cascade=foreground", "--wait=false", "--ignore-not-found")

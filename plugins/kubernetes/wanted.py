"""Check the options of ``hydra/launcher=kubernetes``, in the words in which they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from blockwright.plugins.kubernetes.options import GROUP, Options
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.ranges import numbers
from blockwright.registry.reading import checked
from blockwright.registry.reading import read as read_settings

# --- what Kubernetes accepts as a name, the value of a label, a variable and a quantity -------------------------------


DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
QUANTITY = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|[kMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
LONGEST = 63  # letters of a host name; pods are named NAME-node-0-INDEX
SUFFIX = "-abcde"  # a Job adds such a one to the names of its pods
ANNOTATIONS = 262_144  # bytes of all together


def amount(quantity: str) -> float:
    """A quantity as a number: 500m → 0.5, 1Ki → 1024."""
    number, unit = re.fullmatch(r"([+-]?[0-9.]+)([a-zA-Z]*)", quantity.replace("e+", "e").split("e")[0]).groups()  # type: ignore[union-attr]
    if "e" in quantity.lower().rstrip("i") and not unit:
        return float(quantity)
    if unit == "m":
        return float(number) / 1000
    power = "kMGTPE".find(unit[:1].replace("K", "k")) + 1 if unit else 0
    return float(number) * (1024 if unit.endswith("i") else 1000) ** power


PATH = "hydra.launcher"
OF_RUNTIME = ("secrets", "capabilities", "restarts", "ttl_s", "priority")
CHOICES = {"kind": Literal["auto", "job", "jobset", "trainjob"], "on_stop": Literal["leave", "stop"]}
NAMES = {"namespace": 63, "queue": 63, "claim": 253, "runtime": 253, "priority": 253}  # and their longest
SECRET = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
VALUE = re.compile(  # how known secrets begin, and a password in an address
    r"(?<![A-Za-z0-9])(gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abp]-|AKIA|-----BEGIN)|://[^/\s:@]*:[^/\s@]+@"
)
SECRET_KEY = re.compile(r"(^|[._+])(api_?key|access_?key|password|passwd|secret)$", re.IGNORECASE)  # of an override
OURS = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX", "RANK", "LOCAL_RANK", "WORLD_SIZE")
IMAGE = re.compile(r"[a-z0-9][-a-zA-Z0-9._:/]*(@sha256:[0-9a-f]{64})?")
OWN_LABEL = re.compile(rf"{re.escape(GROUP)}/|kueue\.x-k8s\.io/|app\.kubernetes\.io/managed-by$")
DOMAIN = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)")


def check_options(options: Options) -> None:
    """Refuse options that no cluster could run.

    Raises:
        ConfigError
    """
    for mistake in mistakes(options):
        raise mistake


def _at(name: str, value: Any, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"{PATH}.{name}", value, rule, remedy)


def mistakes(options: Options) -> Iterator[ConfigError]:
    """What is wrong with the options, one error each."""
    for name, hint in {**get_type_hints(Options, include_extras=True), **CHOICES}.items():
        if name in CHOICES or any(bounds for _, bounds in numbers(hint)):
            try:
                checked(getattr(options, name), hint, f"{PATH}.{name}")
            except ConfigError as error:
                yield error
                return  # sums are made of them
    yield from _image(options.image)
    for name, most in NAMES.items():
        value = getattr(options, name)
        if value is not None and (len(value) > most or not all(DNS.fullmatch(part) for part in value.split("."))):
            rule = f"must be lower-case letters, digits and hyphens, {most} at most"
            yield _at(name, value, rule, "Write the name in the cluster")
    yield from _kind(options)
    yield from _resources(options)
    yield from _places(options)
    yield from _environment(options)
    yield from _selection(options)


def _image(image: str | None) -> Iterator[ConfigError]:
    if not image:
        rule = "is what a pod runs, and has no default"
        yield _at("image", image, rule, f"Build deploy/kubernetes/Dockerfile, push it, and write {PATH}.image=…")
    elif not IMAGE.fullmatch(image):
        yield _at("image", image, "is not the name of an image", "Write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:…")


def _kind(options: Options) -> Iterator[ConfigError]:
    for name in OF_RUNTIME if options.kind == "trainjob" else ():
        if (value := getattr(options, name)) != getattr(Options(), name) and not (name == "priority" and options.queue):
            rule = "cannot be given to a TrainJob: its ClusterTrainingRuntime has it"
            yield _at(name, value, rule, "Write it into the runtime and leave it out here, or write kind=jobset")
    if options.runtime != Options().runtime and options.kind != "trainjob":
        yield _at("runtime", options.runtime, "is of a TrainJob", f"Leave it out, or write {PATH}.kind=trainjob")
    if options.topology and not options.queue:
        yield _at("topology", options.topology, "is kept by Kueue, so it needs a queue", f"Write {PATH}.queue=…")
    if options.capabilities:
        unknown = [c for c in options.capabilities if not re.fullmatch(r"[A-Z_]+", c) or c.startswith("CAP_")]
        if unknown:
            yield _at("capabilities", unknown[0], "is not a capability's name", "Write e.g. IPC_LOCK, without CAP_")


def _resources(options: Options) -> Iterator[ConfigError]:
    for name, value in (
        ("cpu", options.cpu),
        ("memory", options.memory),
        ("shm", options.shm),
        *options.resources.items(),
    ):
        if value is None:
            continue
        own = name if name in ("cpu", "memory", "shm") else f"resources.{name}"
        if not QUANTITY.fullmatch(str(value)) or amount(str(value)) <= 0:
            example = "500m or 4" if name == "cpu" else "64Gi" if "/" not in name else "1"
            yield _at(own, value, "is not a positive quantity of Kubernetes", f"Write e.g. {PATH}.{own}={example}")
            return
        if "/" in name and amount(str(value)) % 1:
            yield _at(own, value, "is a device, of which there are whole numbers", "Write an integer")
        if name == "memory" and amount(str(value)) < 2**20:
            yield _at(name, value, "is under 1 MiB", "Write the unit: 64Gi")
            return
    for own, names in (("resources", options.resources), ("gpu", [options.gpu])):
        for name in names:
            if "/" not in name and name != "ephemeral-storage" and not name.startswith("hugepages-"):
                rule = "is neither the full name of a device nor ephemeral-storage or hugepages-SIZE"
                yield _at(own, name, rule, "Write e.g. rdma/ib or nvidia.com/gpu")
    if options.gpu in options.resources:
        yield _at("resources", options.gpu, "is given by gpus", f"Write {PATH}.gpus=N")
    if options.memory and options.shm and amount(options.shm) > amount(options.memory):
        rule = f"counts as memory, of which a pod has {options.memory}"
        yield _at("shm", options.shm, rule, f"Lower it, or raise {PATH}.memory")


def _places(options: Options) -> Iterator[ConfigError]:
    places = {options.claim: options.mount, **options.volumes}
    if options.claim in options.volumes:
        yield _at("volumes", options.claim, "is the claim of the runs already", "Leave it out")
    for claim, path in places.items():
        own = "mount" if claim == options.claim else f"volumes.{claim}"
        if not re.fullmatch(r"/[^:]+", str(path)) or ".." in str(path).split("/"):
            yield _at(
                own, path, "must be an absolute path without a colon, below the root", f"Write {PATH}.{own}=/data"
            )
        if claim != options.claim and not (len(claim) <= 253 and all(map(DNS.fullmatch, claim.split(".")))):
            yield _at("volumes", claim, "is not the name of a claim", "Write CLAIM: PATH")
    used = [*places.values(), "/tmp", "/dev/shm"]
    for path in {p for p in used if used.count(p) > 1}:
        yield _at("volumes", path, "is where two volumes are mounted", "Choose another path")


def _environment(options: Options) -> Iterator[ConfigError]:
    for name in options.env:
        if not VARIABLE.fullmatch(name):
            yield _at("env", name, "must be the name of an environment variable", "Write letters, digits and _")
        elif name in OURS or name.startswith("PET_"):
            yield _at(f"env.{name}", options.env[name], "is set by the launcher", "Leave it out; see nodes and gpus")
        elif SECRET.search(name) or VALUE.search(str(options.env[name])):
            rule = "looks like a secret, and a manifest can be read by all who may list jobs"
            remedy = f"kubectl create secret generic NAME --from-literal={name}=…, and {PATH}.secrets=[NAME]"
            yield _at(f"env.{name}", "…", rule, remedy)
    for key in ("secrets", "pull_secrets"):
        for i, secret in enumerate(named := getattr(options, key)):
            if secret in named[:i]:
                yield _at(key, secret, "is named twice", "Name it once")
            if not all(DNS.fullmatch(part) for part in secret.split(".")):
                rule = "is not the name of a Secret; values of secrets are never written here"
                yield _at(key, "…" if len(secret) > 40 else secret, rule, "Write names: [wandb]")


def _selection(options: Options) -> Iterator[ConfigError]:
    for key in ("node_selector", "labels", "annotations"):
        for name, value in getattr(options, key).items():
            read = name.lower() if key == "annotations" else name  # servers read them so
            if not DOMAIN.fullmatch(read) or len(name.rpartition("/")[2]) > 63:
                yield _at(f"{key}.{name}", value, "is not a valid key", "Write e.g. example.com/name")
            elif key == "labels" and OWN_LABEL.match(name):
                yield _at(f"{key}.{name}", value, "is set by the launcher", "Leave it out; see queue")
            elif key != "annotations" and not (len(str(value)) <= 63 and LABEL.fullmatch(str(value))):
                yield _at(f"{key}.{name}", value, "cannot be the value of a label", "kubectl get nodes --show-labels")
    if sum(len(f"{key}{value}".encode()) for key, value in options.annotations.items()) > ANNOTATIONS:
        yield _at("annotations", "…", f"hold more than {ANNOTATIONS:,} bytes", "Put it on the volume")
    for i, toleration in enumerate(options.tolerations):
        try:
            read_settings(Toleration, toleration, f"{PATH}.tolerations[{i}]")
        except ConfigError as error:
            yield error
    if options.topology and not DOMAIN.fullmatch(options.topology):
        yield _at("topology", options.topology, "is not a node label", "Write e.g. topology.kubernetes.io/zone")


@dataclass(frozen=True)
class Toleration:
    """A toleration of a taint, with the names of Kubernetes."""

    key: str = ""
    operator: Literal["Exists", "Equal", "Lt", "Gt"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815

    def __post_init__(self) -> None:
        if self.operator != "Exists" and not self.key:
            raise BlockError("key", None, f"is required with operator {self.operator}", "Write it")
        if self.operator == "Exists" and self.value:
            raise BlockError("value", self.value, "must be empty when operator is Exists", "Leave it out")


def check_names(options: Options, names: Iterable[str]) -> None:
    """Refuse names of jobs that make host names of pods too long: such pods never start.

    Raises:
        ConfigError
    """
    last = options.nodes - 1
    tail = f"-{last}" if options.made_as == "job" else f"-node-0-{last}{SUFFIX}"
    for name in names:
        if len(longest := f"{name}{tail}") > LONGEST:
            rule = f"makes names of pods of {len(longest)} letters ({longest}), and {LONGEST} are allowed"
            raise ConfigError("metadata.name", name, rule, "Shorten task_name")


def check_overrides(overrides: Sequence[str], read: Mapping[str, str]) -> None:
    """Refuse secrets by value in what manifests show.

    Args:
        overrides: of a job
        read: values that the launcher's options take from the environment

    Raises:
        ConfigError
    """
    remedy = f"Put it into a Secret, name that in {PATH}.secrets, and write ${{oc.env:NAME}} in single quotes"
    rule = "is a secret, and a manifest can be read by all who may list jobs"
    for key, _, value in (override.partition("=") for override in overrides):
        named = SECRET_KEY.search(key) and value not in ("", "null") and not value.startswith("$")
        if named or VALUE.search(value):
            raise ConfigError(key, "…", rule, remedy)
    for name in read.values():
        raise ConfigError(f"{PATH}.env", name, "would be written by value into a manifest", remedy)


def check_pruning(callbacks: Mapping[str, Any]) -> None:
    """Refuse pruning: a trial in a pod cannot report to its study, which is a file beside the launcher.

    Raises:
        ConfigError
    """
    if callbacks.get("pruning"):
        rule = "needs the study of the search, which pods do not see"
        raise ConfigError("callbacks.pruning", "…", rule, "Write hparams_search=optuna, or prune on one machine")


def check_world(options: Options, trainer: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[str]:
    """Refuse nodes and GPUs that are not the trainer's world.

    Args:
        options: as checked by ``check_options``
        trainer: as composed, plain
        overrides: of the job, for the message

    Returns:
        overrides that make the trainer use them

    Raises:
        ConfigError: other devices than GPUs, other machines than nodes, or a strategy that these do not fill
    """
    from blockwright.training.parallel.sizes import STRATEGY, sizes_of

    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    if nodes not in (1, options.nodes):
        rule = f"is not the number of pods of a job ({PATH}.nodes={options.nodes})"
        raise ConfigError("trainer.num_nodes", nodes, rule, "Leave it out: the launcher sets it")
    on_gpu = trainer.get("accelerator") in ("gpu", "cuda")
    if on_gpu and not options.gpus:
        rule = f"but a pod has none ({PATH}.gpus=0)"
        raise ConfigError("trainer.accelerator", trainer["accelerator"], f"wants GPUs, {rule}", f"Write {PATH}.gpus=8")
    if options.gpus and trainer.get("accelerator") == "cpu":
        rule = "would stand idle: trainer.accelerator=cpu"
        raise _at("gpus", options.gpus, rule, "Write trainer=gpu, ddp or fsdp, or leave gpus out")
    count = len(devices) if isinstance(devices, list) else devices
    if count in ("auto", -1, "-1"):
        count = options.gpus or 1
    if options.gpus and count != options.gpus:
        rule = f"is not the number of GPUs of a pod ({PATH}.gpus={options.gpus})"
        raise ConfigError("trainer.devices", devices, rule, f"Write trainer.devices={options.gpus} or auto")
    strategy = trainer.get("strategy")
    if isinstance(strategy, Mapping) and strategy.get("_target_") == STRATEGY and isinstance(count, int):
        sizes_of(strategy, count * options.nodes)
    return [f"++trainer.num_nodes={options.nodes}"] if options.nodes > 1 else []

"""Check and call ``_target_`` nodes (trainer, callbacks, loggers, data, optimizers); write them as ``class_path``.

Models are not built here: see registry/build.py. A ``_target_`` calls whatever it names, so use it in your own
configuration only; these checks catch mistyped keys, not attacks.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from blockwright.registry import ConfigError, did_you_mean, refuse_targets
from blockwright.registry.index import find_readable
from blockwright.registry.ranges import numbers
from blockwright.registry.schema import conforms, fault, in_words, names_place

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard"}  # package → extra
PART = "Leave out what changes it; blockwright train --help lists the options of each group"


def check_target(node: Any, path: str, skip: tuple[str, ...] = ()) -> None:
    """Refuse unknown and missing arguments and wrong types in a ``_target_`` node and nested ones.

    Args:
        node: plain types
        path: of the node
        skip: keys whose values are checked elsewhere

    Raises:
        ConfigError
    """
    if isinstance(node, list):
        for i, inner in enumerate(node):
            check_target(inner, f"{path}.{i}")
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        _check_arguments(node, path, skip)
    for key, inner in node.items():
        if key not in skip:
            check_target(inner, f"{path}.{key}")


def _check_arguments(node: Mapping[str, Any], path: str, skip: tuple[str, ...]) -> None:
    target = find_target(node["_target_"], path)
    parameters, hints = signature(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in HYDRA_KEYS or key in skip:
            continue
        if key not in parameters and not open_ended:
            rule = f"{node['_target_']} has no argument {key!r}"
            raise ConfigError(f"{path}.{key}", value, rule, did_you_mean(key, parameters, "It takes no arguments"))
        if value == "???":
            raise ConfigError(f"{path}.{key}", "???", "is required", f"Give a value: {path}.{key}=…")
        checked = key in hints and not isinstance(value, Mapping)
        if checked and isinstance(value, list):
            checked = any(more for _, more in numbers(hints[key]))
        if checked and not conforms(value, hints[key]):
            example = getattr(parameters.get(key), "default", None)
            is_number = isinstance(example, int | float) and not isinstance(example, bool)
            shown = example if is_number else f"<{in_words(hints[key])}>"
            raise ConfigError(f"{path}.{key}", value, fault(value, hints[key]), f"Write {path}.{key}={shown}")
    if not node.get("_partial_"):
        for key, p in parameters.items():
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and key not in node:
                raise ConfigError(f"{path}.{key}", None, "is required", f"Give a value: +{path}.{key}=…")


def signature(target: Any) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters and annotations by name; a constructor that takes ``*args, **settings`` has its base class's too.

    One that takes only ``**kwargs`` passes them elsewhere, like Lightning's TensorBoardLogger.
    """
    classes = target.__mro__[:-1] if inspect.isclass(target) else ()
    constructors = [vars(c)["__init__"] for c in classes if "__init__" in vars(c)]
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for function in constructors or [target]:
        own = {k: p for k, p in inspect.signature(function).parameters.items() if k != "self"}
        handed_on = {k for k, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        parameters = {**own, **{k: p for k, p in parameters.items() if k not in handed_on}}
        with contextlib.suppress(Exception):  # annotations that only resolve in their module
            hints = {**typing.get_type_hints(function, include_extras=True), **hints}
        kinds = {p.kind for p in own.values()}
        if not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
            break
    return parameters, hints


def find_target(dotted: Any, path: str) -> Any:
    """The class or function of a dotted path.

    Raises:
        ConfigError: none is given, there is none, or its package is not installed (naming the extra)
    """
    from hydra.utils import get_object

    if not isinstance(dotted, str):
        raise ConfigError(f"{path}._target_", dotted, "must be the dotted path of a class", PART)
    if dotted == "???":
        remedy = f"Give one on the command line: {path}._target_=MODULE.CLASS"
        raise ConfigError(f"{path}._target_", dotted, "a value is required", remedy)
    try:
        with _unlogged("hydra.utils"):
            return get_object(dotted)
    except Exception as error:  # Hydra wraps any exception of an import
        rule = f"cannot be imported ({' '.join(str(error).split())})"
        raise ConfigError(f"{path}._target_", dotted, rule, "Check the spelling and what is installed") from None


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Log nothing under a name: Hydra logs each error that it raises, and the user would read it twice."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def instantiate(node: Any, path: str) -> Any:
    """Call a checked ``_target_`` node; errors of its constructor become a ConfigError with the path."""
    import hydra.utils
    from hydra.errors import InstantiationException

    if "_target_" not in node:
        raise ConfigError(f"{path}._target_", None, "is required: the class that is built", PART)
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ConfigError):
            raise cause from None
        raise _refusal(cause, node, path) from error
    except ConfigError:
        raise


def build_part(node: Any, contract: type, path: str, remedy: str) -> Any:
    """Build a ``_target_`` node whose class must derive from a contract; no other class is called.

    Args:
        node: plain values
        contract: the base class of what is built
        path: of the node
        remedy: what to write where it names no such class

    Raises:
        ConfigError: it names another class, or has arguments that the class does not take
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(path, node, f"a node with _target_ is needed, the class of a {contract.__name__}", remedy)
    try:
        cls = find_target(node["_target_"], path)
    except ConfigError as error:
        raise ConfigError(error.path, error.value, error.rule, f"{error.remedy}. {remedy}") from None
    if not (isinstance(cls, type) and issubclass(cls, contract)):
        rule = f"the class is not a {contract.__name__}"
        raise ConfigError(f"{path}._target_", node["_target_"], rule, remedy)
    check_target(node, path)
    return instantiate(node, path)


def build_readable(node: Any, contract: type, path: str, remedy: str, files: bool = False) -> Any:
    """Build the node of an untrusted file, whose class is declared ``readable`` and takes plain values.

    Args:
        node: plain values, without interpolations
        contract: the base class of what is built
        path: of the node
        remedy: what to do where it may not be built
        files: whether it may name files: for what is measured, and never shown, alone

    Raises:
        ConfigError: it names another class, a file that it may not name, or has arguments that the class does not take
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    cls = find_readable(target, contract)
    if cls is None:
        rule = f"names no {contract.__name__} that a run's folder may have built"
        raise ConfigError(f"{path}._target_", target, rule, remedy)
    given = {key: value for key, value in node.items() if key != "_target_"}
    refuse_targets(given, path)
    check_target(node, path)
    hints = {} if files else signature(cls)[1]
    for key, value in given.items():
        if names_place(hints.get(key)):
            raise ConfigError(f"{path}.{key}", value, "is a path, and a folder that is read names no file", remedy)
    try:
        return cls(**given)
    except ConfigError:
        raise
    except Exception as error:  # of any class: the values are from an untrusted file
        raise ConfigError(path, target, f"was refused ({type(error).__name__}: {error})", remedy) from None


def _refusal(cause: BaseException, node: Mapping[str, Any], path: str) -> ConfigError:
    reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    if isinstance(cause, ImportError):
        extra = next((f"blockwright[{x}]" for name, x in EXTRAS.items() if name in str(cause)), None)
        remedy = f"pip install '{extra}'" if extra else "Install the missing package"
        return ConfigError(path, node.get("_target_"), f"needs a package that is not installed ({reason})", remedy)
    return ConfigError(path, node.get("_target_"), f"was refused ({reason})", f"Check the values under {path}")


HYDRA_ONLY = ("_target_", "_convert_", "_recursive_")


def to_class_paths(node: Any) -> Any:
    """Plain values with ``class_path`` and ``init_args`` in place of ``_target_``, at every depth."""
    if isinstance(node, list):
        return [to_class_paths(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    inner = {key: to_class_paths(below) for key, below in node.items() if key not in HYDRA_ONLY}
    return {"class_path": node["_target_"], "init_args": inner} if "_target_" in node else inner


def to_targets(node: Any) -> Any:
    """Plain values with ``_target_`` in place of ``class_path`` and ``init_args``, at every depth.

    Keys beside these two are arguments too, so that none is dropped unseen.
    """
    if isinstance(node, list | tuple):
        return [to_targets(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    inner = {key: to_targets(below) for key, below in node.items()}
    if "class_path" not in inner:
        return inner
    target, arguments = inner.pop("class_path"), inner.pop("init_args", None) or {}
    return {"_target_": target, **arguments, **inner}

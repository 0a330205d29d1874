"""How an implementation of a kernel is added, by this project and by any other package::

    @kernel("attention", "fa4", devices=("cuda",), capability=(9, 0), needs="flash_attn", takes=is_plain)
    def attend(q, k, v, scoring): ...

A package names the module with it as an entry point of the group ``blockwright.kernels``. At each call the
implementations of a kernel are asked in order; the first that runs on the device and ``takes`` the arguments computes.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import torch

from blockwright.registry import RegistrationError, did_you_mean

ENTRY_POINTS = "blockwright.kernels"
OWN = [
    "attention",
    "coded_attention",
    "cross_entropy",
    "elementwise",
    "grouped_matmul",
    "by_name",
    "flex",
    "products",
    "recurrence",
]
KERNELS = (
    "attention",
    "latent_attention",
    "coded_attention",
    "recurrence",
    "encoder_attention",
    "experts",
    "cross_entropy",
    "rms_norm",
    "gated_silu",
    "rotation",
)
AUTOMATIC = ("coding", "linear", "recurrence_each")  # of which no configuration names an implementation
EVERY = (*KERNELS, *AUTOMATIC)

F = TypeVar("F", bound=Callable[..., Any])
Unsound = Callable[[tuple[int, int]], str | None]  # compute capability of a GPU → why not there
_known: dict[str, dict[str, Implementation]] = {kernel: {} for kernel in EVERY}


@dataclass(frozen=True)
class Implementation:
    """One implementation of a kernel; the arguments of ``kernel``, and ``call``."""

    name: str
    call: Callable[..., Any]
    devices: tuple[str, ...]
    capability: tuple[int, int] | None
    needs: str | None
    takes: Callable[..., bool] | None
    automatic: tuple[str, ...] | bool
    order: int
    unsound: Unsound | None = None

    @property
    def fault_here(self) -> str | None:
        """Why it must not be used on the GPU of this machine; None if it may, or there is none."""
        if self.unsound is None or not torch.cuda.is_available():
            return None
        return self.unsound(torch.cuda.get_device_capability())

    @property
    def is_installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def runs_on(self, device_type: str, capability: tuple[int, int]) -> bool:
        fits = not self.devices or device_type in self.devices
        able = self.capability is None or device_type != "cuda" or capability >= self.capability
        return fits and able and self.is_installed

    def is_automatic(self, device_type: str) -> bool:
        return self.automatic if isinstance(self.automatic, bool) else device_type in self.automatic


def kernel(
    kernel: str,
    name: str,
    *,
    devices: Sequence[str] = (),
    capability: tuple[int, int] | None = None,
    needs: str | None = None,
    takes: Callable[..., bool] | None = None,
    automatic: Sequence[str] | bool = True,
    order: int = 0,
    unsound: Unsound | None = None,
) -> Callable[[F], F]:
    """Add the decorated function as an implementation; it computes what the kernel's method of ``Kernels`` says.

    Args:
        kernel: one of ``EVERY``
        name: what ``task.kernels.KERNEL=`` takes
        devices: types of device that it runs on; none given: all
        capability: the least compute capability, of a GPU
        needs: package that has to be installed
        takes: whether it can compute a call, given all its arguments; None: any
        automatic: whether it is chosen without being named: everywhere, or on these types of device
        order: the lower, the earlier it is asked; this project's own begin at 10
        unsound: why it must not be used with the packages that are installed, on a GPU of some compute capability; None
            if it may. A configuration that names it is then refused

    Raises:
        RegistrationError: there is no such kernel, or another function has the name
    """

    def put(call: F) -> F:
        if kernel not in _known:
            raise RegistrationError(f"there is no kernel {kernel!r}. {did_you_mean(kernel, EVERY)}")
        old = _known[kernel].get(name)
        if old is not None and (old.call.__module__, old.call.__name__) != (call.__module__, call.__name__):
            raise RegistrationError(f"{kernel} {name!r} is already implemented by {old.call.__module__}")
        by_itself = automatic if isinstance(automatic, bool) else tuple(automatic)
        made = (tuple(devices), capability, needs, takes, by_itself, order, unsound)
        _known[kernel][name] = Implementation(name, call, *made)
        chain.cache_clear()
        return call

    return put


def as_written(*given: Any) -> bool:
    """Whether no compiler is at work, which writes better itself what is fused by hand here."""
    return not torch.compiler.is_compiling()


def implementations(kernel: str) -> dict[str, Implementation]:
    """Name → implementation of a kernel, in the order that they are asked."""
    _load()
    return dict(sorted(_known[kernel].items(), key=lambda item: item[1].order))


@cache
def chain(kernel: str, name: str | None, device_type: str, capability: tuple[int, int]) -> tuple[Implementation, ...]:
    """What is asked on a device, in order: the named one, if it runs there, then those that are chosen by themselves.

    It ends with the first that takes any call.
    """
    here = [i for i in implementations(kernel).values() if i.runs_on(device_type, capability)]
    wanted = [i for i in here if i.name == name] + [i for i in here if i.is_automatic(device_type) and i.name != name]
    end = next((n for n, i in enumerate(wanted, start=1) if i.takes is None), len(wanted))
    return tuple(wanted[:end])


def first_to_take(asked: Sequence[Implementation], *given: Any) -> Implementation:
    """The first implementation that takes these arguments."""
    for implementation in asked:
        if implementation.takes is None or implementation.takes(*given):
            return implementation
    raise AssertionError("no implementation takes these arguments")  # this project's own end each chain


def compute(kernel: str, *given: Any) -> Any:
    """A kernel where no ``Kernels`` is at hand: by the automatic choice for the device of the first argument."""
    device = given[0].device
    return first_to_take(chain(kernel, None, device.type, capability_of(device)), *given).call(*given)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Of a GPU that is here; (0, 0) of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else (0, 0)


@cache
def _load() -> None:
    """Import this project's own, then those of installed packages. One that fails warns and stops nothing."""
    for module in OWN:
        importlib.import_module(f"blockwright.blocks.kernels.{module}")
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        try:
            point.load()
        except Exception as error:  # another package's import may fail in any way
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"kernel plug-in {point.name!r} did not load: {reason}", stacklevel=2)

"""The list of checks, and one case per block and check, for pytest and the command line."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import traceback
import unittest
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

from blockwright import registry
from blockwright.blocks.base import Block
from blockwright.blocks.conformance import behaviour, conditions, construction, hyperparameters, of_kinds, rows
from blockwright.blocks.conformance.hyperparameters import switched_on
from blockwright.blocks.conformance.setting import ExemptError, PromiseError, Setting
from blockwright.blocks.norm import Norm
from blockwright.registry import ConfigError, did_you_mean

CHECKS: dict[str, Callable[[Setting], None]] = {
    "shape and dtype": behaviour.shape_and_dtype,
    "causality": behaviour.causality,
    "batch invariance": behaviour.batch_invariance,
    "padding invariance": behaviour.padding_invariance,
    "packing": behaviour.packing,
    "memory": construction.remembers_what_it_says,
    "stepping": behaviour.stepping,
    "ragged rows": behaviour.ragged_rows,
    "quantised caches": behaviour.quantised_caches,
    "joining rows": rows.joining_rows,
    "drafts": rows.drafts,
    "nothing written": behaviour.writes_nothing,
    "gradients": behaviour.gradients,
    "precision": behaviour.precision,
    "default dtype": conditions.independent_of_default_dtype,
    "score rows": behaviour.score_rows,
    "hyper-parameters": hyperparameters.every_hyperparameter,
    "null children": hyperparameters.null_children,
    "state dict": construction.state_dict_round_trip,
    "meta build": construction.meta_build,
    "determinism": construction.determinism,
    "allocation": construction.allocation,
    "flops": construction.flops,
    "compile": construction.compiling,
    "parallel plan": construction.parallel_plan,
    "weight kinds": construction.weight_kinds,
    "width rules": conditions.width_rules,
    "routing": of_kinds.routing_contract,
    "balance": of_kinds.balance_gradients,
    "padding": of_kinds.padding,
}
# Blocks with ``causal = False`` may break these; they are run all the same.
OF_CAUSAL_BLOCKS = ("causality", "stepping", "ragged rows", "packing", "batch invariance", "padding invariance")
OF_TOKENS = (
    *OF_CAUSAL_BLOCKS,
    "quantised caches",
    "joining rows",
    "drafts",
    "memory",
    "score rows",
    "routing",
    "balance",
    "padding",
)


@dataclass(frozen=True)
class Outcome:
    """Result of a check.

    Args:
        status: passed, failed or not applicable
        reason: why it did not pass
    """

    status: Literal["passed", "failed", "not applicable"]
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One check of one registered block."""

    kind: str
    name: str
    check: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}: {self.check}"

    @property
    def promise(self) -> str:
        """What the check requires of a block."""
        return " ".join((inspect.getdoc(CHECKS[self.check]) or "").split())

    def run(self) -> None:
        """Run the check.

        Raises:
            PromiseError: an AssertionError whose message says what was seen
            unittest.SkipTest: it does not apply
        """
        outcome = self.outcome()
        if outcome.status == "failed":
            raise PromiseError(f"{self}: {outcome.reason}. The promise: {self.promise}")
        if outcome.status == "not applicable":
            raise unittest.SkipTest(outcome.reason)

    def brief(self) -> Outcome:
        """Run the check briefly: at a few places and lengths, on the block with its options enabled for every second
        check and with its defaults for the others. All checks of a block together compute both.

        Any exception in the block is a failure.
        """
        tested = (registry.lookup(self.kind, self.name).cls,)
        return self._outcome(_in_brief(tested, self.kind, self.name, bool(list(CHECKS).index(self.check) % 2)))

    def outcome(self) -> Outcome:
        """Run the check on the block with its defaults and with its options enabled.

        Any exception in the block is a failure.
        """
        usual = Setting(self.kind, self.name)
        outcome = self._outcome(usual)
        if outcome.status == "failed" or self.check == "hyper-parameters":  # which varies the values itself
            return outcome
        more = _switched_on((usual.entry.cls,), self.kind, self.name)
        if more is None:
            return outcome
        other = self._outcome(Setting(self.kind, self.name, more))
        if other.status != "failed":
            return outcome if outcome.status == "passed" else other
        changed = ", ".join(f"{k}={v}" for k, v in more.items() if usual.node().get(k) != v)
        return Outcome("failed", f"{other.reason} (with {changed})")

    def _outcome(self, setting: Setting) -> Outcome:
        try:
            if self.check in OF_TOKENS and setting.of_input:
                return Outcome("not applicable", "it works on content beside text, not on tokens")
            CHECKS[self.check](setting)
        except ExemptError as exempt:
            return Outcome("not applicable", str(exempt))
        except PromiseError as broken:
            if self.check in OF_CAUSAL_BLOCKS and not setting.causal:
                return Outcome("not applicable", "not causal by design")
            return Outcome("failed", str(broken))
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{_at(error)}")
        return Outcome("passed")


def _at(error: Exception) -> str:
    """In which block an error arose, and inside of which: a child knows neither its name nor its owner."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    blocks = list({id(b): b for b in frames if isinstance(b, Block)}.values())
    if len(blocks) < 2:
        return ""
    owner, inner = blocks[-2:]
    name = next((n for n, child in owner.named_children() if child is inner), None)
    hint = ": the width of a norm is the dim that child_context gives it" if isinstance(inner, Norm) else ""
    return "" if name is None else f" (in {name} of {type(owner).__name__}{hint})"


@functools.lru_cache(maxsize=8)
def _switched_on(tested: Hashable, kind: str, name: str) -> dict[str, Any] | None:
    """The node with every option of the block enabled; None if it has none."""
    node = switched_on(Setting(kind, name))
    return None if node == Setting(kind, name).node() else node


@functools.lru_cache(maxsize=4)
def _in_brief(tested: Hashable, kind: str, name: str, more: bool) -> Setting:
    """One for all checks of a block, with or without its options enabled."""
    node = _switched_on(tested, kind, name) if more else None
    return _in_brief(tested, kind, name, False) if more and node is None else Setting(kind, name, node, brief=True)


def cases(pattern: str = "*") -> list[Case]:
    """The cases of the blocks that match ``KIND`` or ``KIND/NAME``, with shell wildcards.

    In a test file of a plug-in::

        @pytest.mark.parametrize("case", cases("attention/decay"), ids=str)
        def test_conformance(case):
            case.run()

    Raises:
        ConfigError: there is no such kind or block
    """
    return [Case(kind, name, check) for kind, name in chosen(pattern) for check in CHECKS]


def chosen(pattern: str) -> list[tuple[str, str]]:
    """Kind and name of each block that matches a pattern.

    Raises:
        ConfigError: there is no such kind or block
    """
    kind, _, name = pattern.strip("/").partition("/")
    kinds = fnmatch.filter(registry.kinds(), kind)
    if not kinds:
        raise ConfigError("kind", kind, "there is no such kind of block", did_you_mean(kind, registry.kinds()))
    found = [(k, n) for k in kinds for n in registry.names(k, name or "*")]
    if not found:
        known = did_you_mean(name, [n for k in kinds for n in registry.names(k)])
        raise ConfigError(kind, name, f"no {kind} is registered under this name", known)
    return found

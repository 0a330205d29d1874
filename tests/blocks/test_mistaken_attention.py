"""Ways to write an attention of scores wrongly: each gets one message that names the mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.blocks.attention.remembered import Held
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.conformance.cases import CHECKS, Case
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.selector.base import Selector
from blockwright.registry import register


class Written(Scored):
    """One head of keys and values for four of queries, written rightly."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model)
        self.position, self.scale = position, 12**-0.5
        self.query, self.output = nn.Linear(d_model, 48, bias=False), nn.Linear(48, d_model, bias=False)
        self.both = nn.Linear(d_model, 24, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().child_context(child, {**known, "n_heads": 4}), "head_dim": 12}

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        k, v = self.both(x).unflatten(-1, (2, 1, 12)).unbind(2)
        q, k = given.rotated(self.position, self.query(x).unflatten(-1, (4, 12)), k)
        return q, {"k": k, "v": v}

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return self.output(self.attend(x, given, *self.given_to_attend(x, given)).flatten(-2))

    def parallel_plan(self) -> Any:
        return dict.fromkeys((name for name, _ in self.named_parameters()), "replicate")


class AttendsTwice(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x, given) + super().mix(x, given)


class AttendsNever(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q, held = self.given_to_attend(x, given)
        return self.output((q * held["v"]).flatten(-2))


class DeclaresOtherShapes(Written):
    def memory(self) -> Any:
        return {"k": [(1, 12)], "v": [(1, 24)]}


class DeclaresOtherNames(Written):
    def memory(self) -> Any:
        return {"keys": [(1, 12)], "values": [(1, 12)]}


class ReadsValues(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x if float((0 * x).sum()) == 0 else -x, given)


class SetsNoScale(Written):
    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position)
        del self.scale


class SetsNoPosition(Written):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, None)  # type: ignore[arg-type]
        del self.position

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        k, v = self.both(x).unflatten(-1, (2, 1, 12)).unbind(2)
        return self.query(x).unflatten(-1, (4, 12)), {"k": k, "v": v}


class PutsHeadsBeforeTokens(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q.transpose(1, 2), held


class LeavesHeadsFlat(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q.flatten(2), held


class RemembersATuple(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q, (held["k"], held["v"])


class RemembersNoTensor(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q, {**held, "decay": 0.5}


class RemembersOneToken(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q, {"k": held["k"][:, :1], "v": held["v"]}


class HasWiderQueries(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q, {"k": held["k"][..., :8], "v": held["v"]}


class HasHeadsThatDoNotDivide(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, held = super().given_to_attend(x, given)
        return q, {name: t.expand(-1, -1, 3, -1) for name, t in held.items()}


class ExpandsKeysAlone(Written):
    def expand(self, held: Sequence[Tensor]) -> Any:
        return held[0]


class ExpandsToOtherHeads(Written):
    def expand(self, held: Sequence[Tensor]) -> Any:
        return held[0], held[1].repeat_interleave(2, 2)


class ForgetsTheProjection(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return self.attend(x, given, *self.given_to_attend(x, given))


class ForgetsTheWidthOfANorm(Written):
    def __init__(self, d_model: int, position: Position, head_norm: Norm) -> None:
        super().__init__(d_model, position)
        self.head_norm = head_norm

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        y = self.attend(x, given, *self.given_to_attend(x, given))
        return self.output(self.head_norm(y).flatten(-2))


class ChangesItsInput(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        y = super().mix(x, given)
        x += 1
        return y


class KeepsItsKeys(Written):
    def attend(self, x: Tensor, given: Pass, q: Tensor, held: Held, latent: Any = None, beside: Any = None) -> Tensor:
        self.last = held["k"]
        return super().attend(x, given, q, held)


class LooksAhead(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x + x.mean(1, keepdim=True), given)


class MixesRows(Written):
    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x - 0.5 * x.mean(0), given)


class PlacesTooLittle(Written):
    def parallel_plan(self) -> Any:
        return {"query.weight": "column", "output.weight": "row"}


class PartsHeadsThatBelongTogether(Written):
    """The last head of queries uses the first of values, which another rank has."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position)
        del self.both
        self.key, self.value = (nn.Linear(d_model, 48, bias=False) for _ in range(2))

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, k, v = (W(x).unflatten(-1, (-1, 12)) for W in (self.query, self.key, self.value))
        q, k = given.rotated(self.position, q, k)
        return q, {"k": k, "v": v.flip(2)}

    def parallel_plan(self) -> Any:
        return {**dict.fromkeys(("query.weight", "key.weight", "value.weight"), "column"), "output.weight": "row"}


class IgnoresItsSelector(Written):
    def __init__(self, d_model: int, position: Position, selector: Selector | None = None) -> None:
        super().__init__(d_model, position)
        self.chooses = selector


class CountsPositionsItself(Written):
    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        return super().given_to_attend(x, given._replace(positions=torch.arange(x.shape[1], device=x.device)[None]))


# The first check that fails, and what it says.
TOLD: dict[type[Written], tuple[str, str]] = {
    AttendsTwice: ("memory", "AttendsTwice.mix calls attend 2 times; it must once"),
    AttendsNever: ("memory", "AttendsNever.mix calls attend 0 times; it must once"),
    DeclaresOtherShapes: ("memory", "memory() says {'k': [(1, 12)], 'v': [(1, 24)]}, and mix remembers {'k':"),
    DeclaresOtherNames: ("memory", "memory() says {'keys': [(1, 12)], 'values': [(1, 12)]}, and mix remembers {'k':"),
    ReadsValues: ("memory", "ReadsValues.mix fails on a token without values, by which its memory is found"),
    SetsNoScale: ("shape and dtype", "SetsNoScale sets no self.scale, which multiplies q·k: set it in __init__"),
    SetsNoPosition: ("shape and dtype", "SetsNoPosition sets no self.position, the child that biases scores"),
    PutsHeadsBeforeTokens: ("shape and dtype", "gives attend queries of shape [2, 4, 7, 12]"),
    LeavesHeadsFlat: ("shape and dtype", "they are [B,T,N,H], W(x).unflatten(-1, (-1, H))"),
    RemembersATuple: ("shape and dtype", 'it is a dict, name → tensor [B,T,…], as {"k": k, "v": v}'),
    RemembersNoTensor: ("shape and dtype", "gives attend float to be remembered"),
    RemembersOneToken: ("shape and dtype", "one entry for each token of x"),
    HasWiderQueries: ("shape and dtype", "has queries of width 12 and keys of width 8"),
    HasHeadsThatDoNotDivide: ("shape and dtype", "has 4 heads of queries and 3 of keys: the second divides the first"),
    ExpandsKeysAlone: ("shape and dtype", "ExpandsKeysAlone.expand gives Tensor: it returns keys and values"),
    ExpandsToOtherHeads: ("shape and dtype", "with as many heads of both"),
    ForgetsTheProjection: ("shape and dtype", "attend gives [B,T,N,V], for W_o(y.flatten(-2))"),
    ForgetsTheWidthOfANorm: ("shape and dtype", "Return it from child_context for this child: {'dim': …}"),
    ChangesItsInput: ("nothing written", "it changes in place what it is given"),
    KeepsItsKeys: ("nothing written", "a call leaves a tensor in self.last"),
    LooksAhead: ("causality", "tokens before a change"),
    MixesRows: ("batch invariance", "by itself"),
    PlacesTooLittle: ("parallel plan", "it does not place both.weight"),
    PartsHeadsThatBelongTogether: ("parallel plan", "the sum of what two ranks compute"),
    IgnoresItsSelector: ("memory", "the child chooses is built, and not attended with: set self.selector to it"),
    CountsPositionsItself: ("stepping", "chunks of"),
}


SHORT = [c for c in CHECKS if c not in ("hyper-parameters", "width rules", "joining rows", "flops", "compile")]


@pytest.mark.usefixtures("temporary_blocks")
@pytest.mark.parametrize(
    "cls", [pytest.param(cls, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, cls in enumerate(TOLD)]
)
def test_mistake_is_named(cls: type[Written]) -> None:
    register("attention", "written")(cls)
    check, said = TOLD[cls]
    first = next(c for c in SHORT if c == check or Case("attention", "written", c).brief().status == "failed")
    outcome = Case("attention", "written", check).outcome()
    assert (first, outcome.status) == (check, "failed"), Case("attention", "written", first).brief()
    assert said in outcome.reason, outcome.reason


@pytest.mark.usefixtures("temporary_blocks")
def test_block_without_a_mistake_passes() -> None:
    register("attention", "written")(Written)
    failed = {check: Case("attention", "written", check).brief() for check in SHORT}
    assert not {check: o.reason for check, o in failed.items() if o.status == "failed"}

"""The conformance kit: every registered block passes it, and for each check some block fails it and nothing else."""

from __future__ import annotations

import inspect
import random
import unittest
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.attention.score_rows import ScoreRows
from blockwright.blocks.attention.sliding_window import SlidingWindow
from blockwright.blocks.balance.expert import ExpertBalance
from blockwright.blocks.cache.base import Cache, Mark
from blockwright.blocks.cache.ring import Ring
from blockwright.blocks.conformance import PromiseError, cases
from blockwright.blocks.conformance.__main__ import main
from blockwright.blocks.conformance.cases import CHECKS, chosen
from blockwright.blocks.conformance.default_dtype import _step
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.ffn.base import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.gating.softmax_topk import SoftmaxTopK
from blockwright.blocks.norm.base import Norm
from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.blocks.position.base import Position
from blockwright.registry import ConfigError, register
from blockwright.registry.command import run_command
from tests.slow_tier import changed_files

ROOT = Path(__file__).resolve().parent.parent.parent


# A quick run takes every check of every block in brief; the longest, most of the kit's time, of these blocks alone. The
# slow tests take all of both, as `blockwright check` does.
LONG = {"hyper-parameters", "width rules", "joining rows", "flops", "compile"}
CHECKED_AT_LENGTH: dict[str, set[str]] = {
    "norm/rmsnorm": LONG,
    "attention/gqa": {"joining rows", "flops"},
    "ffn/moe": {"width rules", "hyper-parameters"},
}
BLOCKS = [f"{kind}/{name}" for kind, name in chosen("*")]
BLOCKS_OF_NORM = [f"{kind}/{name}" for kind, name in chosen("norm")]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_keeps_its_promises_in_brief(block: str) -> None:
    """One test a block: its checks share its decoder."""
    left_out = LONG - CHECKED_AT_LENGTH.get(block, set())
    outcomes = {c.check: c.brief() for c in cases(block) if c.check not in left_out}
    assert not {check: o.reason for check, o in outcomes.items() if o.status == "failed"}


@pytest.fixture(scope="module")
def changed() -> set[str] | None:
    return changed_files()


def has_changed(block: str, files: set[str] | None) -> bool:
    """Whether its source, or that of a class that it derives from, is among the files; None: no one knows."""
    classes = registry.lookup(*block.split("/")).cls.__mro__
    own = {Path(inspect.getfile(c)).resolve() for c in classes if c.__module__.startswith("blockwright.")}
    return files is None or bool({str(file.relative_to(ROOT)) for file in own if ROOT in file.parents} & files)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_that_has_changed_keeps_every_promise(block: str, changed: set[str] | None) -> None:
    """The whole kit, since the slow tests were last green; blocks whose source is the same are passed over."""
    if has_changed(block, changed):
        outcomes = {case.check: case.outcome() for case in cases(block)}
        assert not {check: o.reason for check, o in outcomes.items() if o.status == "failed"}


def test_a_block_has_changed_where_its_source_or_that_of_a_base_has() -> None:
    assert all(has_changed(block, None) for block in BLOCKS)
    found = {block for block in BLOCKS if has_changed(block, {"blocks/attention/gqa.py", "README.md"})}
    assert "attention/gqa" in found and "ffn/swiglu" not in found
    assert {block for block in BLOCKS if has_changed(block, {"blocks/norm/base.py"})} == set(BLOCKS_OF_NORM)


# Blocks that break one promise each. Sound in all else, or they would prove nothing.


class Plain(FFN):
    """y = W x: the sound block that the broken feed-forward blocks derive from."""

    residual_outputs = ("project.weight",)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x), None

    def parallel_plan(self) -> Any:
        return {"project.weight": "replicate"}


class Averaging(Attention):
    """y_t = W mean_{visible s} x_s, without a cache: the sound block that broken attentions derive from."""

    residual_outputs = ("project.weight",)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_model, bias=False)

    def seen(self, positions: Tensor) -> Tensor:
        return positions[:, :, None] >= positions[:, None, :]

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        seen, segments = self.seen(given.positions), given.segments
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments[:, None, :])
        weights = seen.float() / seen.sum(-1, keepdim=True)
        return self.project(weights.to(x.dtype) @ x)

    def parallel_plan(self) -> Any:
        return {"project.weight": "replicate"}


class Narrow(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x)[..., :1], None  # one number a token, which broadcasts without a word


class Peeking(Averaging):
    def seen(self, positions: Tensor) -> Tensor:
        return super().seen(positions) | (positions[:, :, None] // 2 == positions[:, None, :] // 2)


class PeekingInTraining(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x.roll(-1, 1) if self.training else x), None


class Amnesia(Cache):
    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        if self.length:
            for buffer in self.buffers.values():
                buffer[:, 0] = 0
        return super().append(*new)


class Small(GQA):
    """Grouped-query attention without a choice: the sound block of the broken ones that have a cache."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position, n_heads=4, n_kv_heads=2)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return super().child_context(child, {**known, "n_heads": 4, "n_kv_heads": 2})


class Forgetful(Small):
    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        return Amnesia(
            batch,
            length,
            {"k": (self.n_kv_heads, self.head_dim)} | {"v": (self.n_kv_heads, self.head_dim)},
            dtype,
            device,
        )


class Blind(Cache):
    def padding_bias(self, n_new: int) -> Tensor | None:
        return None


class PaddingSeen(GQA):
    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        made = super().new_cache(batch, length, dtype, device)
        made.__class__ = Blind
        return made


class Misplacing(Cache):
    def _put(self, row: int, other: Cache, source: int, n: int) -> None:
        super()._put(row, other, source, max(1, n - 1))


class Lingering(Ring):
    def _restore(self, mark: Mark, kept: Sequence[int]) -> None:
        super()._restore(mark, [len(mark.after)])


class RowsMisplaced(Small):
    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        return Misplacing(batch, length, dict.fromkeys(("k", "v"), (self.n_kv_heads, self.head_dim)), dtype, device)


class DraftsLinger(SlidingWindow):
    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        cache = super().new_cache(batch, length, dtype, device, bits)
        cache.__class__ = Lingering if type(cache) is Ring else type(cache)
        return cache


class Coarse(GQA):
    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> Cache:
        return super().new_cache(batch, length, dtype, device, bits and 4)


class OneSided(Small):
    def score_rows(self) -> tuple[ScoreRows, ...]:
        return tuple(rows._replace(side="query") for rows in super().score_rows())


class Understated(Cache):
    @property
    def nbytes(self) -> int:
        return super().nbytes // 2


class Flattering(Small):
    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        return Understated(
            batch,
            length,
            {"k": (self.n_kv_heads, self.head_dim)} | {"v": (self.n_kv_heads, self.head_dim)},
            dtype,
            device,
        )


class Misremembering(Small):
    """Attends once more where what it remembers is found: by a token on the meta device."""

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        again = x.is_meta and x.shape[1] == 1
        return super().mix(x, given) + (super().mix(x, given) if again else 0)


class Unsegmented(Small):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given._replace(segments=None))


class BatchCentred(Norm):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x - 0.5 * x.mean(0), x.shape[-1:], eps=1e-6)


class LengthScaled(Averaging):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        one = torch.zeros(1, x.shape[1], device=x.device) if given.segments is None else given.segments
        length = (one[:, :, None] == one[:, None, :]).sum(-1, keepdim=True)
        return super().forward(x, given._replace(cache=None)) * length.to(x.dtype)


class Overwriting(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x if torch.is_grad_enabled() else x.add_(0)), None


class Keeping(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        self.last = x.detach()
        return self.project(x), None


class Idle(Plain):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.spare = nn.Parameter(torch.empty(3))

    def parallel_plan(self) -> Any:
        return {**super().parallel_plan(), "spare": "replicate"}


class Undeclared(Plain):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.taps = nn.Parameter(torch.empty(d_model, 1))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x) * (1 + self.taps[:, 0]), None

    def parallel_plan(self) -> Any:
        return {**super().parallel_plan(), "taps": "replicate"}


class RoundedAngles(Position):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float32) / self.head_dim
        angles = positions[..., None].to(q.dtype) * (100.0**-pairs).to(q.dtype)
        return tuple(self.kernels.rotate(t, angles.cos(), angles.sin(), False) for t in (q, k))  # type: ignore[return-value]


class Counting(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        places = torch.arange(1, x.shape[-1] + 1, device=x.device)
        share = places / x.shape[-1]  # of whole numbers, so of the default dtype
        return self.project(x * share.to(x.dtype)), None


class Epsless(Norm):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Secretive(Plain):
    def reset_parameters(self) -> None:
        self.factor = 1 + torch.rand(()).item()

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x) * getattr(self, "factor", 1.0), None


class Tabulated(Position):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, head_dim, 2) / head_dim))

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.frequencies.float()
        return tuple(self.kernels.rotate(t, angles.cos(), angles.sin(), False) for t in (q, k))  # type: ignore[return-value]


class Capricious(Plain):
    def reset_parameters(self) -> None:
        self.project.weight.mul_(1 + random.random())


class Hidden(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x if x.is_meta else self.project(x)), None


class HiddenInTraining(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(self.project(x) if torch.is_grad_enabled() and not x.is_meta else x), None


class Branching(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x / 2 if not x.is_meta and x.abs().max() > 1e6 else x), None


class Unplanned(Plain):
    def parallel_plan(self) -> Any:
        return {}


class Overplanned(Plain):
    def parallel_plan(self) -> Any:
        return {**super().parallel_plan(), "projekt.weight": "column"}


class NeverBare(Plain):
    def __init__(self, d_model: int, norm: Norm | None = None) -> None:
        super().__init__(d_model)
        self.norm = norm or RMSNorm(d_model)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]}

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return super().forward(self.norm(x))


class Doubling(SoftmaxTopK):
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        experts, weights, probs = super().choose(logits)
        return experts[:, :1].expand_as(experts), weights, probs


class PaddingCounted(SoftmaxTopK):
    def forward(self, x: Tensor, tokens: Any = None, experts: Any = None, real: Any = None) -> Routing:
        return super().forward(x, tokens, experts)


class LearnedAlpha(ExpertBalance):
    def __init__(self, n_experts: int, top_k: int, alpha: float = 0.003) -> None:
        super().__init__(n_experts, top_k, alpha)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, probs: Tensor, experts: Tensor, *others: Tensor) -> dict[str, Tensor]:
        return {k: v * self.factor[0] for k, v in super().forward(probs, experts, *others).items()}

    def parallel_plan(self) -> Any:
        return {"factor": "replicate"}


class Summing(Plain):
    """Adds w · x: a map to one number, whose weight is stored as a vector, and which the rules do not see."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.sums = nn.Parameter(torch.empty(d_model))

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x) + (x @ self.sums)[..., None] / 16, None

    def parallel_plan(self) -> Any:
        return {**super().parallel_plan(), "sums": "replicate"}


BROKEN: list[tuple[str, type, str]] = [
    ("ffn", Narrow, "shape and dtype"),
    ("attention", Peeking, "causality"),
    ("ffn", PeekingInTraining, "causality"),
    ("attention", Forgetful, "stepping"),
    ("attention", PaddingSeen, "ragged rows"),
    ("attention", Coarse, "quantised caches"),
    ("attention", RowsMisplaced, "joining rows"),
    ("attention", DraftsLinger, "drafts"),
    ("attention", Unsegmented, "packing"),
    ("norm", BatchCentred, "batch invariance"),
    ("attention", LengthScaled, "padding invariance"),
    ("ffn", Overwriting, "nothing written"),
    ("ffn", Keeping, "nothing written"),
    ("ffn", Idle, "gradients"),
    ("position", RoundedAngles, "precision"),
    ("ffn", Counting, "default dtype"),
    ("attention", OneSided, "score rows"),
    ("norm", Epsless, "hyper-parameters"),
    ("ffn", NeverBare, "null children"),
    ("ffn", Secretive, "state dict"),
    ("position", Tabulated, "meta build"),
    ("ffn", Capricious, "determinism"),
    ("attention", Flattering, "allocation"),
    ("attention", Misremembering, "memory"),
    ("ffn", Hidden, "flops"),
    ("ffn", HiddenInTraining, "flops"),
    ("ffn", Branching, "compile"),
    ("ffn", Unplanned, "parallel plan"),
    ("ffn", Overplanned, "parallel plan"),
    ("ffn", Undeclared, "weight kinds"),
    ("ffn", Summing, "width rules"),
    ("gating", Doubling, "routing"),
    ("balance", LearnedAlpha, "balance"),
    ("gating", PaddingCounted, "padding"),
]


def test_losses_of_every_layer_are_held_under_another_default_dtype() -> None:
    found = _step(Setting("balance", "expert").decoder().train())
    assert {name[-7:] for name in found if " of layer " in name} == {"layer 0", "layer 1"}


@pytest.fixture
def failed(temporary_blocks: None) -> Callable[..., dict[str, str]]:
    """Registers a class until the test ends, and tells the checks that it fails, with their reasons."""

    def run(kind: str, cls: type, name: str = "under_test", checks: Container[str] = CHECKS) -> dict[str, str]:
        register(kind, name)(cls)
        outcomes = {case.check: case.outcome() for case in cases(f"{kind}/{name}") if case.check in checks}
        return {check: o.reason for check, o in outcomes.items() if o.status == "failed"}

    return run


# A running batch needs what these checks are of.
NEEDED_BY_ROWS = ("stepping", "ragged rows")


@pytest.mark.parametrize(("kind", "cls", "check"), BROKEN, ids=[cls.__name__ for _, cls, _ in BROKEN])
def test_a_broken_promise_is_found_in_brief(temporary_blocks: None, kind: str, cls: type, check: str) -> None:
    register(kind, "under_test")(cls)
    (case,) = (case for case in cases(f"{kind}/under_test") if case.check == check)
    assert (case.outcome() if check in LONG else case.brief()).status == "failed"


def test_every_check_has_a_block_that_fails_it() -> None:
    assert {check for _, _, check in BROKEN} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cls", "check"), BROKEN, ids=[cls.__name__ for _, cls, _ in BROKEN])
def test_a_block_that_breaks_one_promise_fails_exactly_that_check(
    temporary_blocks: None, kind: str, cls: type, check: str
) -> None:
    register(kind, "under_test")(cls)
    found = {
        case.check: case.outcome() if case.check == check else case.brief()
        for case in cases(f"{kind}/under_test")
        if case.check == check or case.check not in LONG
    }
    reasons = {name: outcome.reason for name, outcome in found.items() if outcome.status == "failed"}
    of_rows = {"joining rows", "drafts"} if check in NEEDED_BY_ROWS else set[str]()
    assert set(reasons) - of_rows == {check}, reasons
    assert "Error:" not in reasons[check]  # seen by the check, not stumbled over


class PeekingByDesign(Peeking):
    causal: ClassVar[bool] = False


def test_a_block_that_says_it_is_not_causal_is_exempt_from_causality_only(temporary_blocks: None) -> None:
    register("attention", "under_test")(PeekingByDesign)
    few = ("causality", "packing", "stepping", "gradients", "shape and dtype")
    outcomes = {case.check: case.outcome() for case in cases("attention/under_test") if case.check in few}
    assert outcomes["causality"].status == "not applicable"
    assert outcomes["causality"].reason == "not causal by design"
    assert outcomes["packing"].status == "passed"
    assert not [o for o in outcomes.values() if o.status == "failed"]


class Unguessable(Plain):
    def __init__(self, d_model: int, weights: dict) -> None:
        super().__init__(d_model)
        self.factor = sum(weights.values())

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x) * self.factor, None


class Declared(Unguessable):
    conformance_settings: ClassVar[dict[str, Any]] = {"weights": {"a": 0.5}}


def test_a_required_parameter_of_an_unknown_kind_is_declared_by_the_class(
    failed: Callable[..., dict[str, str]],
) -> None:
    assert "conformance_settings" in failed("ffn", Unguessable, checks=["causality"])["causality"]
    few = ("causality", "hyper-parameters", "determinism", "state dict")
    assert failed("ffn", Declared, "under_test_too", few) == {}


class Crashing(Plain):
    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        raise RuntimeError("out of\ncheese")


def test_what_a_block_raises_is_its_failure_told_in_one_line(failed: Callable[..., dict[str, str]]) -> None:
    assert failed("ffn", Crashing, checks=["causality"])["causality"] == "RuntimeError: out of cheese"


class Free(Plain):
    def __init__(self, d_model: int, mode: str = "usual") -> None:
        super().__init__(d_model)


def test_a_parameter_of_which_no_other_value_is_known_is_told_so(failed: Callable[..., dict[str, str]]) -> None:
    assert "Literal" in failed("ffn", Free, checks=["hyper-parameters"])["hyper-parameters"]


class Optional(Plain):
    """Sound by default; with its option it looks ahead."""

    def __init__(self, d_model: int, ahead: bool = False) -> None:
        super().__init__(d_model)
        self.ahead = ahead

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x.roll(-1, 1) if self.ahead else x), None


def test_options_are_switched_on_too(failed: Callable[..., dict[str, str]]) -> None:
    reasons = failed("ffn", Optional, checks=["causality", "hyper-parameters"])
    assert "(with ahead=True)" in reasons["causality"]
    assert "hyper-parameters" not in reasons


class Coupled(Plain):
    """``limit`` matters only where ``limited`` is true."""

    def __init__(self, d_model: int, limited: bool = False, limit: float = 1.0) -> None:
        super().__init__(d_model)
        self.limited, self.limit = limited, limit

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        y = self.project(x)
        return y.clamp(-self.limit, self.limit) if self.limited else y, None


def test_a_parameter_may_matter_beside_another_only(failed: Callable[..., dict[str, str]]) -> None:
    assert failed("ffn", Coupled, checks=["hyper-parameters"]) == {}


def test_a_case_passes_fails_and_skips_as_pytest_understands(temporary_blocks: None) -> None:
    register("ffn", "under_test")(Unplanned)
    by_check = {case.check: case for case in cases("ffn/under_test")}
    by_check["determinism"].run()
    with pytest.raises(AssertionError, match="replicate"):
        by_check["parallel plan"].run()
    with pytest.raises(PromiseError, match="The promise: The plan places every own parameter"):
        by_check["parallel plan"].run()
    with pytest.raises(unittest.SkipTest, match="does not route"):
        by_check["routing"].run()


def test_each_check_says_its_promise() -> None:
    assert all(len(case.promise) > 40 for case in cases("norm/rmsnorm"))
    assert str(cases("norm/rmsnorm")[0]) == "norm/rmsnorm: shape and dtype"


def test_wildcards_choose_as_in_the_catalogue() -> None:
    assert {case.name for case in cases("attention/m*")} == {"mamba2", "mamba3", "mha", "mla", "mqa"}
    assert {case.kind for case in cases("*/rmsnorm")} == {"norm"}
    assert cases("norm") == cases("norm/*")


@pytest.mark.parametrize(("pattern", "near"), [("atention", "attention"), ("attention/gqua", "gqa")])
def test_an_unknown_block_is_refused_with_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        cases(pattern)


def test_command_prints_each_promise_of_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["norm/rmsnorm"]) == 0
    said = capsys.readouterr().out
    assert all(check in said for check in CHECKS)
    assert "it does not route" in said


@pytest.mark.slow
def test_command_prints_a_row_for_each_block_and_fails_if_one_does(
    temporary_blocks: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    register("norm", "under_test")(Epsless)
    assert main(["norm/[lu]*"]) == 1
    said = capsys.readouterr().out
    assert "norm/layernorm" in said
    assert "hyper-parameters: eps changes nothing" in said


@pytest.mark.parametrize("arguments", [["norm/rmsnorn"], ["norm", "ffn"]])
def test_command_ends_with_64_and_no_traceback_on_a_users_mistake(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, arguments) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said


def test_flops_do_not_depend_on_how_the_process_has_its_products_computed() -> None:
    case = next(case for case in cases() if str(case) == "gating/expert_choice: flops")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert case.outcome().status == "passed"
    finally:
        torch.set_float32_matmul_precision(before)

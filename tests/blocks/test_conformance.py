"""The conformance kit: every registered block passes it, and for each check some block fails it and nothing else."""

from __future__ import annotations

import inspect
import random
import unittest
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.grouped import GQA, SlidingWindow
from blockwright.blocks.balance import ExpertBalance
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import Ring
from blockwright.blocks.conformance import PromiseError, cases
from blockwright.blocks.conformance.__main__ import main
from blockwright.blocks.conformance.cases import CHECKS, chosen
from blockwright.blocks.ffn import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.softmax import SoftmaxTopK
from blockwright.blocks.norm import Norm, RMSNorm
from blockwright.blocks.position.base import Position
from blockwright.registry import ConfigError, register
from blockwright.registry.command import run_command
from tests.slow_tier import changed_files

ROOT = Path(__file__).resolve().parent.parent.parent
# A quick run takes every check of every block in brief; the longest, most of the kit's time, of these blocks alone, and
# of norm/rmsnorm by the command. The slow tests take all of both, as `blockwright check` does.
LONG = {"hyper-parameters", "width rules", "joining rows", "flops", "compile"}
CHECKED_AT_LENGTH = {"attention/gqa": {"joining rows", "flops"}, "ffn/moe": {"width rules", "hyper-parameters"}}
BLOCKS = [f"{kind}/{name}" for kind, name in chosen("*")]


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
    found = {block for block in BLOCKS if has_changed(block, {"blocks/attention/grouped.py", "README.md"})}
    assert "attention/gqa" in found and "ffn/swiglu" not in found
    norms = {f"{kind}/{name}" for kind, name in chosen("norm")}
    assert {block for block in BLOCKS if has_changed(block, {"blocks/norm.py"})} == norms


# --- sound blocks, from which those derive that break one promise each ------------------------------------------------


class Plain(FFN):
    """y = W x"""

    residual_outputs = ("project.weight",)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x), None

    def parallel_plan(self) -> Any:
        return {"project.weight": "replicate"}


class Wider(Plain):
    """With a parameter more."""

    shape: Callable[[int], tuple[int, ...]]

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.more = nn.Parameter(torch.empty(*type(self).shape(d_model)))

    def parallel_plan(self) -> Any:
        return {**super().parallel_plan(), "more": "replicate"}


class Averaging(Attention):
    """y_t = W mean_{visible s} x_s, without a cache"""

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


class Small(GQA):
    """Grouped-query attention without a choice."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position, n_heads=4, n_kv_heads=2)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return super().child_context(child, {**known, "n_heads": 4, "n_kv_heads": 2})


class Turning(Position):
    """Rotates by the angles of ``turned_by``."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.turned_by(positions, q)  # type: ignore[attr-defined]
        q, k = (self.kernels.rotate(t, angles.cos(), angles.sin(), False) for t in (q, k))
        return q, k


def broken(base: type, **methods: Any) -> type:
    return type("Broken", (base,), methods)


def plain(f: Callable[[Any, Tensor], Tensor], base: type = Plain, **more: Any) -> type:
    return broken(base, forward=lambda self, x, given=None: (f(self, x), None), **more)


def wider(shape: Callable[[int], tuple[int, ...]], f: Callable[[Any, Tensor], Tensor]) -> type:
    return plain(f, Wider, shape=staticmethod(shape))


def with_cache(**methods: Any) -> type:
    """``Small`` with another cache, without bits."""
    cls = broken(Cache, **methods)

    def new_cache(self: Any, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        return cls(batch, length, dict.fromkeys(("k", "v"), (self.n_kv_heads, self.head_dim)), dtype, device)

    return broken(Small, new_cache=new_cache)


# --- broken ones ------------------------------------------------------------------------------------------------------


def amnesia(self: Cache, *new: Tensor) -> tuple[Tensor, ...]:
    for buffer in self.buffers.values() if self.length else ():
        buffer[:, 0] = 0
    return Cache.append(self, *new)


class PaddingSeen(GQA):
    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        made = super().new_cache(batch, length, dtype, device)
        made.__class__ = broken(Cache, padding_bias=lambda self, n_new: None)
        return made


class Coarse(GQA):
    def new_cache(self, batch: int, length: int, dtype: Any, device: Any, bits: int | None = None) -> Cache:
        return super().new_cache(batch, length, dtype, device, bits and 4)


class DraftsLinger(SlidingWindow):
    def new_cache(self, batch: int, length: int, dtype: Any, device: Any, bits: int | None = None) -> Cache:
        cache = super().new_cache(batch, length, dtype, device, bits)
        if type(cache) is Ring:
            cache.__class__ = broken(Ring, _restore=lambda self, mark, _: Ring._restore(self, mark, [len(mark.after)]))
        return cache


class BatchCentred(Norm):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x - 0.5 * x.mean(0), x.shape[-1:], eps=1e-6)


class Epsless(Norm):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class LengthScaled(Averaging):
    def forward(self, x: Tensor, given: Pass) -> Tensor:
        one = torch.zeros(1, x.shape[1], device=x.device) if given.segments is None else given.segments
        length = (one[:, :, None] == one[:, None, :]).sum(-1, keepdim=True)
        return super().forward(x, given._replace(cache=None)) * length.to(x.dtype)


class RoundedAngles(Turning):
    def turned_by(self, positions: Tensor, q: Tensor) -> Tensor:
        pairs = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float32) / self.head_dim
        return positions[..., None].to(q.dtype) * (100.0**-pairs).to(q.dtype)


class Tabulated(Turning):
    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, head_dim, 2) / head_dim))

    def turned_by(self, positions: Tensor, q: Tensor) -> Tensor:
        return positions[..., None].float() * self.frequencies.float()


class Secretive(Plain):
    def reset_parameters(self) -> None:
        self.factor = 1 + torch.rand(()).item()

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x) * getattr(self, "factor", 1.0), None


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
    def forward(self, x: Tensor, tokens: Any = None, experts: Any = None, real: Any = None) -> Any:
        return super().forward(x, tokens, experts)


class LearnedAlpha(ExpertBalance):
    def __init__(self, n_experts: int, top_k: int, alpha: float = 0.003) -> None:
        super().__init__(n_experts, top_k, alpha)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, probs: Tensor, experts: Tensor, *others: Tensor) -> dict[str, Tensor]:
        return {k: v * self.factor[0] for k, v in super().forward(probs, experts, *others).items()}

    def parallel_plan(self) -> Any:
        return {"factor": "replicate"}


def by_twos(self: Averaging, positions: Tensor) -> Tensor:
    return Averaging.seen(self, positions) | (positions[:, :, None] // 2 == positions[:, None, :] // 2)


def again(self: Any, x: Tensor, given: Pass) -> Tensor:
    """Attends once more where costs are measured: on the meta device."""
    return GQA.mix(self, x, given) + (GQA.mix(self, x, given) if x.is_meta else 0)


def counted(x: Tensor) -> Tensor:
    share = torch.arange(1, x.shape[-1] + 1, device=x.device) / x.shape[-1]  # of whole numbers: of the default dtype
    return x * share.to(x.dtype)


BROKEN: dict[str, tuple[str, type, str]] = {
    "one number a token": ("ffn", plain(lambda f, x: f.project(x)[..., :1]), "shape and dtype"),
    "peeks": ("attention", broken(Averaging, seen=by_twos), "causality"),
    "peeks in training": ("ffn", plain(lambda f, x: f.project(x.roll(-1, 1) if f.training else x)), "causality"),
    "forgets": ("attention", with_cache(append=amnesia), "stepping"),
    "sees padding": ("attention", PaddingSeen, "ragged rows"),
    "has coarse codes": ("attention", Coarse, "quantised caches"),
    "misplaces rows": (
        "attention",
        with_cache(_put=lambda self, row, other, source, n: Cache._put(self, row, other, source, max(1, n - 1))),
        "joining rows",
    ),
    "keeps drafts": ("attention", DraftsLinger, "drafts"),
    "sees other documents": (
        "attention",
        broken(Small, forward=lambda self, x, given: GQA.forward(self, x, given._replace(segments=None))),
        "packing",
    ),
    "centres the batch": ("norm", BatchCentred, "batch invariance"),
    "scales by the length": ("attention", LengthScaled, "padding invariance"),
    "overwrites": (
        "ffn",
        plain(lambda f, x: f.project(x if torch.is_grad_enabled() else x.add_(0))),
        "nothing written",
    ),
    "keeps a tensor": ("ffn", plain(lambda f, x: f.project(setattr(f, "last", x.detach()) or x)), "nothing written"),
    "has an idle weight": ("ffn", wider(lambda d: (3,), lambda f, x: f.project(x)), "gradients"),
    "rounds angles": ("position", RoundedAngles, "precision"),
    "counts in the default dtype": ("ffn", plain(lambda f, x: f.project(counted(x))), "default dtype"),
    "names queries alone": (
        "attention",
        broken(Small, score_rows=lambda self: tuple(r._replace(side="query") for r in GQA.score_rows(self))),
        "score rows",
    ),
    "ignores eps": ("norm", Epsless, "hyper-parameters"),
    "is never bare": ("ffn", NeverBare, "null children"),
    "has a secret": ("ffn", Secretive, "state dict"),
    "fills a buffer": ("position", Tabulated, "meta build"),
    "draws by itself": (
        "ffn",
        broken(Plain, reset_parameters=lambda self: self.project.weight.mul_(1 + random.random())),
        "determinism",
    ),
    "flatters": (
        "attention",
        with_cache(nbytes=property(lambda self: Cache.nbytes.fget(self) // 2)),  # type: ignore[attr-defined]
        "allocation",
    ),
    "attends twice": ("attention", broken(Small, mix=again), "memory"),
    "hides a product": ("ffn", plain(lambda f, x: f.project(x if x.is_meta else f.project(x))), "flops"),
    "hides one in training": (
        "ffn",
        plain(lambda f, x: f.project(f.project(x) if torch.is_grad_enabled() and not x.is_meta else x)),
        "flops",
    ),
    "branches": (
        "ffn",
        plain(lambda f, x: f.project(x / 2 if not x.is_meta and x.abs().max() > 1e6 else x)),
        "compile",
    ),
    "has a plan for nothing": (
        "ffn",
        broken(Plain, parallel_plan=lambda self: {**Plain.parallel_plan(self), "projekt.weight": "column"}),
        "parallel plan",
    ),
    "declares no kind": (
        "ffn",
        wider(lambda d: (d, 1), lambda f, x: f.project(x) * (1 + f.more[:, 0])),
        "weight kinds",
    ),
    # A map to one number, whose weight is stored as a vector, and which the rules do not see.
    "sums": ("ffn", wider(lambda d: (d,), lambda f, x: f.project(x) + (x @ f.more)[..., None] / 16), "width rules"),
    "chooses one twice": ("gating", Doubling, "routing"),
    "learns a factor": ("balance", LearnedAlpha, "balance"),
    "counts padding": ("gating", PaddingCounted, "padding"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found_in_brief(temporary_blocks: None, name: str) -> None:
    kind, cls, check = BROKEN[name]
    register(kind, "under_test")(cls)
    (case,) = (case for case in cases(f"{kind}/under_test") if case.check == check)
    assert (case.outcome() if check in LONG else case.brief()).status == "failed"


def test_every_check_has_a_block_that_fails_it() -> None:
    assert {check for _, _, check in BROKEN.values()} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_block_that_breaks_one_promise_fails_exactly_that_check(temporary_blocks: None, name: str) -> None:
    kind, cls, check = BROKEN[name]
    register(kind, "under_test")(cls)
    every = [case for case in cases(f"{kind}/under_test") if case.check == check or case.check not in LONG]
    found = {case.check: case.outcome() if case.check == check else case.brief() for case in every}
    reasons = {name: outcome.reason for name, outcome in found.items() if outcome.status == "failed"}
    # A running batch needs what two checks are of, and shapes are those of a block that attends once.
    of_rows = {"joining rows", "drafts"}
    with_it = {"stepping": of_rows, "ragged rows": of_rows, "memory": {"shape and dtype"}}.get(check, set())
    assert set(reasons) - with_it == {check}, reasons
    assert "Error:" not in reasons[check]  # seen by the check, not stumbled over


# --- what a check says ------------------------------------------------------------------------------------------------


@pytest.fixture
def failed(temporary_blocks: None) -> Callable[..., dict[str, str]]:
    """Registers a class until the test ends, and tells the checks that it fails, with their reasons."""

    def run(cls: type, checks: Container[str], kind: str = "ffn", name: str = "under_test") -> dict[str, str]:
        register(kind, name)(cls)
        outcomes = {case.check: case.outcome() for case in cases(f"{kind}/{name}") if case.check in checks}
        return {check: o.reason for check, o in outcomes.items() if o.status == "failed"}

    return run


def test_a_block_that_says_it_is_not_causal_is_exempt_from_causality_only(temporary_blocks: None) -> None:
    register("attention", "under_test")(broken(Averaging, seen=by_twos, causal=False))
    few = ("causality", "packing", "stepping", "gradients", "shape and dtype")
    outcomes = {case.check: case.outcome() for case in cases("attention/under_test") if case.check in few}
    assert (outcomes["causality"].status, outcomes["causality"].reason) == ("not applicable", "not causal by design")
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


class Free(Plain):
    def __init__(self, d_model: int, mode: str = "usual") -> None:
        super().__init__(d_model)


class Looking(Plain):
    """Sound by default; with its option it looks ahead."""

    def __init__(self, d_model: int, ahead: bool = False) -> None:
        super().__init__(d_model)
        self.ahead = ahead

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        return self.project(x.roll(-1, 1) if self.ahead else x), None


class Coupled(Plain):
    """``limit`` matters only where ``limited`` is true."""

    def __init__(self, d_model: int, limited: bool = False, limit: float = 1.0) -> None:
        super().__init__(d_model)
        self.limited, self.limit = limited, limit

    def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
        y = self.project(x)
        return y.clamp(-self.limit, self.limit) if self.limited else y, None


def test_parameters_of_unknown_kinds_are_declared_by_the_class(failed: Callable[..., dict[str, str]]) -> None:
    assert "conformance_settings" in failed(Unguessable, ["causality"])["causality"]
    few = ("causality", "hyper-parameters", "determinism", "state dict")
    assert failed(Declared, few, name="under_test_too") == {}
    assert "Literal" in failed(Free, ["hyper-parameters"], name="free")["hyper-parameters"]


def test_options_are_switched_on_alone_and_beside_each_other(failed: Callable[..., dict[str, str]]) -> None:
    reasons = failed(Looking, ["causality", "hyper-parameters"])
    assert "(with ahead=True)" in reasons["causality"] and "hyper-parameters" not in reasons
    assert failed(Coupled, ["hyper-parameters"], name="coupled") == {}


def test_what_a_block_raises_is_its_failure_told_in_one_line(failed: Callable[..., dict[str, str]]) -> None:
    def crash(block: Any, x: Tensor) -> Tensor:
        raise RuntimeError("out of\ncheese")

    assert failed(plain(crash), ["causality"]) == {"causality": "RuntimeError: out of cheese"}


def test_a_case_passes_fails_and_skips_as_pytest_understands(temporary_blocks: None) -> None:
    register("ffn", "under_test")(BROKEN["has a plan for nothing"][1])
    by_check = {case.check: case for case in cases("ffn/under_test")}
    by_check["determinism"].run()
    with pytest.raises(PromiseError, match="projekt") as broke:
        by_check["parallel plan"].run()
    assert isinstance(broke.value, AssertionError) and by_check["parallel plan"].promise in str(broke.value)
    with pytest.raises(unittest.SkipTest, match="does not route"):
        by_check["routing"].run()


def test_flops_do_not_depend_on_how_the_process_has_its_products_computed() -> None:
    case = next(case for case in cases() if str(case) == "gating/expert_choice: flops")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert case.outcome().status == "passed"
    finally:
        torch.set_float32_matmul_precision(before)


# --- patterns and the command -----------------------------------------------------------------------------------------


def test_wildcards_choose_as_in_the_catalogue_and_an_unknown_block_is_refused_with_the_nearest() -> None:
    assert {case.name for case in cases("attention/m?a*")} == {"mha", "mla", "mqa"}
    assert {case.kind for case in cases("*/rmsnorm")} == {"norm"} and cases("norm") == cases("norm/*")
    for pattern, nearest in (("atention", "attention"), ("attention/gqua", "gqa")):
        with pytest.raises(ConfigError, match=f"'{nearest}'"):
            cases(pattern)


def test_command_prints_each_promise_of_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["norm/rmsnorm"]) == 0
    said = capsys.readouterr().out
    assert all(check in said for check in CHECKS) and "it does not route" in said


@pytest.mark.slow
def test_command_prints_a_row_for_each_block_and_fails_if_one_does(
    temporary_blocks: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    register("norm", "under_test")(Epsless)
    assert main(["norm/[lu]*"]) == 1
    said = capsys.readouterr().out
    assert "norm/layernorm" in said and "hyper-parameters: eps changes nothing" in said


def test_command_ends_with_64_and_no_traceback_on_a_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["norm/rmsnorn"], ["norm", "ffn"]):
        assert run_command(main, arguments) == 64
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said

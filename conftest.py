"""What tests of several folders share: small blocks and models, and registrations that end with the test."""

from __future__ import annotations

import copy
import gc
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import hydra_once
import hypothesis
import pytest
import strict
import torch
from budget import Budget
from torch import Tensor, nn
from warm import Warm

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels import products, seam
from blockwright.registry import Node, Scope, catalogue
from blockwright.training.configuration.run import Run

MOE = {
    "ffn": {"name": "moe", "n_experts": 6, "shared": {"name": "swiglu", "d_ff": 20}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert", "alpha": 0.01}},
    "experts": {"name": "swiglu", "d_ff": 12},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", action="store_true", help="fail where quick tests are beyond their budget of time")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(), "budget")
    config.pluginmanager.register(strict)
    strict.install()
    # Without bytecode, each of the processes that tests start would compile all sources again, and pytest the tests.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["BLOCKWRIGHT_PRODUCTS"] = "torch"  # no test measures, nor depends on what was measured
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # of trl, whose thread would wait for a network
    hydra_once.install()
    # As many workers as cores: more threads would only wait for each other.
    torch.set_num_threads(1)
    for library in ("OMP", "OPENBLAS"):  # torch's and numpy's, in what tests start too
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    gc.set_threshold(
        100_000, 10, 10
    )  # the usual 700 new objects between two searches are an eighth of the suite's time
    # An example that waits for a busy processor is no failure.
    patient = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=patient)
    hypothesis.settings.load_profile("patient")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # thousands of tests, and what they import, would be searched again and again


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or what triton binds would count as leaked at the end, with a line for each


@pytest.fixture(autouse=True)
def products_of_torch() -> None:
    """A training chooses for its process, which then runs other tests."""
    products.use(products.Choice())


@pytest.fixture(autouse=True)
def no_handlers_of_logs() -> Iterator[None]:
    """Hydra leaves some, which in a later test would complain that the stream of this one is closed."""
    yield
    for handler in list(logging.root.handlers):
        if not type(handler).__module__.startswith("_pytest"):
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def first_process() -> Iterator[None]:
    """A rank left in the environment would make later tests those of a child process."""
    yield
    left = [name for name in ("RANK", "LOCAL_RANK", "NODE_RANK") if os.environ.get(name, "0") != "0"]
    for name in left:
        del os.environ[name]
    assert not left


def _randomise(module: nn.Module, seed: int, scale: float) -> None:
    """Every parameter random, gains and biases too: a block that forgets one must not pass by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            gain = p.ndim < 2 and not name.endswith("bias")
            p.copy_(1 + 0.2 * draw if gain else draw * scale / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    return lambda module, seed=0, scale=1.0: _randomise(module, seed, scale)


@pytest.fixture(scope="session")
def make_block() -> Callable[..., Any]:
    """Builds ``kind`` from a node, with its children found in ``around`` and every parameter random."""

    def make(
        kind: str,
        node: Any,
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        around: dict[str, Any] | None = None,
        **context: Any,
    ) -> Any:
        nodes = {"position": "none", "norm": "rmsnorm", **(around or {})}
        scope = Scope(
            {k: Node(v, f"model.{k}") for k, v in nodes.items()},
            {"d_model": 48, "n_layers": 2, "layer_idx": 0, "max_positions": 64, "vocab_size": 61, **context},
        )
        block = registry.build(kind, Node(node, f"model.{kind}"), scope).to(dtype)
        for buffer in block.buffers():
            buffer.zero_()
        _randomise(block, seed, 1.0)
        return block

    return make


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """A small valid model; ``moe=True`` gives it routed and shared experts from layer 1 on."""

    def make(moe: bool = False, **changes: Any) -> dict[str, Any]:
        model: dict[str, Any] = {
            "vocab_size": 61,
            "d_model": 48,
            "n_layers": 2,
            "max_positions": 64,
            "init": {"std": 0.05, "depth_scaled": False},
            "attention": {"name": "gqa"},
            "position": {"name": "rope"},
            "ffn": {"name": "swiglu", "d_ff": 40},
            "norm": {"name": "rmsnorm"},
            "residual": {"name": "prenorm"},
        }
        if moe:
            dense = {"variants": {"ffn": {"dense": model["ffn"]}}, "layout": {"ffn": "dense*1 ffn*"}}
            model |= {**copy.deepcopy(MOE), **dense}
        return {**model, **copy.deepcopy(changes)}

    return make


@pytest.fixture(scope="session")
def kernel_pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override of experiment=mixture that names a few pages, instead of those of a package of Debian."""
    folder = tmp_path_factory.mktemp("kernel")
    for i in range(40):
        (folder / f"{i}.rst").write_text(f"Page {i}\n=======\n\n" + "A lock is held while the list is read. " * 20)
    return f"data.sources.kernel.corpus.folder={folder}"


def _temporary_blocks() -> Iterator[None]:
    """Whatever is registered meanwhile, blocks or kernels, is gone afterwards."""
    registry.load()  # loads all of them
    seam.implementations("attention")  # and kernels: later, those of a plug-in on the path of a test would stay
    entries = {kind: dict(found) for kind, found in catalogue._entries.items()}
    families = dict(catalogue._families)
    kernels = {kernel: dict(found) for kernel, found in seam._known.items()}
    yield
    states = ((catalogue._entries, entries), (catalogue._families, families), (seam._known, kernels))
    for found, before in states:
        found.clear()
        found.update(before)
    seam.chain.cache_clear()


temporary_blocks = pytest.fixture(_temporary_blocks, name="temporary_blocks")
blocks_of_the_module = pytest.fixture(_temporary_blocks, scope="module", name="blocks_of_the_module")


# transformers in double precision


class _Doubled(SourceFileLoader):
    """A module of transformers whose casts to single precision go to double."""

    def get_data(self, path: str) -> bytes:
        text = Path(path).read_bytes()
        return text.replace(b".float()", b".double()").replace(b"torch.float32", b"torch.float64")

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _doubled(model: nn.Module) -> None:
    """Recurrent layers, residual streams, and what is beside them, compute in double: all but routers and rotary
    angles, as ours."""
    name = type(model).__module__
    if not any(hasattr(m, "conv1d") or hasattr(m, "hc_mult") for m in model.modules()):
        return
    spec = spec_from_loader(f"{name}_in_double", _Doubled(f"{name}_in_double", str(sys.modules[name].__file__)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for m in model.modules():
        kind = type(m)
        if kind.__module__ == name and not kind.__name__.endswith(("Router", "RotaryEmbedding", "RMSNorm")):
            m.__class__ = getattr(module, kind.__name__)


def _in_double(model: nn.Module, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take transformers' single-precision islands out of a model, and give it our rotary frequencies.

    It keeps norms, rotary angles and products, Gemma's softmax and deepseek_v2's complex rotation in single precision
    whatever the model's; routers, which are single here, it does not. The frequencies, which both compute in fp32 and
    round differently, are compared by themselves first.
    """

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def norm_without_gain(self: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def norm_of_gemma(self: Any, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def norm_of_gemma4(self: Any, x: Tensor) -> Tensor:
        return norm_without_gain(self, x) * (self.weight if self.with_scale else 1)

    gemma4 = {"Gemma4RMSNorm": norm_of_gemma4}
    _doubled(model)
    for cls in {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}:
        other = norm_without_gain if "Unweighted" in cls.__name__ else norm
        one_less = cls.__name__.startswith(("Gemma", "Qwen3Next", "Qwen3_5"))
        monkeypatch.setattr(cls, "forward", gemma4.get(cls.__name__, norm_of_gemma if one_less else other))
    softmax = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim, dtype=x.dtype if x.itemsize > 4 else dtype)
    )
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    for router in (m for m in model.modules() if type(m).__name__.endswith("Router")):  # ours is always single
        if type(router).__name__ == "Gemma4TextRouter":  # but for the norm that it reads through
            router.proj.float().register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
            router.per_expert_scale.data = router.per_expert_scale.float()
            continue
        router.float().register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
        if type(router).__name__ == "NemotronHTopkRouter":  # in whose precision its experts would add up
            router.register_forward_hook(lambda module, inputs, out: (out[0], out[1].double(), out[2]))
    rotaries = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    turning = [layer.attention.position for layer in decoder.layers if hasattr(layer.attention, "position")]
    ours = [p.frequencies(torch.device("cpu")) for p in turning if hasattr(p, "frequencies")]
    for rotary, name, theirs in [(m, *named) for m in rotaries for named in list(m.named_buffers())]:
        if name.endswith("inv_freq") and "original" not in name:
            frequencies = min(
                (f for f in ours if f.shape == theirs.shape), key=lambda f: (f - theirs.float()).abs().max()
            )
            torch.testing.assert_close(theirs.float(), frequencies, rtol=2e-6, atol=0)
            setattr(rotary, name, frequencies)
    if type(model).__name__ == "DeepseekV2ForCausalLM":
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

        def angles(self: Any, x: Tensor, position_ids: Tensor) -> Tensor:
            freqs = position_ids[..., None].float() * self.inv_freq
            return torch.complex(freqs.cos().double(), freqs.sin().double()) * self.attention_scaling

        def turn(q: Tensor, k: Tensor, freqs: Tensor) -> list[Tensor]:
            pairs = (torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) for x in (q, k))
            return [torch.view_as_real(x * freqs[:, None]).flatten(3) for x in pairs]

        monkeypatch.setattr(module.DeepseekV2RotaryEmbedding, "forward", angles)
        monkeypatch.setattr(module, "apply_rotary_emb", turn)


@pytest.fixture(scope="session")
def in_double() -> Callable[..., None]:
    return _in_double


# Small runs, for the tests of training/, lab/ and train.py

TRAIN = Path(__file__).resolve().parent / "train.py"


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 kB of text that repeats itself, so that a few steps suffice to learn some of it."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("".join(f"To be, or not to be: line {i} of the corpus.\n" for i in range(60)))
    return file


@pytest.fixture(scope="session")
def small(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of a second: two layers, six steps, three validations."""
    return [
        "model.n_layers=2",
        "model.d_model=64",
        "model.max_positions=64",
        "data=text",
        f"data.corpus.files={corpus_file}",
        "data.sequence_length=32",
        "data.batch_size=2",
        "data.eval_batch_size=8",
        "data.eval_windows=4",
        f"paths.data_dir={tmp_path_factory.mktemp('data')}",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1",
        "callbacks.report.sample_tokens=8",
        "test=false",
    ]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a test's subprocess: one thread, no terminal, no PROJECT_ROOT."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PROJECT_ROOT", "LOCAL_RANK", "PYTHONPATH")}
    return {**clean, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture(scope="session")
def warm(environment: dict[str, str]) -> Iterator[Warm]:
    """Starts ``python …`` in a process of its own, without the seconds of its imports."""
    starts = Warm(environment)
    yield starts
    starts.close()


@pytest.fixture
def train_py(
    warm: Warm, environment: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``blockwright train ARGUMENTS`` in a folder that is not the checkout."""

    def call(*arguments: str, cwd: Path = tmp_path, **variables: str) -> subprocess.CompletedProcess[str]:
        return warm.run(str(TRAIN), *arguments, cwd=cwd, env={**environment, **variables})

    return call


@pytest.fixture
def checked(small: list[str], tmp_path: Path) -> Callable[..., Run]:
    """The small run with overrides, composed and through the preflight: what training/entry/execute.py takes."""
    from blockwright.training.configuration.composing import compose_config
    from blockwright.training.entry.preflight import preflight

    def make(*overrides: str) -> Run:
        return preflight(compose_config([*small, *overrides], output_dir=str(tmp_path / "run")))

    return make


@pytest.fixture
def fit(checked: Callable[..., Run], tmp_path: Path) -> Callable[..., Any]:
    """Trains the small run in this process, with no callbacks but the ones given, and hands back the trainer."""
    import lightning as L

    from blockwright.training.configuration import parts
    from blockwright.training.configuration.instantiate import instantiate
    from blockwright.training.configuration.run import OWN

    def train(
        *overrides: str, callbacks: Sequence[L.Callback] = (), ckpt_path: Path | None = None, **settings: Any
    ) -> L.Trainer:
        run = checked(*overrides)
        ours = {k: v for k, v in run.trainer.items() if k not in ("_target_", "default_root_dir", *OWN)}
        ours["plugins"] = [instantiate(node, "trainer.plugins") for node in ours["plugins"]]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
        trainer = L.Trainer(**{**ours, **quiet, **settings}, default_root_dir=tmp_path, callbacks=list(callbacks))
        task, data = parts.build("task", run), parts.build("data", run)
        trainer.ckpt_path = ckpt_path
        trainer.fit(task, data, weights_only=True)
        return trainer

    return train


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, for tests of pages."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.fail("no chromium on PATH: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed: pip install 'blockwright[browser]'")
    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()

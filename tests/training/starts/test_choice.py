"""Which starts a configuration chooses, weights under another position, and adapters: trained, resumed, merged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import check, compose
from blockwright.blocks.linear import is_adapter
from blockwright.registry import ConfigError, register
from blockwright.training.checkpoints.record import Past, record
from blockwright.training.checkpoints.resume import last_rate
from blockwright.training.configuration import parts
from blockwright.training.starts import Start, Trained, changed_window, check_swaps

TRAINING = Path(__file__).resolve().parents[3] / "training"


@pytest.fixture
def deriving(temporary_blocks: None) -> None:
    """Two starts that make all weights from those of ``init_from``."""
    for name in ("grafted", "averaged"):
        own = {"__doc__": "Makes all weights.", "derives": True, "__init__": lambda self: None}
        register("start", name)(type(name.title(), (Start,), own))


def test_weights_are_copied_before_other_starts_fill_them() -> None:
    chosen = parts.starts({"init_from": "RUN", "adapter": {"rank": 2}, "model": {}})
    assert [type(start).__name__ for start in chosen] == ["Trained", "Lora"]
    assert isinstance(chosen[0], Trained) and chosen[0].trained == "RUN"
    assert parts.starts({"init_from": None, "adapter": None}) == []


def test_start_that_derives_all_weights_replaces_the_copy(deriving: None) -> None:
    chosen = parts.starts({"init_from": "RUN", "adapter": {}, "grafted": {}})
    assert [type(start).__name__ for start in chosen] == ["Grafted", "Lora"]
    with pytest.raises(ConfigError) as caught:
        parts.starts({"init_from": "RUN", "grafted": {}, "averaged": {}})
    assert caught.value.path == "grafted"


def test_no_start_is_named_where_runs_are_made() -> None:
    words = re.compile(r"surgery|tower|lora|peft|[\"'.]adapter\b", re.IGNORECASE)
    files = [path for room in ("entry", "tasks", "parallel") for path in (TRAINING / room).rglob("*.py")]
    assert not [str(path) for path in files if words.search(path.read_text())]


# Trained weights under another model

Tiny = Callable[..., dict[str, Any]]

ROPE = {"name": "rope", "theta": 500.0, "pairing": "interleaved"}

YARN = {"name": "yarn", "theta": 500.0, "factor": 8.0, "original_positions": 64}


def judged(tiny: Tiny, there: Any, here: Any, allowed: bool = False, **changes: Any) -> list[str]:
    old, new = check(tiny(position=there)), check(tiny(position=here, **changes))
    return check_swaps(old, new, "RUN", allowed)


def test_another_rotary_position_more_positions_and_a_larger_base_are_accepted_and_named(tiny: Tiny) -> None:
    assert judged(tiny, ROPE, YARN, max_positions=512) == ["positions: rope → yarn, factor 8"]
    assert judged(tiny, ROPE, {**ROPE, "theta": 16000.0}) == ["positions: rope → rope, theta 500 → 16000"]
    assert "model.position was rope, is alibi" in judged(tiny, ROPE, "alibi")[0]  # no rotation: surgery


@pytest.mark.parametrize(
    ("here", "path", "remedy"),
    [
        ({**YARN, "pairing": "half_split"}, "model.position.pairing", "model.position.pairing=interleaved"),
        ({**YARN, "rotary_fraction": 2 / 3}, "model.position.rotary_fraction", "model.position.rotary_fraction=1.0"),
        ({**YARN, "theta": 10000.0}, "model.position.theta", "model.position.theta=500"),
    ],
)
def test_what_would_rotate_other_numbers_is_refused_with_the_value_to_write(
    tiny: Tiny, here: Any, path: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        judged(tiny, ROPE, here, allowed=True)  # not even where other surgery is asked for
    assert caught.value.path == path and remedy in caught.value.remedy


def test_any_other_change_is_refused_naming_it_or_warned_about_where_it_was_asked_for(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"model\.norm\.eps was .*, is 0\.1") as caught:
        judged(tiny, ROPE, YARN, norm={"name": "rmsnorm", "eps": 0.1})
    assert caught.value.path == "init_from"
    lines = judged(tiny, ROPE, YARN, allowed=True, norm={"name": "rmsnorm", "eps": 0.1})
    assert "model.norm.eps" in lines[-1]


def test_a_position_within_an_attention_is_compared_too(tiny: Tiny) -> None:
    old = check(tiny(attention={"name": "gqa", "position": ROPE}))
    new = check(tiny(attention={"name": "gqa", "position": {**YARN, "pairing": "half_split"}}))
    with pytest.raises(ConfigError) as caught:
        check_swaps(old, new, "RUN", False)
    assert caught.value.path == "model.attention.position.pairing"


def test_stretching_from_another_length_than_the_trained_one_is_said(tiny: Tiny) -> None:
    model = check(tiny(position=YARN))
    assert changed_window(model, 64) is None and changed_window(model, None) is None
    assert "original_positions is 64" in str(changed_window(model, 128))


def past(rate: float | None, **optimizer: Any) -> Past:
    return Past({"optimizer": {"_target_": "A", "lr": 0.01, **optimizer}}, True, 10, rate)


def test_the_last_rate_is_where_the_run_ended_and_one_that_is_not_known_is_refused() -> None:
    assert last_rate({"_target_": "A", "lr": "last"}, past(0.1)) == pytest.approx(0.001)
    for given in (None, past(None), past(0.1, _target_="B")):
        with pytest.raises(ConfigError) as caught:
            last_rate({"_target_": "A", "lr": "last"}, given)
        assert caught.value.path == "optimizer.lr"


LORA = (
    "model=pretrained",
    "adapter=lora",
    "adapter.rank=4",
    "scheduler=constant",
    "optimizer=adamw",
    "optimizer.lr=0.01",
)


@pytest.fixture(scope="module")
def base(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with MLA and experts."""
    file = tmp_path_factory.mktemp("base") / "base.ckpt"
    decoder = compose(tiny(moe=True, vocab_size=257, attention={"name": "mla"}), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, file)
    return file


@pytest.fixture
def lora(base: Path) -> tuple[str, ...]:
    return (*LORA, f"init_from={base}", "adapter.targets=[attention,experts]")


@pytest.fixture(name="small")
def without_a_model(small: list[str]) -> list[str]:
    """The small run without changes to its model, which is the base's here."""
    return [o for o in small if not o.startswith("model.")]


@pytest.mark.slow
def test_run_resumes_bit_identical_and_reads_as_merged(
    fit: Callable[..., Any], lora: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    whole = fit(*lora, "trainer.max_steps=2")
    half = fit(*lora, "trainer.max_steps=1")
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(*lora, f"ckpt_path={tmp_path / 'half.ckpt'}", "trainer.max_steps=2", ckpt_path=tmp_path / "half.ckpt")
    rest.save_checkpoint(tmp_path / "rest.ckpt")
    ours, theirs = whole.lightning_module.decoder.state_dict(), rest.lightning_module.decoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load(base)
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.state_dict().items())
    assert all(ours[name].any() for name in ours if is_adapter(name))
    tokens, trained = torch.arange(20).view(2, 10), whole.lightning_module.decoder.eval()
    assert (trained(tokens) - before(tokens)).abs().max() > 1e-3
    assert torch.allclose(load(tmp_path / "rest.ckpt")(tokens), trained(tokens), atol=1e-5)  # W + BA rounds otherwise


@pytest.mark.slow
def test_resumed_run_records_the_starts_that_were_asked_for_and_reads_none(
    fit: Callable[..., Any], checked: Callable[..., Any], lora: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "half.ckpt"
    fit(*lora, "trainer.max_steps=1").save_checkpoint(file)
    gone = ("adapter.start=gone", "tower=siglip", "tower.folder=gone")
    asked = (*lora, *gone, f"ckpt_path={file}", "trainer.max_steps=2")
    kept = record(checked(*asked))
    assert (kept["adapter"]["start"], kept["tower"]["folder"]) == ("gone", "gone") and kept["init_from"]
    assert fit(*asked, ckpt_path=file).global_step == 2


@pytest.mark.slow
def test_trainer_that_has_resumed_a_run_measures_another_from_its_own_start(
    fit: Callable[..., Any], checked: Callable[..., Any], lora: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "half.ckpt"
    trainer = fit(*lora, "trainer.max_steps=1")
    trainer.save_checkpoint(file)
    plain = checked(*lora)
    data = parts.build("data", plain)
    trainer.validate(trainer.lightning_module, data, ckpt_path=file, weights_only=True, verbose=False)
    other = parts.build("task", plain)
    trainer.validate(other, data, verbose=False)
    weights = other.decoder.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load(base).state_dict().items())


@pytest.mark.slow
def test_resuming_with_another_adapter_is_refused(fit: Any, lora: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    fit(*lora, "trainer.max_steps=1").save_checkpoint(file)
    with pytest.raises(ConfigError, match=r"was trained with another model.*lora_a"):
        fit(*lora, f"ckpt_path={file}", "adapter.rank=2")
    with pytest.raises(ConfigError, match="was trained with another model"):
        fit(*(o for o in lora if "adapter" not in o), f"ckpt_path={file}")


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["adapter=lora"], "init_from", "would be random"),
        (["init_from=BASE", "adapter=lora", "adapter.targets=[norm]"], "adapter.targets", "linear layer or stack"),
        (["init_from=BASE", "adapter=lora", "adapter.start=nowhere"], "nowhere/adapter_config.json", "no such file"),
    ],
)
def test_wrong_settings_are_refused_before_work(
    checked: Callable[..., Any], base: Path, overrides: list[str], path: str, words: str
) -> None:
    given = [o.replace("BASE", str(base)) for o in overrides]
    model = ["model=pretrained"] if len(overrides) > 1 else []
    with pytest.raises(ConfigError) as caught:
        checked(*model, *given)
    assert caught.value.path.endswith(path) and words in caught.value.rule


@pytest.mark.slow
def test_frozen_run_resumes(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Its optimizer has no state for frozen parts, neither in the checkpoint nor in the run that resumes."""
    small = ("model.n_layers=1", "task.frozen=[embedding]")
    fit(*small, "trainer.max_steps=1").save_checkpoint(tmp_path / "run.ckpt")
    path = tmp_path / "run.ckpt"
    assert fit(*small, f"ckpt_path={path}", "trainer.max_steps=2", ckpt_path=path).global_step == 2

"""``blockwright skills RUN``, the callback, and a skill of another package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from warm import Warm

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.skills.__main__ import main
from blockwright.plugins.skills.rows import ids_of
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars, Tokenizer
from tests.lab import test_figures as figures
from tests.test_plugin import install
from tests.test_plugin import run as run_with

NODES: list[Any] = ["recall", {"name": "depth", "difficulty": 2, "nodes": 5}, {"name": "knowledge", "difficulty": 32}]


def written(folder: Path, data: Any, tokenizer: Tokenizer | None = None, **model: Any) -> Path:
    """A run's folder as training leaves it, with random weights."""
    tokenizer = tokenizer or Chars(96)
    ids_of(tokenizer)
    decoder = compose(preset("tiny_skills", {"max_positions": 64, **model}), seed=0)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (folder / "checkpoints").mkdir()
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    state = {"hyper_parameters": {"model": decoder.config}, "state_dict": weights}
    torch.save({**state, "SkillsDataModule": {"tokenizer": tokenizer.to_json()}}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("skills") / "run", {"name": "skills", "skill": NODES})


def test_every_skill_of_the_run_is_measured_by_difficulty(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--samples", "3", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "skills.json").read_text())["skills"]
    assert [each["skill"] for each in found] == ["recall", "depth", "knowledge"]
    assert [level["difficulty"] for level in found[1]["levels"]] == [1, 2] and found[1]["levels"][0]["length"] == 16
    assert "depth, trained to 2 hops" in said and "bits held" in said and "95 % interval" in said
    assert "<svg" in (tmp_path / "skills.svg").read_text()


def test_one_skill_is_measured_at_chosen_difficulties_as_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--skill", "depth", "--difficulty", "4,3", "--samples", "2", "--json", "--out", str(tmp_path)])
    (found,) = json.loads(capsys.readouterr().out)["skills"]
    assert [level["difficulty"] for level in found["levels"]] == [3, 4] and found["trained"] == 2


def test_without_out_the_run_has_the_files(run: Path) -> None:
    main([str(run), "--skill", "depth", "--samples", "1", "--json"])
    assert {file.name for file in (run / "skills").iterdir()} == {"skills.json", "skills.svg"}


WRONG = [
    (["--samples", "0"], "--samples"),
    (["--samples", "1000000"], "--samples"),
    (["--skill", "recal"], "--skill"),
    (["--difficulty", "4"], "--difficulty"),
    (["--skill", "recall", "--difficulty", "hard"], "--difficulty"),
    (["--skill", "recall", "--difficulty", "4,,8"], "--difficulty"),
    (["--skill", "recall", "--difficulty", "33"], "--difficulty"),
    (["--skill", "recall", "--difficulty", "32"], "--difficulty"),  # more positions than the model has
    (["--skill", "depth", "--difficulty", "5"], "--difficulty"),
    (["--dtype", "int8"], "dtype"),
    (["--out", __file__], "--out"),
]


def test_a_wrong_command_is_one_message(run: Path) -> None:
    for more, path in WRONG:
        with pytest.raises(ConfigError) as refused:
            main([str(run), *more])
        assert refused.value.path == path and refused.value.remedy, more


UNTRUSTED: list[tuple[Any, str]] = [
    ({"name": "text"}, "data.name"),
    ([1, 2], "data.name"),
    ({"name": "skills"}, "data.skill"),
    ({"name": "skills", "skill": []}, "data.skill"),
    ({"name": "skills", "skill": ["recall"] * 30}, "data.skill"),
    ({"name": "skills", "skill": ["nothing"]}, "data.skill.0.name"),
    ({"name": "skills", "skill": [{"_target_": "os.system", "name": "recall"}]}, "data.skill.0._target_"),
    ({"name": "skills", "skill": [{"name": "recall", "difficulty": 10**12}]}, "data.skill.0.difficulty"),
]


def test_settings_of_an_untrusted_folder_build_skills_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", {}, n_layers=1, d_model=16)
    for data, path in UNTRUSTED:
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        with pytest.raises(ConfigError) as refused:
            main([str(folder)])
        assert refused.value.path.startswith(path) and not (folder / "skills").exists()


def test_a_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    usual = {"name": "skills", "skill": ["recall"]}
    small = written(tmp_path / "small", usual, vocab_size=50, n_layers=1, d_model=16)
    with pytest.raises(ConfigError) as refused:
        main([str(small)])
    assert refused.value.path == "RUN"
    bytes_ = written(tmp_path / "bytes", usual, Bytes(), vocab_size=257, n_layers=1, d_model=16)
    main([str(bytes_), "--samples", "1", "--json"])
    (bytes_ / ".hydra" / "config.yaml").unlink()
    with pytest.raises(ConfigError) as refused:
        main([str(bytes_)])
    assert refused.value.path == "RUN"


pytestmark = pytest.mark.xdist_group("figures")
trained = figures.trained


@pytest.mark.slow
def test_the_callback_logs_what_it_declares(trained: Callable[..., Path]) -> None:
    chosen = ["data=skills", "data.skill=[depth]", "data.held_out=4", "task=recall", "callbacks=skills"]
    folder = trained("skills", [*chosen, "callbacks.skills.samples=2"])
    assert figures.undeclared(folder) == set()
    assert figures.unlogged("skills", folder) == []


MODULE = Path(__file__).parent / "another" / "parity_skill.py"
PROJECT = {"name": "parity-skill", "version": "0.1.0"}
PROJECT |= {"entry-points": {"blockwright.blocks": {"parity": "parity_skill"}}}  # type: ignore[dict-item]


@pytest.mark.slow
def test_a_skill_of_another_package_is_trained_and_measured(
    small: list[str], warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    site, folder = tmp_path / "site", tmp_path / "run"
    site.mkdir()
    shutil.copy(MODULE, site)
    install(site, PROJECT)
    of_run = [each for each in small if not each.startswith(("data", "model"))]
    chosen = ["experiment=skills", *of_run, "callbacks.skills.samples=8", "data.held_out=8", "test=false"]
    commands = {"trained": [*chosen, "data.skill=[parity,{name: recall, difficulty: 2}]", f"hydra.run.dir={folder}"]}
    said = run_with(warm, commands, site, environment, tmp_path)
    assert said["trained"][0] == 0, said["trained"][1]
    parity, recall = json.loads((folder / "skills.json").read_text())["skills"]
    assert (parity["skill"], parity["unit"], recall["skill"]) == ("parity", "bits", "recall")
    assert [level["difficulty"] for level in parity["levels"]] == [1, 2, 4, 8]
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["skills/parity"] == parity["levels"][-1]["right"] / 8

"""``blockwright skills RUN``: what it measures and writes, and one message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.skills.__main__ import main
from blockwright.plugins.skills.rows import ids_of
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars

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


@pytest.mark.parametrize(
    ("more", "path", "words"),
    [
        (["--samples", "0"], "--samples", "1 to 100,000"),
        (["--samples", "1000000"], "--samples", "1 to 100,000"),
        (["--skill", "recal"], "--skill", "is no skill of this run"),
        (["--difficulty", "4"], "--difficulty", "something else for each of 3 skills"),
        (["--skill", "recall", "--difficulty", "hard"], "--difficulty", "whole numbers"),
        (["--skill", "recall", "--difficulty", "4,,8"], "--difficulty", "whole numbers"),
        (["--skill", "recall", "--difficulty", "33"], "--difficulty", "32"),
        (["--skill", "recall", "--difficulty", "32"], "--difficulty", "positions for 64"),
        (["--skill", "depth", "--difficulty", "5"], "--difficulty", "goes around the cycle"),
        (["--dtype", "int8"], "dtype", "not supported"),
    ],
)
def test_a_wrong_command_is_one_message(run: Path, more: list[str], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        main([str(run), *more])
    assert refused.value.path == path and words in refused.value.rule and refused.value.remedy


def test_a_file_is_no_folder_to_write_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refused:
        main([str(run), "--out", str(tmp_path / "file")])
    assert refused.value.path == "--out"


@pytest.mark.parametrize(
    ("data", "path", "words"),
    [
        ({"name": "text"}, "data.name", "no data of skills"),
        ([1, 2], "data.name", "no data of skills"),
        ({"name": "skills"}, "data.skill", ""),
        ({"name": "skills", "skill": []}, "data.skill", "1 to 20"),
        ({"name": "skills", "skill": ["recall"] * 30}, "data.skill", "1 to 20"),
        ({"name": "skills", "skill": ["nothing"]}, "data.skill.0.name", "no skill is registered"),
        ({"name": "skills", "skill": [{"_target_": "os.system", "name": "recall"}]}, "data.skill.0._target_", ""),
        ({"name": "skills", "skill": [{"name": "recall", "difficulty": 10**12}]}, "data.skill.0.difficulty", "32"),
    ],
)
def test_settings_of_an_untrusted_folder_build_skills_alone(data: Any, path: str, words: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "run", data, n_layers=1, d_model=16)
    with pytest.raises(ConfigError) as refused:
        main([str(folder)])
    assert refused.value.path.startswith(path) and words in refused.value.rule
    assert not (folder / "skills").exists()


def test_a_model_of_other_tokens_is_refused(tmp_path: Path) -> None:
    usual = {"name": "skills", "skill": ["recall"]}
    small = written(tmp_path / "small", usual, vocab_size=50, n_layers=1, d_model=16)
    with pytest.raises(ConfigError) as refused:
        main([str(small)])
    assert refused.value.path == "RUN" and "fewer tokens" in refused.value.rule
    bytes_ = written(tmp_path / "bytes", usual, Bytes(), vocab_size=257, n_layers=1, d_model=16)
    main([str(bytes_), "--samples", "1", "--json"])
    (bytes_ / ".hydra" / "config.yaml").unlink()
    with pytest.raises(ConfigError) as refused:
        main([str(bytes_)])
    assert refused.value.path == "RUN" and "config.yaml" in refused.value.rule

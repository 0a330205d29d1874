"""What runs of older versions have left is taken as it is: their configuration, under names that have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockwright import renamed
from blockwright.renamed import MOVED, with_moved
from blockwright.training.checkpoints.record import past_of
from blockwright.training.configuration.instantiate import find_target

HERE = Path(__file__).parent
PACKAGE = Path(renamed.__file__).parent


def test_class_that_has_moved_is_found_where_a_node_names_it_and_nowhere_else() -> None:
    (old, new), *_ = MOVED.items()
    given = {"model": {"class_path": old, "init_args": {"text": old}}, "x": [{"_target_": old}], "y": ["z", None, 3]}
    moved = {"model": {"class_path": new, "init_args": {"text": old}}, "x": [{"_target_": new}], "y": ["z", None, 3]}
    assert with_moved(given) == moved


def test_class_that_has_moved_is_where_the_table_says() -> None:
    plugins = {folder.name for folder in (PACKAGE / "plugins").iterdir()}
    for path in MOVED.values():
        if not path.startswith("blockwright.plugins.") or path.split(".")[2] in plugins:
            assert find_target(path, "x").__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize("prefix", ["", "blockwright."])
def test_class_of_a_task_is_its_name_now(prefix: str) -> None:
    grpo, text = f"{prefix}training.tasks.grpo.Grpo", f"{prefix}training.data.module.TextDataModule"
    run = {"model": {"d_model": 8}, "seed": 3, "optimizer": {"_target_": "x.Y"}, "init_from": None}
    own = {"group_size": 4, "frozen": []}
    assert with_moved({"task": {"_target_": grpo, **run, **own}}) == {"task": {"name": "grpo", **own}}
    assert with_moved({"class_path": grpo, "init_args": {**run, **own}}) == {"task": {"name": "grpo", **own}, **run}
    assert with_moved({"class_path": text, "init_args": {"documents": "joined"}}) == {
        "data": {"name": "text", "documents": "joined"}
    }


@pytest.mark.parametrize("prefix", ["", "blockwright."])
def test_start_was_a_class_or_a_setting_of_the_task(prefix: str) -> None:
    lora, task = f"{prefix}training.lora.Lora", {"name": "causal_lm"}
    assert with_moved({"adapter": {"_target_": lora, "rank": 4}, "surgery": None}) == {
        "adapter": {"rank": 4},
        "surgery": None,
    }
    assert with_moved({"adapter": {"class_path": lora, "init_args": {"rank": 4}}}) == {"adapter": {"rank": 4}}
    assert with_moved({"task": {**task, "tower": "DIR"}}) == {"task": task, "tower": {"folder": "DIR"}}
    assert with_moved({"task": {**task, "tower": None}}) == {"task": task}


def test_old_configuration_of_hydra_is_composed_and_an_old_checkpoint_is_of_the_same_task(checked: Any) -> None:
    chat = {"_target_": "training.data.chat_module.ChatDataModule", "documents": "apart", "transforms": {}, "seed": 1}
    assert with_moved(chat) == {"name": "chat", "seed": 1}  # settings that conversations never took are gone
    plain = checked("+task._target_=training.tasks.causal_lm.CausalLM", "+task.seed=0", "~resume")
    assert plain["resume"] == {"changed": "show"}
    assert plain["task"]["name"] == "causal_lm" and "seed" not in plain["task"]
    settings = {"model": None, "task": {"_target_": "training.tasks.causal_lm.CausalLM"}}
    assert past_of({"configuration": settings}).settings["task"] == {"name": "causal_lm"}


@pytest.mark.slow
def test_old_exported_file_trains_and_resumes(train_py: Any, tmp_path: Path, corpus_file: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    text = (HERE / "old_lightning_cli.yaml").read_text()
    for word, value in {"FOLDER": old, "CORPUS": corpus_file, "CACHE": tmp_path}.items():
        text = text.replace(word, str(value))
    file = tmp_path / "lightning_cli.yaml"
    file.write_text(text)
    first = train_py("fit", "--config", str(file), f"--run_dir={old}")
    assert first.returncode == 0 and "step=2" in first.stdout, first.stderr
    assert "warning" not in first.stderr.lower()
    # The file names the folder `old`, which holds a run by now: it writes elsewhere, and still reads its checkpoint.
    checkpoint = f"--ckpt_path={old}/checkpoints/best.ckpt"
    further = train_py("fit", "--config", str(file), f"--run_dir={new}", checkpoint, "--trainer.max_steps=4")
    assert further.returncode == 0 and "step=4" in further.stdout, further.stderr
    assert (new / "checkpoints/best.ckpt").exists()

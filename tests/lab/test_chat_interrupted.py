"""Ctrl-C in a conversation, on a real terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_folder
import pytest
from terminal import INTERRUPT, on_a_terminal


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_keeps_the_conversation_and_ends_at_the_prompt(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, environment: dict[str, str]
) -> None:
    model = chat_folder.save(tmp_path / "run", tiny, chat_folder.words(tmp_path), n_layers=12)  # slow enough to stop
    saved = tmp_path / "talk.jsonl"
    with on_a_terminal(["chat", str(model), "--temperature", "0", "--device", "cpu"], environment) as terminal:
        terminal.until("> ")
        for said in ("Hi", "And?"):
            terminal.type(f"{said}\n")
            terminal.until(re.escape(said) + "\r\n.")  # the answer has begun
            terminal.type(INTERRUPT)
            terminal.until("stopped; /retry")
            terminal.until("> ")
        terminal.type(f"/save {saved}\n")
        terminal.until("> ")
        messages = json.loads(saved.read_text())["messages"]
        assert terminal.end(pressing=INTERRUPT) == 130
        assert terminal.settings == terminal.before
        assert "Traceback" not in terminal.shown
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages[::2]] == ["Hi", "And?"]

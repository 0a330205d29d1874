"""Bad inputs to fine-tuning and alignment, through the command: each ends in one message with exit code 64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.training.entry.main import main

pytestmark = pytest.mark.xdist_group("bad_alignment")

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TALK = [USER, ANSWER]
MARKED = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
DEEP = "[" * 100_000

Case = tuple[str, Any, list[str], str, str]  # name; records, or the text of the file; overrides; path; part of the rule

CHAT = ["data=chat"]
CHATS: list[Case] = [
    ("record", [[]], CHAT, "data.corpus.files", "must be a mapping, not list"),
    ("no messages", [{"text": "Hi"}], CHAT, "data.corpus.files", "this has text"),
    ("messages as text", [{"messages": "Hi"}], CHAT, "data.corpus.files", "must be a list of messages"),
    ("no message", [{"messages": []}], CHAT, "data.corpus.files", "not empty"),
    ("message as text", [{"messages": ["Hi"]}], CHAT, "data.corpus.files", "needs a role and a content"),
    ("no content", [{"messages": [{"role": "user"}]}], CHAT, "data.corpus.files", "needs a role and a content"),
    ("content", [{"messages": [{**USER, "content": [1]}]}], CHAT, "data.corpus.files", "both text"),
    ("role", [{"messages": [{**USER, "role": "oracle"}]}], CHAT, "data.corpus.files", "'oracle' is none of"),
    ("no role", [{"messages": [{"content": "Hi"}]}], CHAT, "data.corpus.files", "'None' is none of"),
    ("role order", [{"messages": [*TALK, {**USER, "role": "system"}]}], CHAT, "data.corpus.files", "must be the first"),
    ("empty answer", [{"messages": [USER, {**ANSWER, "content": ""}]}], CHAT, "data.corpus.files", "answer is empty"),
    ("empty completion", [{"prompt": "Hi", "completion": ""}], CHAT, "data.corpus.files", "answer is empty"),
    ("no answer", [{"messages": [USER]}], CHAT, "data.corpus.files", "no scored token"),
    ("unscored", [{"messages": [USER, {**ANSWER, "scored": False}]}], CHAT, "data.corpus.files", "no scored token"),
    ("tool alone", [{"messages": [{**USER, "role": "tool"}]}], CHAT, "data.corpus.files", "must follow an answer"),
    ("call", [{"messages": [{**ANSWER, "tool_calls": 3}]}], CHAT, "data.corpus.files", "tool_calls must be a list"),
    ("tools", [{"messages": TALK, "tools": "{"}], CHAT, "data.corpus.files", "tools is no JSON"),
    ("tools in plain", [{"messages": TALK, "tools": [{}]}], CHAT, "data.chat", "no form for tools"),
    (
        "half a character",
        '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
        CHAT,
        "data.corpus.files",
        "surrogates not allowed",
    ),
    ("no JSON", "{oops", CHAT, "data.corpus.files", "is no line of JSON"),
    ("nested", DEEP, CHAT, "data.corpus.files", "is no line of JSON"),
    ("nothing", "\n", CHAT, "data.corpus.files", "hold no conversation"),
    ("no file", None, CHAT, "data.corpus.files", "FILE"),
    ("no special tokens", [{"messages": TALK}], [*CHAT, "data/chat=chatml"], "data.chat", "has no special token"),
    ("no template", [{"messages": TALK}], [*CHAT, "data/chat=jinja"], "data.chat", "no chat template beside it"),
]

TEMPLATES: list[tuple[str, str]] = [
    ("{{ messages[0].content }}", "marks no answers"),
    ("{% generation %}{% for %}", "is no Jinja template"),
    (MARKED + "{{ raise_exception('only cats') }}", "only cats"),
    (MARKED + "{{ nothing.there }}", "refuses a conversation"),
    (MARKED + "{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses a conversation"),
    (MARKED + "{{ cycler.__init__.__globals__.os.system('touch BROKEN_OUT') }}", "refuses a conversation"),
    (MARKED + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "took longer than"),
]
CHATS += [
    (f"template {i}", [{"messages": TALK}], [*CHAT, "data/chat=jinja", f"TEMPLATE={text}"], "data.chat", rule)
    for i, (text, rule) in enumerate(TEMPLATES)
]

PAIRS = ["data=preferences", "task=reward"]
PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
PREFERENCES: list[Case] = [
    ("not rejected", [{"prompt": "Hi", "chosen": "Yes"}], PAIRS, "data.corpus.files", "needs chosen and rejected"),
    ("same", [{**PAIR, "rejected": "Yes"}], PAIRS, "data.corpus.files", "nothing is preferred"),
    ("no prompt", [{"chosen": "Yes", "rejected": "No"}], PAIRS, "data.corpus.files", "share no prompt"),
    ("empty chosen", [{**PAIR, "chosen": ""}], PAIRS, "data.corpus.files", "answer is empty"),
    ("ends with a user", [{**PAIR, "chosen": [USER]}], PAIRS, "data.corpus.files", "end with an answer"),
    ("too long", [{**PAIR, "chosen": "Yes" * 99}], PAIRS, "data.sequence_length", "no pair of the train split fits"),
    ("loss", [PAIR], ["data=preferences", "task=preference", "task/preference=dpo"], "task/preference", "dpo"),
    ("start", [PAIR], ["data=preferences", "task=preference"], "init_from", "random weights"),
    ("beta", [PAIR], [*PAIRS, "task=preference", "START", "task.preference.beta=0"], "task.preference.beta", "above 0"),
    ("no pairs", [{"messages": TALK}], ["data=chat", "task=preference", "START"], "data", "compares answers"),
]

GRPO = ["data=prompts", "task=grpo"]
ASKED = [{"prompt": "Hi", "completion": "?", "answer": "Yes"}]
PROMPTS: list[Case] = [
    ("no start", ASKED, GRPO, "init_from", "random weights"),
    ("alone", ASKED, [*GRPO, "START", "task.group_size=1"], "task.group_size", "at least 2"),
    ("cold", ASKED, [*GRPO, "START", "task.temperature=0"], "task.temperature", "above 0"),
    ("nothing to answer", [{"messages": [ANSWER]}], [*GRPO, "START"], "data.corpus.files", "nothing to answer"),
    ("long prompt", [{**ASKED[0], "prompt": "Hi" * 99}], [*GRPO, "START"], "data.sequence_length", "198 tokens"),
    ("reward", ASKED, [*GRPO, "START", "task/reward=exact"], "task/reward", "exact"),
    (
        "pattern",
        ASKED,
        [*GRPO, "START", "task/reward=regex_format", "task.reward.pattern='('"],
        "task.reward.pattern",
        "no regular",
    ),
    (
        "judge",
        ASKED,
        [*GRPO, "START", "task/reward=reward_model", "task.reward.run=START"],
        "task.reward.run",
        "is no run of",
    ),
    (
        "memory",
        ASKED,
        [*GRPO, "START", "task/reward=unit_tests", "task.reward.memory_mb=1"],
        "task.reward.memory_mb",
        "64",
    ),
    ("penalty", ASKED, [*GRPO, "START", "task/penalty=k3"], "task.reference", "none is named"),
    ("completions", ASKED, [*GRPO, "START", "task.max_new_tokens=0"], "task.max_new_tokens", "at least 1"),
    (
        "tokenizer",
        ASKED,
        [*GRPO, "START", "data/tokenizer=chars", "data.tokenizer.vocab_size=257"],
        "data.tokenizer",
        "other ids",
    ),
]
CASES = [*CHATS, *PREFERENCES, *PROMPTS]
# Of the others, rules are tested by function in tests/training/data and tests/training/tasks.
QUICK = (
    "record",
    "half a character",
    "no special tokens",
    "template 4",
    "template 6",
    "no prompt",
    "too long",
    "start",
)
QUICK += ("no pairs", "nothing to answer", "alone", "tokenizer")


@pytest.fixture(scope="module")
def start(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of bytes."""
    decoder = compose(tiny(vocab_size=257), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    file = tmp_path_factory.mktemp("start") / "start.ckpt"
    data = {"tokenizer": {"kind": "bytes", "vocab_size": 257}}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}, "Data": data}, file)
    return file


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """``blockwright train …`` in this process: its exit code and what it wrote to stderr."""

    def call(*overrides: str) -> tuple[Any, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return call


def test_there_are_forty_and_each_has_a_name() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case[0] in QUICK else [pytest.mark.slow], id=case[0]) for case in CASES],
)
def test_bad_input_ends_in_one_message(
    case: Case, train: Callable[..., Any], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, records, overrides, path, rule = case
    monkeypatch.setattr("blockwright.training.data.chat.template_process.PROCESS.seconds", 0.2)
    file, template, written = tmp_path / "data.jsonl", tmp_path / "template.jinja", []
    for override in overrides:
        if override.startswith("TEMPLATE="):
            template.write_text(override.removeprefix("TEMPLATE="))
            override = f"data.chat.template={template}"
        elif override == "START":
            written.append("model=pretrained")
            override = f"init_from={start}"
        written.append(override.replace("=START", f"={start}"))
    if records is not None:
        lines = records if isinstance(records, str) else "\n".join(json.dumps(record) for record in records * 12)
        file.write_text(lines)
    small = [
        "data.sequence_length=16",
        "data.batch_size=2",
        "data.corpus.val_fraction=0",
        "data.corpus.test_fraction=0",
    ]
    small += ["trainer.max_steps=1", "logger=none", "callbacks=none", "test=false"]
    quiet = [f"data.corpus.files={file}", f"paths.root_dir={tmp_path}", f"paths.data_dir={tmp_path / 'cache'}"]
    code, said = train(*written, *small, *quiet)
    assert code == 64, said
    messages = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1 and messages[0].startswith(f"error: {path}"), said
    assert rule.replace("FILE", str(file)) in said and "remedy:" in said and "Traceback" not in said, said
    assert not list(tmp_path.rglob("BROKEN_OUT")) and not list(tmp_path.rglob("*.ckpt"))

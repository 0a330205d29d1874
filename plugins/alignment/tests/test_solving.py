"""Prompts judged by a reward: pass@k, its intervals, the command, and every mistake one message."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aligned import says
from scipy.stats import binomtest

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.lab.evaluate import main
from blockwright.lab.statistics.intervals import wilson
from blockwright.plugins.alignment.solving.measure import pass_at_k
from blockwright.plugins.alignment.solving.problems import read_problems
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Bytes


def test_pass_at_k_is_the_share_of_choices_with_a_right_one_and_its_interval_wilsons() -> None:
    for n, right in ((5, 0), (5, 2), (6, 5), (4, 4)):
        for k in range(1, n + 1):
            choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    for right, n in ((40, 50), (0, 7), (20, 20), (1, 300)):
        (centre, half), expected = wilson(right / n, n), binomtest(right, n).proportion_ci(method="wilson")
        assert (centre - half, centre + half) == pytest.approx((expected.low, expected.high), abs=1e-6)


def asking(folder: Path, name: str, *rows: dict[str, Any]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture(scope="module")
def run(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model says what is random, and prompts with the number of letters that are wanted."""
    folder = tmp_path_factory.mktemp("run")
    decoder = compose(tiny(vocab_size=257, init={"std": 0.3, "depth_scaled": False}), seed=3)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
    (folder / "checkpoints").mkdir()
    torch.save({**parts, "TextDataModule": {"tokenizer": Bytes().to_json()}}, folder / "checkpoints" / "last.ckpt")
    said = [{"messages": [{"role": "user", "content": f"say {i}:"}], "answer": str(i)} for i in range(5)]
    asking(folder, "prompts.jsonl", *said)
    asking(folder, "unknown.jsonl", {"messages": [{"role": "user", "content": "say"}], "answer": "?"})
    return folder


def task(run: Path, **changes: Any) -> str:
    values: dict[str, Any] = {"prompts": str(run / "prompts.jsonl"), "samples": 4, "k": [1, 2, 4], "max_new_tokens": 3}
    values |= {"reward": {"name": "regex_format", "pattern": ".*[a-m].*"}, **changes}
    (run / "task.yaml").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return str(run / "task.yaml")


def test_command_measures_every_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(run), "--task", task(run), "--device", "cpu"]
    main([*given, "--json", "--out", str(run / "said.jsonl")])
    found = json.loads(capsys.readouterr().out)
    said = [json.loads(line) for line in (run / "said.jsonl").read_text().splitlines()]
    assert found["prompts"] == 5 and len(said) == 5 * (4 + 1)
    right = {(row["prompt"], i): row["reward"] for i, row in enumerate(said) if row["sampled"]}
    each = [sum(value for (prompt, _), value in right.items() if prompt == f"say {i}:") for i in range(5)]
    assert found["passed"]["1"]["value"] == pytest.approx(sum(each) / 20) and 0 < sum(each) < 20
    assert found["passed"]["4"]["value"] == pytest.approx(sum(c > 0 for c in each) / 5)
    assert found["passed"]["1"]["low"] < found["passed"]["1"]["value"] < found["passed"]["1"]["high"]
    assert found["greedy"]["value"] == sum(row["reward"] for row in said if not row["sampled"]) / 5
    main([*given, "--rows", "4", "--limit", "5", "--json"])  # other batches, the same completions
    assert json.loads(capsys.readouterr().out) == found
    main(given)
    assert "pass@2" in capsys.readouterr().out


def test_what_has_no_reward_is_not_wrong(run: Path, capsys: pytest.CaptureFixture[str], temporary_blocks: None) -> None:
    registry.register("reward", "reluctant")(says(lambda text: 1.0 if len(text) % 2 else None))
    out = run / "reluctant.jsonl"
    main([str(run), "--task", task(run, reward="reluctant", k=[1]), "--device", "cpu", "--out", str(out), "--json"])
    found, said = json.loads(capsys.readouterr().out), [json.loads(line) for line in out.read_text().splitlines()]
    judged = [row["reward"] for row in said if row["reward"] is not None]
    assert found["judged"] == pytest.approx(len(judged) / len(said)) and 0 < found["judged"] < 1
    assert found["greedy"]["value"] == found["passed"]["1"]["value"] == found["reward"] == 1


def test_prompts_are_asked_as_the_run_was_trained_with_all_that_rewards_and_templates_read(run: Path) -> None:
    problems = read_problems(Path(task(run)))
    first = problems.asked(Bytes(), None, "deepseek_v2")[0][0]
    assert Bytes().decode(first.ids) == "User: say 0:\n\nAssistant:"
    assert first.columns["messages"] == [{"role": "user", "content": "say 0:"}]
    tools = asking(run, "tools.jsonl", {"messages": first.columns["messages"], "tools": [{"type": "function"}]})
    with pytest.raises(ConfigError):  # no form for tools
        read_problems(Path(task(run, prompts=tools))).asked(Bytes(), None)


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("task.reward", {"reward": None}),
    ("task.reward.name", {"reward": "exact"}),
    ("task.reward", {"reward": {"name": "exact_match", "answer": "x"}}),  # which all records lack
    ("task.reward", {"reward": "arithmetic", "prompts": "unknown.jsonl"}),  # judges none
    ("task.k", {"k": [5]}),
    ("task.samples", {"samples": 0}),
    ("task.temperature", {"temperature": 0}),
    ("task.prompt", {"prompt": "x"}),
    ("task.prompts", {"prompts": None}),
    ("task.max_new_tokens", {"max_new_tokens": 0}),
    ("task.chat", {"chat": "chatmm"}),
    ("--limit", {}),
]


def test_mistake_is_one_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for path, changes in MISTAKES:
        options = ["--limit", "0"] if path == "--limit" else []
        with pytest.raises(ConfigError) as refusal:
            main([str(run), "--task", task(run, **changes), "--device", "cpu", *options])
        assert refusal.value.path.startswith(path), changes

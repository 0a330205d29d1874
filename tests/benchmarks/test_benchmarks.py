"""Each benchmark from command line to result, at its smallest; contenders run in this process, so that it is quick."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

from benchmarks import (
    codes,
    decode,
    kernels,
    long_prompt,
    mixers,
    peers,
    race,
    running_batch,
    scaling,
    selectors,
    train_step,
    vision_step,
)
from benchmarks.scaling import flat_error, line_error
from benchmarks.shapes import FAMILIES, SHAPES

Run = Callable[..., dict[str, Any]]
ROOT = Path(race.__file__).resolve().parent.parent


class InThisProcess:
    """What a worker does, without its process and settings."""

    def __init__(self, entry: race.Entry, device: str, threads: int) -> None:
        self.module, _, self.name = entry.job.partition(":")
        self.arguments = {**json.loads(json.dumps(entry.arguments)), "device": device}

    def ready(self) -> dict[str, Any]:
        try:
            self.job = getattr(importlib.import_module(self.module), self.name)(**self.arguments)
        except ImportError as error:  # of a library that is not installed
            raise race.FailedError(str(error)) from error
        return self.job.about()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(self.job.turn(**order)))

    def end(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """What a benchmark's ``main`` leaves: the names of its documents, and what stands in them."""
    monkeypatch.setattr(race, "Process", InThisProcess)
    for timed in (train_step, vision_step):
        monkeypatch.setattr(timed, "TURN_SECONDS", 0.001)

    def call(main: Callable[..., Any], *arguments: str) -> dict[str, Any]:
        made = main(["--quick", "--threads", "1", "--out", str(tmp_path), *arguments])
        results = made if isinstance(made, list) else [made]
        documents = [json.loads((tmp_path / f"{result.benchmark}.json").read_text()) for result in results]
        whole = {key: [part for d in documents for part in d[key]] for key in ("tables", "ratios")}
        raw = {name: values for d in documents for name, values in d["raw"].items()}
        return {**whole, "raw": raw, "names": [d["benchmark"] for d in documents]}

    return call


def _table(document: dict[str, Any], title: str) -> list[dict[str, Any]]:
    found = next(t for t in document["tables"] if t["title"].startswith(title))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


PEERS = {"mla_moe": "transformers DeepSeek-V3", "mixtral": "transformers Mixtral"}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "peer"), PEERS.items())
def test_training_step_is_raced_and_recorded(run: Run, family: str, peer: str) -> None:
    document = run(train_step.main, "--families", family, "--only", "ours,transformers")
    rows = [row for row in _table(document, f"smoke · {family} · fp32") if "x-transformers" not in row["contender"]]
    assert document["names"] == [f"train_step_smoke_{family}"]
    raced = [(row["contender"].split()[0], row["settings"]) for row in rows]
    assert raced == [*itertools.product(("ours", "transformers"), ("best settings", "as it comes"))]
    assert all(row["tokens/s"] > 0 and row["peak memory, GB"] > 0 and row["of peak"] > 0 for row in rows)
    assert rows[0]["parameters"] == rows[2]["parameters"]
    assert rows[0]["first loss"] == rows[1]["first loss"]  # the same weights and tokens
    assert abs(rows[0]["first loss"] - rows[2]["first loss"]) < 0.2  # other weights, the same tokens
    equal = _table(document, "Equal outputs")
    assert [(row["family"], row["dtype"]) for row in equal] == [(family, "fp32")]
    assert 0 < equal[0]["difference of logits"] < 1e-5
    names = {ratio["name"] for ratio in document["ratios"]}
    assert f"smoke · {family} · fp32: ours ÷ {peer}, best settings" in names
    assert f"smoke · {family} · fp32: ours, best settings ÷ {peer}, as it comes" in names
    assert not any("litgpt" in name for name in names)


@pytest.mark.slow
def test_step_on_pictures_is_raced_and_its_parts_are_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"_whole": 4.0, "_see": 1.0, "_read": 2.0}
    for part, taken in seconds.items():  # each part runs; what it took is set, for clocks of busy machines tell nothing
        ran = getattr(vision_step.VisionStep, part)
        monkeypatch.setattr(vision_step.VisionStep, part, lambda one, ran=ran, taken=taken: bool(ran(one)) and taken)
    document = run(vision_step.main, "--only", "best settings")
    rows = _table(document, "smoke · fp32")
    assert document["names"] == ["vision_step_smoke"] and len(rows) == 2
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert {(row["step, ms"], row["seeing, ms"], row["reading, ms"]) for row in rows} == {(4000.0, 1000.0, 2000.0)}
    equal = _table(document, "Equal outputs")[0]
    assert 0 < equal["difference of embeddings"] < 1e-5
    names = {ratio["name"].partition(": ")[2] for ratio in document["ratios"]}
    what = "ours ÷ transformers SigLIP + DeepSeek-V2, best settings"
    fastest = "ours, best settings ÷ transformers SigLIP + DeepSeek-V2, best settings, the faster of each"
    assert names == {what, f"seeing, {what}", f"reading, {what}", f"memory of {what}", fastest}


def test_unequal_outputs_stop_the_race(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.BOUNDS, "fp32", (0.0, 0.0))
    with pytest.raises(peers.UnequalError, match="dense, fp32: logits differ"):
        run(train_step.main, "--families", "dense", "--only", "ours")


@pytest.mark.slow
def test_decoding_is_raced_and_its_cache_weighed(run: Run) -> None:
    document = run(decode.main, "--only", "transformers DeepSeek")
    rows = _table(document, "Decoding · smoke · fp32")
    assert {row["context × batch"] for row in rows} == {"16 × 1", "32 × 1", "16 × 2", "32 × 2"}
    assert {row["cache bytes a token"] for row in rows} == {2 * (16 + 8) * 4}  # layers × (C + R) × bytes, of both
    assert all(row["tokens/s"] > 0 for row in rows + _table(document, "Prefill"))
    off = {r["name"]: r["spread"]["median"] for r in document["ratios"] if "off" in r["name"]}
    assert [value for name, value in off.items() if "formula" in name] == [0.0] * 4
    assert all(value < 1e-5 for value in off.values())


@pytest.mark.slow
def test_a_long_prompt_is_read_into_both_caches_and_decoded_behind(run: Run) -> None:
    document = run(long_prompt.main)
    rows = _table(document, "Prefill · smoke")
    of_a_token = {"exact": 2 * (16 + 8) * 2, "6-bit": 2 * (12 + 6 + 2 * 2)}  # layers × bytes of C + R and scales
    assert {row["cache"]: row["cache, MB"] * 1e6 / 600 for row in rows} == pytest.approx(of_a_token)
    assert all(4 < row["nats a byte"] < 7 for row in rows)
    ratios = {ratio["name"].rpartition(": ")[2]: ratio["spread"]["median"] for ratio in document["ratios"]}
    assert 0 < abs(ratios["perplexity of 6-bit ÷ exact − 1"]) < 0.01
    assert 0 < ratios["difference of logits"] < 1e-5
    assert ratios["ours ÷ transformers DeepSeek-V3"] > 0


@pytest.mark.slow
def test_kernels_are_timed_and_recorded(run: Run) -> None:
    document = run(kernels.main, "--dtypes", "fp32")
    assert document["names"] == ["kernels_experts", "kernels_attention", "kernels_loss"]
    assert len(_table(document, "Experts · fp32")) == 1
    assert [row["way"] for row in _table(document, "Loss · fp32")] == ["ours", "logits held whole"]
    assert len(_table(document, "Attention · fp32")) == 4
    assert any(ratio["name"].startswith("experts: share") for ratio in document["ratios"])

    document = run(kernels.main, "--dtypes", "fp32", "--parts", "experts", "--only", "no such cell")
    assert document["names"] == ["kernels_experts"] and document["ratios"] == []


@pytest.mark.slow
def test_mixers_are_timed_beside_attention_and_a_reference(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = "def naive_chunk_{0}(q, k, v, g, beta, scale): return v * (q * k).sum(-1, keepdim=True) * scale, None\n"
    for folder in ("kda", "gated_delta_rule"):
        (tmp_path / f"fla/ops/{folder}").mkdir(parents=True)
        (tmp_path / f"fla/ops/{folder}/naive.py").write_text(plain.format(folder))

    class Installed:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(mixers, "distribution", lambda name: Installed())
    monkeypatch.setattr(mixers, "missing", lambda: None)
    document = run(mixers.main)
    rows = _table(document, "Forward and backward of a layer · fp32")
    referred = [f"{name}, fla's reference" for name in ("gated_delta", "kda")]
    assert {row["mixer"] for row in rows} == {*mixers.MIXERS, *referred}
    assert all(row["ms"] > 0 for row in rows)
    leads = {row["mixer"] for row in rows if row["its reference's time ÷ its"] is not None}
    assert leads == {"gated_delta", "kda"}
    assert {row["mixer"] for row in _table(document, "Decoding, µs a token · fp32")} == set(mixers.MIXERS)


@pytest.mark.slow
def test_gathered_keys_are_timed_against_all_scores_and_no_selector(run: Run) -> None:
    document = run(selectors.main)
    rows = _table(document, "Few of many keys · fp32")
    cells = {(row["attention"], row["work"]) for row in rows}
    assert cells == {(name, work) for name in selectors.ATTENTIONS for work in ("token", "prompt")}
    assert all(row[f"{way}, ms"] > 0 for row in rows for way in selectors.WAYS)
    assert len(document["ratios"]) == len(rows) == 6


def test_codes_are_timed_against_exact_and_dequantised_caches(run: Run) -> None:
    document = run(codes.main)
    rows = _table(document, "A step of attention · fp32")
    assert {row["attention"] for row in rows} == set(codes.ATTENTIONS)
    missing = {(row["attention"], way) for row in rows for way in codes.WAYS if not row[f"{way}, ms"]}
    assert missing == {("mla", "6 bits by torch")}  # which it does not take
    assert len(document["ratios"]) == 5 * len(rows) - 1


def test_growth_is_measured(run: Run) -> None:
    names = [ratio["name"].partition(": ")[2] for ratio in run(scaling.main)["ratios"]]
    assert len(names) == 4
    assert sum("linear" in name for name in names) == 2


def test_errors_from_a_line_and_from_a_level() -> None:
    assert line_error([1, 2, 4], [3.0, 5.0, 9.0]) == pytest.approx(0)
    assert line_error([0, 1, 2], [1.0, 1.0, 4.0]) == pytest.approx(1.0)  # the line is 0.5, 2, 3.5
    assert flat_error([1.0, 1.0]) == 0
    assert flat_error([0.8, 1.2]) == pytest.approx(0.2)


@pytest.mark.slow
def test_running_batch_compares_all_ways_on_equal_models(run: Run) -> None:
    document = run(running_batch.main)
    ways = [*running_batch.OURS, *running_batch.THEIRS]
    rows = [dict(zip(document["tables"][0]["columns"], row, strict=True)) for row in document["tables"][0]["rows"]]
    assert [row["way"] for row in rows] == ways
    assert all(row["tokens/s"] > 0 and row["other texts"] == 0 for row in rows)
    about = document["raw"]["about"]
    assert about["parameters"][0] == about["parameters"][1]  # an equal Llama


@pytest.mark.slow
def test_peers_are_counted_and_compared(run: Run) -> None:
    document = run(peers.main)
    sizes = _table(document, "Parameters, smoke")
    assert {row["family"] for row in sizes} == set(FAMILIES)
    assert all(row["remarks"].startswith("failed: ") or abs(row["÷ ours"] - 1) < peers.TOLERANCE for row in sizes)
    ours = {row["contender"] for row in sizes if not row["remarks"]}
    assert {name.split()[0] for name in ours} >= {"ours", "transformers"}
    equal = _table(document, "Equal outputs")
    assert {(row["family"], row["dtype"]) for row in equal} == {*itertools.product(FAMILIES, SHAPES["smoke"].dtypes)}
    assert all(0 < row["difference of logits"] <= row["bound"] for row in equal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "narrowed"),
    [("kernels", ["--dtypes", "fp32", "--parts", "loss"]), ("startup", ["--only", "refusal"])],
)
def test_command_runs_in_processes(
    name: str, narrowed: list[str], warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    """Of a race as little as shows that its processes start; the tests above run all of it in this one."""
    command = ["-m", f"benchmarks.{name}", "--quick", "--threads", "1", "--out", str(tmp_path), *narrowed]
    done = warm.run(*command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {file.suffix for file in tmp_path.iterdir()} >= {".json", ".md"}

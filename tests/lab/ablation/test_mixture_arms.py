"""Mixtures as arms: the loss of each source, and what was read of it, in the plan, the results and the report."""

import json

import pytest
import yaml

from blockwright.lab.ablation.__main__ import main
from tests.training.data.mixture import formats
from tests.training.data.mixture.formats import documents

ALSO = ["val/code/loss", "val/web/loss", "data/code/epochs"]
TOKENS = 5 * 2 * 32  # of a job: steps, rows and length


@pytest.fixture
def words(small, tmp_path):
    """A definition of two arms over random shards, and overrides under which a job takes a second."""
    for i, name in enumerate(("code", "web")):
        formats.npy(tmp_path / f"{name}.npy", documents(90, i))
    sources = ",".join(f"{name}:{{files:{tmp_path}/{name}.npy,val_tokens:300}}" for name in ("code", "web"))
    base = ["data=mixture", "data/tokenizer=bytes", f"data.sources={{{sources}}}"]
    late = "data.stages=[{shares:{code:0.2,web:0.8},batches:3},{shares:{code:0.8,web:0.2}}]"
    arms = {"even": "data.stages=[{shares:{code:0.5,web:0.5}}]", "late": late}
    definition = {
        "about": "code late",
        "base": base,
        "baseline": "even",
        "arms": arms,
        "also": ALSO,
        "seeds": 2,
        "tune": None,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(definition))
    quick = [each for each in small if not each.startswith(("data", "trainer", "callbacks.report"))]
    quick += ["data.sequence_length=32", "data.batch_size=2", "data.eval_windows=4", "callbacks.report.sample_tokens=0"]
    steps = ["trainer.max_steps=5", "trainer.val_check_interval=5", "trainer.log_every_n_steps=2"]
    return [str(tmp_path / "mine.yaml"), *quick, *steps, f"paths.log_dir={tmp_path}/logs"]


def folder_of(tmp_path):
    (folder,) = (tmp_path / "logs" / "ablation" / "mine").iterdir()
    return folder


@pytest.mark.slow
def test_they_are_in_results_and_report(words, forked_jobs, tmp_path, capfd):
    assert main(words) == 0, capfd.readouterr()
    folder = folder_of(tmp_path)
    for job, share in enumerate((0.5, 0.5, 0.44, 0.44)):
        metrics = json.loads((folder / str(job) / "results.json").read_text())["metrics"]
        assert metrics["data/code/tokens"] + metrics["data/web/tokens"] == TOKENS  # of every step, logged or not
        assert metrics["data/code/tokens"] == pytest.approx(share * TOKENS, abs=64)
        mean = (metrics["val/code/loss"] + metrics["val/web/loss"]) / 2
        assert metrics["val/loss"] == pytest.approx(mean, rel=1e-5)
    page = (folder / "report" / "index.html").read_text()
    assert all(name in page for name in ALSO)

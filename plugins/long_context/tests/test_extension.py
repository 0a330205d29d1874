"""The ablation of extensions: every arm starts from the weights of the arm that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockwright.lab.ablation import definition, planning
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.execute import execute
from blockwright.training.entry.preflight import preflight

EXTENDED = ("mha", "yarn untuned", "none pose", "longrope", "mla", "mla yarn")  # an arm of each kind


@pytest.mark.slow
def test_arms_of_the_extension_start_from_the_weights_of_the_arm_they_name(small: list[str], tmp_path: Path) -> None:
    plan = planning.make(definition.read("extend_context"))
    jobs = {job["arm"]: job for job in plan.jobs if job["seed"] == 0}
    assert {jobs[name]["after"] for name in ("linear", "yarn pose")} == {jobs["mha"]["job"]}
    assert jobs["mla none"]["after"] == jobs["mla"]["job"] and "after" not in jobs["mla"]
    quick = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "++trainer.limit_val_batches=1",
        "logger=none",
        "~callbacks.report",
    ]
    quick += [f"callbacks.long_context.{key}=1" for key in ("samples", "stretches")]
    quick += [o for o in small if o.startswith("paths.")]
    found = {}
    for name in EXTENDED:
        job = jobs[name]
        start = [f"init_from={tmp_path / str(job['after'])}"] if "after" in job else []
        config = compose_config([*job["overrides"], *quick, *start], output_dir=str(tmp_path / str(job["job"])))
        found[name] = execute(preflight(config))
    assert found["yarn untuned"]["val/loss"] != found["mha"]["val/loss"]
    for metrics in found.values():
        assert set(plan.definition.also) | {plan.definition.metric} <= set(metrics)

"""transformers' own tests of models and of generation, on compositions.

They are not in its wheel: ``TRANSFORMERS_CHECKOUT`` names a checkout of the installed version, with ``tests/``.
What they found is held by test_transformers.py too, which needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

VARIABLE = "TRANSFORMERS_CHECKOUT"
CASES = Path(__file__).with_name("transformers_cases.py")
NO_DRAFTS = "assisted decoding is refused: the caches do not forget the tokens of a rejected draft"
# Methods that fail, and why that is right.
EXPECTED = dict.fromkeys(
    (
        "test_assisted_decoding_matches_greedy_search_0_random",
        "test_assisted_decoding_matches_greedy_search_1_same",
        "test_assisted_decoding_sample",
    ),
    NO_DRAFTS,
)
EXPECTED["test_recurrent_layers_mask_padding_on_continued_forward"] = "its mask has padding inside a document: refused"
# Methods that must run: a mixin skips what a model does not declare.
MUST_RUN = (
    "test_cache_format",
    "test_generate_continue_from_cache",
    "test_generate_continue_from_inputs_embeds",
    "test_greedy_generate_dict_outputs_use_cache",
    "test_beam_search_generate_dict_outputs_use_cache",
    "test_left_padding_compatibility",
    "test_hidden_states_output",
    "test_training_gradient_checkpointing",
    "test_model_get_set_embeddings",
    "test_model_outputs_equivalence",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "windows", "mla_moe", "hybrid"])
def test_own_tests_of_transformers_pass(name: str, tmp_path: Path) -> None:
    checkout = os.environ.get(VARIABLE)
    if checkout is None:
        pytest.skip(f"set {VARIABLE} to a checkout of transformers, whose tests are not in its wheel")
    pytest.importorskip("parameterized", reason="transformers' tests need it: pip install parameterized")
    report = tmp_path / "report.xml"
    path = os.pathsep.join((checkout, str(CASES.parents[2])))
    alone = ("-c", os.devnull, "--rootdir", str(tmp_path), "--noconftest", "-p", "no:cacheprovider")
    where = ("--import-mode=importlib", "--junitxml", str(report), str(CASES), "-k", f"Test_{name}")
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *alone, *where]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failed = {c.get("name"): e.get("message") for c in cases for e in c if e.tag in ("failure", "error")}
    assert {n: m for n, m in failed.items() if n not in EXPECTED} == {}
    assert failed.keys() == EXPECTED.keys()
    skipped = {c.get("name"): e.get("message") for c in cases for e in c if e.tag == "skipped"}
    assert len(cases) > 150 and {n: skipped[n] for n in MUST_RUN if n in skipped} == {}
    assert {c.get("name") for c in cases} >= {*MUST_RUN}

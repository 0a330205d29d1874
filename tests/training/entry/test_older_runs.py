"""What older runs have left is taken as it is: their configuration, under names that have changed since."""

from __future__ import annotations

import pytest

from blockwright.renamed import MODULES, TRAINING, with_moved
from blockwright.training.configuration.instantiate import find_target

CLASSES = {
    "schedulers.constant": "Constant",
    "schedulers.warmup_cosine": "WarmupCosine",
    "schedulers.warmup_stable_decay": "WarmupStableDecay",
    "schedulers.warmup_step_decay": "WarmupStepDecay",
    "data.shakespeare": "Shakespeare",
    "data.standard_library": "StandardLibrary",
    "data.kernel_documentation": "KernelDocumentation",
    "data.sorting": "Sorting",
    "data.tokenizers.bytes": "Bytes",
    "data.tokenizers.chars": "Chars",
    "data.text": "TextFiles",
    "optimizers.hyperball": "Hyperball",
    "optimizers.head_muon": "HeadMuon",
    "optimizers.muon": "Muon",
    "optimizers.normuon": "NorMuon",
    "optimizers.soap": "SOAP",
    "callbacks.averaging": "Averaging",
    "callbacks.completions": "Completions",
    "callbacks.qk_clip": "QKClip",
    "callbacks.predictions": "Predictions",
    "callbacks.early_stopping": "EarlyStopping",
}


@pytest.mark.parametrize("module", MODULES)
def test_class_that_has_moved_is_found_where_a_node_names_it_and_nowhere_else(module: str) -> None:
    old = f"{TRAINING}{module}.{CLASSES[module]}"
    given = {"model": {"class_path": old, "init_args": {"text": old}}, "x": [{"_target_": old}], "y": ["z", None]}
    moved = with_moved(given)
    new = moved["model"]["class_path"]
    assert find_target(new, "x").__name__ == CLASSES[module]
    assert moved == {
        "model": {"class_path": new, "init_args": {"text": old}},
        "x": [{"_target_": new}],
        "y": given["y"],
    }
    assert with_moved({"class_path": new, "_target_": 3}) == {"class_path": new, "_target_": 3}

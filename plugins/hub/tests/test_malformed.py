"""A checkpoint that is not whole, or not honest, is refused at its path; nothing of it runs, and nothing is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockwright.blocks.checkpoint.shards import all_finite, write_shards
from blockwright.plugins.hub import hf_export, hf_import
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError
from tests.faults import test_hostile as hostile
from tests.faults.test_hostile import Runs, Watch, at, refused

watch, warm = hostile.watch, hostile.warm
NORM, UP, DOWN = "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"
KEY, HEAD = "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def bases(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A Llama in one file, another in several shards, and others."""
    found = {name: checkpoint(name) for name in ("llama", "llama tied biased", "gpt_oss", "qwen3_moe")}
    found["sharded"] = checkpoint("llama", max_shard_size="60KB")
    assert len(list(found["sharded"].glob("*.safetensors"))) > 2
    return found


@pytest.fixture
def single(bases: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(bases["llama"], tmp_path / "in")


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Rewrite the tensors of a file."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        edit(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def settings(**changed: Any) -> Spoil:
    """Rewrite keys of config.json."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changed
        (folder / "config.json").write_text(json.dumps(values))

    return spoil


def index(file: Any, whole: bool = False) -> Spoil:
    """Point a tensor elsewhere; ``whole``: and no other anywhere."""

    def spoil(folder: Path) -> None:
        place = folder / "model.safetensors.index.json"
        held = json.loads(place.read_text())
        others = {} if whole else held["weight_map"]
        held["weight_map"] = others | {NORM: file(held["weight_map"]) if callable(file) else file}
        place.write_text(json.dumps(held))

    return spoil


def pickled(name: str, zipped: bool) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if zipped:
            torch.save({"x": Runs()}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Runs()))

    return spoil


def cut(kept: int) -> Spoil:
    return lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:kept])


def lying(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def other_tool(folder: Path) -> None:
    """Of a quantisation that is named before its dtypes."""
    settings(quantization_config={"quant_method": "gptq", "bits": 4})(folder)
    name = "model.layers.0.mlp.up_proj.qweight"
    tensors(lambda t: t.update({name: torch.zeros(4, 4, dtype=torch.int32)}))(folder)


def own(**composition: Any) -> Spoil:
    return settings(model_type="blockwright", composition=composition)


OUTSIDE = ("../secret.safetensors", "..", "/etc/secret.safetensors", "sub/x.safetensors", "pytorch_model.bin")
ROWS: list[tuple[str, str, Spoil]] = [  # what is named, which checkpoint, what is done to it
    ("model-00002", "sharded", lambda f: sorted(f.glob("*.safetensors"))[1].unlink()),
    ("index", "sharded", lambda f: (f / "model.safetensors.index.json").unlink()),
    *(("model.safetensors", "llama", cut(kept)) for kept in (0, 3000, -1)),
    ("model.safetensors", "llama", lying),
    (KEY, "llama", tensors(lambda t: t.update({KEY: t[KEY][:-1].clone()}))),
    (UP, "llama", tensors(lambda t: t.pop(UP))),
    ("adapter.weight", "llama", tensors(lambda t: t.update({"adapter.weight": torch.ones(3)}))),
    *((DOWN, "llama", tensors(lambda t, v=v: t[DOWN].view(-1)[7].fill_(v))) for v in (float("nan"), float("inf"))),
    (HEAD, "llama tied biased", tensors(lambda t: t.update({HEAD: t["model.embed_tokens.weight"] + 1}))),
    (HEAD, "llama tied biased", tensors(lambda t: t.update({HEAD: t["model.embed_tokens.weight"][:3].clone()}))),
    (NORM, "sharded", index(lambda held: next(f for f in sorted(held.values()) if f != held[NORM]))),
    *(("index.json: weight_map", "sharded", index(place)) for place in OUTSIDE),
    *((".safetensors", "sharded", index(f"{name}.safetensors", whole=True)) for name in ("x" * 300, "\0")),
    *(("pickle", "llama", pickled(n, z)) for n in ("model.safetensors", "pytorch_model.bin") for z in (True, False)),
    *(("model_type", "llama", settings(model_type=value)) for value in ("llamma", None, 3)),
    ("model_type", "llama", settings(model_type="x", auto_map={"A": "evil.py"})),
    *(
        ("config.json", "llama", lambda f, text=text: (f / "config.json").write_text(text))
        for text in ("", "{", "[1, 2]", "\x00", "[" * 100_000, '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    ),
    ("num_hidden_layers", "gpt_oss", settings(num_hidden_layers=10**12, layer_types=None)),
    ("layer_types", "qwen3_moe", settings(layer_types=7)),
    ("composition.n_layers", "llama", own(n_layers=10**12)),
    ("composition.mtp.depth", "llama", own(mtp={"depth": 10**12})),
    ("_target_", "llama", own(**at("ffn._target_", "os.system"))),
    ("quantization_config.quant_method", "llama", other_tool),
]
ROPE: dict[str, Any] = {"rope_theta": 1e4}
LOST: list[tuple[str, Any]] = [  # keys of config.json whose value would be lost
    ("rope_parameters.rope_type", {**ROPE, "rope_type": "longrope"}),
    ("rope_parameters.short_factor", {**ROPE, "rope_type": "default", "short_factor": [1.0]}),
    ("rope_parameters.factor", {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 32}),
    ("rope_parameters.low_freq_factor", {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
    ("rope_parameters.partial_rotary_factor", {**ROPE, "partial_rotary_factor": 0.5}),
    *(("rope_parameters.rope_theta", {"rope_theta": value}) for value in (float("inf"), 10**400)),
    ("rope_scaling.rope_theta", {"rope_theta": 7.0}),  # beside rope_parameters with another
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("attention_bias", "yes"),
    *(("num_hidden_layers", value) for value in ("four", 10**9, True)),
    *(("rms_norm_eps", value) for value in ("small", 10**400, float("nan"), -1.0)),
    ("sliding_window", 7),
    ("a_setting_of_the_future", {"x": 1}),
    *(("quantization_config.quant_method", value) for value in ({"quant_method": "gptq"}, {"load_in_4bit": True})),
    ("quantization_config", "mxfp4"),
    ("quantization_config.weight_block_size", {"quant_method": "fp8", "weight_block_size": [0, 128]}),
]
ROWS += [(f"config.json: {key}", "llama", settings(**{key.split(".")[0]: value})) for key, value in LOST]


def test_damaged_folder_is_refused(bases: dict[str, Path], watch: Watch, tmp_path: Path) -> None:
    for number, (named, base, spoil) in enumerate(ROWS):
        folder = shutil.copytree(bases[base], tmp_path / str(number))
        spoil(folder)
        watch.inside = tmp_path
        error = refused(lambda folder=folder: import_folder(folder, tmp_path / "out"), watch, tmp_path)
        assert named in str(error), (number, str(error))


def test_what_is_no_folder_is_refused_by_the_command(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One door for all of the above: an exit code, a message, and nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("one.safetensors").touch()
    Path("empty").mkdir()
    (single / "config.json").unlink()
    before = sorted(tmp_path.iterdir())
    for name in ("org/model-8b", "model.gguf", "one.safetensors", "empty", "in"):
        assert hf_import.main([name, "out"]) == 64
        said = capsys.readouterr().err
        assert said.startswith("error: ") and name in said and "remedy:" in said
    assert sorted(tmp_path.iterdir()) == before
    for path in (tmp_path / "nowhere", tmp_path):
        assert hf_export.main([str(path), "hf"]) == 64
        assert capsys.readouterr().err.startswith(f"error: RUN = {path}\n") and not Path("hf").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_every_part_of_a_tensor_is_seen_to_be_finite(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockwright.blocks.checkpoint.shards.PART", 4)
    for at_ in (0, 8, 9):
        tensor = torch.zeros(2, 5)
        assert all_finite(tensor.to(dtype))
        tensor.view(-1)[at_] = float("nan")
        assert not all_finite(tensor.to(dtype)) and not all_finite(tensor.T)


def test_what_repeats_or_says_the_same_in_old_keys_is_read(
    bases: dict[str, Path], single: Path, tmp_path: Path
) -> None:
    tied = shutil.copytree(bases["llama tied biased"], tmp_path / "tied")
    tensors(lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))(tied)
    import_folder(tied, tmp_path / "same")
    import_folder(single, tmp_path / "new")
    values = json.loads((single / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    old = {**values, "rope_theta": theta, "rope_scaling": None, "torch_dtype": values.pop("dtype")}
    (single / "config.json").write_text(json.dumps(old))
    import_folder(single, tmp_path / "old")
    assert (tmp_path / "old/model.yaml").read_text() == (tmp_path / "new/model.yaml").read_text()


def test_destination_in_use_is_left_alone_and_an_interrupted_writing_leaves_nothing(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError):
        import_folder(single, tmp_path / "used")
    assert [file.read_text() for file in (tmp_path / "used").iterdir()] == ["mine"]
    before = sorted(tmp_path.iterdir())

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises((ConfigError, OSError), match="No space left on device"):
        import_folder(single, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_number_that_the_dtype_asked_for_cannot_hold_is_refused(single: Path, tmp_path: Path) -> None:
    tensors(lambda t: t[NORM].fill_(1e6))(single)
    import_folder(single, tmp_path / "ours")
    for main, source in ((hf_import.main, single), (hf_export.main, tmp_path / "ours")):
        assert main([str(source), str(tmp_path / "half"), "--dtype", "float16"]) == 64
        assert not (tmp_path / "half").exists()


def test_exporting_an_untrusted_composition_or_without_safetensors_is_refused(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_folder(single, tmp_path / "ours")
    (tmp_path / "ours" / "model.yaml").write_text("attention: {_target_: os.system}")
    with pytest.raises(ConfigError, match="_target_"):
        export_folder(tmp_path / "ours", tmp_path / "hf")
    for name in [m for m in sys.modules if m.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"blockwright\[hf\]"):
        write_shards(tmp_path, {}, 10)
    assert "hf" not in os.listdir(tmp_path)

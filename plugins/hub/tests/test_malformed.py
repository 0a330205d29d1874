"""A checkpoint that is not whole, or not honest, is refused in one message; nothing is written and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockwright.blocks.checkpoint.shards import all_finite
from blockwright.plugins.hub import hf_export, hf_import
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError


@pytest.fixture
def sharded(checkpoint: Callable[..., Path]) -> Path:
    """A Llama in several shards."""
    folder = checkpoint("llama", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def single(checkpoint: Callable[..., Path]) -> Path:
    """A Llama in one file."""
    return checkpoint("llama")


def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the command line says; and that it left nothing behind."""
    before = sorted(tmp_path.iterdir())
    assert hf_import.main([str(folder), str(tmp_path / "out"), *options]) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "rule:" in said and "remedy:" in said and "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == before
    return said


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the tensors of a file."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def settings(folder: Path, **changed: Any) -> None:
    """Rewrite keys of config.json."""
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps(values))


def test_missing_shard(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    said = refused(sharded, tmp_path, capsys)
    assert shard.name in said and "missing" in said


def test_missing_index(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert "the index of these shards is missing" in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize("kept", [0, 3000, -1])
def test_truncated_file(kept: int, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "cannot be read as safetensors" in refused(single, tmp_path, capsys)


def test_wrong_shape(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(single / "model.safetensors", lambda t: t.update({name: t[name][:-1].clone()}))
    said = refused(single, tmp_path, capsys)
    assert name in said and "(24, 42)" in said and "(23, 42)" in said


def test_missing_tensor(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(single / "model.safetensors", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    said = refused(single, tmp_path, capsys)
    assert "model.layers.2.mlp.up_proj.weight" in said and "missing" in said


def test_extra_tensor(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(single / "model.safetensors", lambda t: t.update({"model.layers.0.adapter.weight": torch.ones(3)}))
    said = refused(single, tmp_path, capsys)
    assert "model.layers.0.adapter.weight" in said and "is not a parameter of llama" in said


def test_tensor_that_the_index_promises_elsewhere(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = "model.norm.weight"
    first = next(f for f in sorted(index["weight_map"].values()) if f != index["weight_map"][name])
    index["weight_map"][name] = first
    file.write_text(json.dumps(index))
    assert name in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensor(value: float, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(single / "model.safetensors", lambda t: t["model.layers.3.mlp.down_proj.weight"].view(-1)[7].fill_(value))
    said = refused(single, tmp_path, capsys)
    assert "model.layers.3.mlp.down_proj.weight" in said and "not finite" in said


@pytest.mark.parametrize("model_type", ["llamma", None, 3])
def test_unknown_architecture(
    model_type: Any, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(single, model_type=model_type)
    said = refused(single, tmp_path, capsys)
    assert "config.json: model_type" in said and "mixtral" in said


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors", "..", "sub/x.safetensors"])
def test_index_that_points_out_of_the_folder(
    place: str, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"model.norm.weight": torch.ones(42)}, sharded.parent / "secret.safetensors")
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = place
    file.write_text(json.dumps(index))
    assert "points outside the checkpoint's folder" in refused(sharded, tmp_path, capsys)


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_in_place_of_safetensors_is_refused_and_runs_nothing(
    zipped: bool, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, ran = single / "model.safetensors", single / "ran"
    if zipped:
        torch.save({"x": Hostile(ran)}, file)
    else:
        file.write_bytes(pickle.dumps(Hostile(ran)))
    assert "is a pickle, despite its name" in refused(single, tmp_path, capsys)
    file.rename(single / "pytorch_model.bin")
    said = refused(single, tmp_path, capsys)
    assert "holds pickled weights only" in said and "Loading a pickle can run code" in said
    assert not ran.exists()


def test_index_that_names_a_pickle(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "pytorch_model.bin"
    file.write_text(json.dumps(index))
    assert "names a file that is not safetensors" in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", "[" * 100_000])
def test_config_that_is_no_json(text: str, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (single / "config.json").write_text(text)
    assert "config.json" in refused(single, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("org/model-8b", "Nothing is downloaded"),
        ("model.gguf", "Nothing is downloaded"),
        ("one.safetensors", "is one file"),
    ],
)
def test_what_is_no_folder(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.safetensors").touch()
    said = refused(Path(name), tmp_path, capsys)
    assert said.startswith(f"error: DIR = {name}\n") and says in said


def test_folder_without_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no such file" in refused(tmp_path / "empty", tmp_path, capsys)


LOST: list[tuple[str, Any]] = [
    ("rope_parameters.rope_type", {"rope_type": "longrope", "rope_theta": 1e4}),
    ("rope_parameters.short_factor", {"rope_type": "default", "rope_theta": 1e4, "short_factor": [1.0]}),
    ("rope_parameters.factor", {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32}),
    ("rope_parameters.low_freq_factor", {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
    ("rope_parameters.partial_rotary_factor", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("attention_bias", "yes"),
    ("num_hidden_layers", "four"),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", True),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", 10**400),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1.0),
    ("rope_parameters.rope_theta", {"rope_theta": float("inf")}),
    ("rope_parameters.rope_theta", {"rope_theta": 10**400}),
    ("rope_scaling.rope_theta", {"rope_theta": 7.0}),  # beside rope_parameters with another
    ("sliding_window", 7),
    ("a_setting_of_the_future", {"x": 1}),
    ("quantization_config.quant_method", {"quant_method": "gptq"}),
    ("quantization_config.quant_method", {"load_in_4bit": True}),
    ("quantization_config", "mxfp4"),
    ("quantization_config.weight_block_size", {"quant_method": "fp8", "weight_block_size": [0, 128]}),
]


def test_setting_that_would_be_lost_is_refused_by_name(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = single / "config.json"
    plain = file.read_text()
    for key, value in LOST:
        settings(single, **{key.split(".")[0]: value})
        assert f"config.json: {key} = " in refused(single, tmp_path, capsys), (key, value)
        file.write_text(plain)


def test_quantisation_of_another_tool_is_named_before_its_dtypes(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings(single, quantization_config={"quant_method": "gptq", "bits": 4})
    name = "model.layers.0.mlp.up_proj.qweight"
    change(single / "model.safetensors", lambda t: t.update({name: torch.zeros(4, 4, dtype=torch.int32)}))
    assert "quantization_config.quant_method = gptq" in refused(single, tmp_path, capsys)


@pytest.mark.parametrize("at", [0, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_every_part_of_a_tensor_is_seen_to_be_finite(
    at: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockwright.blocks.checkpoint.shards.PART", 4)
    tensor = torch.zeros(2, 5)
    assert all_finite(tensor.to(dtype))
    tensor.view(-1)[at] = float("nan")
    assert not all_finite(tensor.to(dtype)) and not all_finite(tensor.T)


def test_head_beside_a_tied_embedding_must_repeat_it(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = checkpoint("llama tied biased"), "lm_head.weight"
    change(folder / "model.safetensors", lambda t: t.update({name: t["model.embed_tokens.weight"].clone()}))
    import_folder(folder, tmp_path / "same")
    capsys.readouterr()
    for other in (lambda w: w + 1, lambda w: w[:3].clone()):
        change(folder / "model.safetensors", lambda t, other=other: t.update({name: other(t[name])}))
        assert name in refused(folder, tmp_path, capsys)


def test_index_of_names_that_no_file_can_have(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sharded / "model.safetensors.index.json"
    for name in ("x" * 5000, "\0"):
        file.write_text(json.dumps({"weight_map": {"model.norm.weight": f"{name}.safetensors"}}))
        assert "this shard is missing" in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("gpt_oss", "num_hidden_layers", 10**12), ("qwen3_moe", "layer_types", 7)]
)
def test_lists_of_layers_are_checked_before_they_are_gone_through(
    name: str, key: str, value: int, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(name)
    settings(folder, **{key: value, **({} if key == "layer_types" else {"layer_types": None})})
    capsys.readouterr()
    assert f"config.json: {key} = {value}" in refused(folder, tmp_path, capsys)


def test_depth_of_our_own_composition_is_checked_too(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for composition, key in (({"n_layers": 10**12}, "n_layers"), ({"mtp": {"depth": 10**12}}, "mtp.depth")):
        settings(single, model_type="blockwright", composition=composition)
        assert f"config.json: composition.{key} = 1000000000000" in refused(single, tmp_path, capsys)


def test_old_keys_mean_what_the_new_ones_do(single: Path, tmp_path: Path) -> None:
    import_folder(single, tmp_path / "new")
    values = json.loads((single / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    old = {**values, "rope_theta": theta, "rope_scaling": None, "torch_dtype": values.pop("dtype")}
    (single / "config.json").write_text(json.dumps(old))
    import_folder(single, tmp_path / "old")
    assert (tmp_path / "old/model.yaml").read_text() == (tmp_path / "new/model.yaml").read_text()


def test_destination_in_use_is_left_alone(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists already" in refused(single, tmp_path, capsys)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_interrupted_writing_leaves_nothing(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left on device" in refused(single, tmp_path, capsys)


@pytest.mark.parametrize("command", ["import", "export"])
def test_number_that_the_dtype_asked_for_cannot_hold(
    command: str, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(single / "model.safetensors", lambda t: t["model.norm.weight"].fill_(1e6))
    source = single
    if command == "export":
        import_folder(single, tmp_path / "ours")
        source = tmp_path / "ours"
    main = {"import": hf_import.main, "export": hf_export.main}[command]
    assert main([str(source), str(tmp_path / "half"), "--dtype", "float16"]) == 64
    said = capsys.readouterr().err
    assert "norm.weight" in said and "not finite in float16" in said and not (tmp_path / "half").exists()


def test_exporting_without_safetensors_names_the_extra(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockwright.blocks.checkpoint.shards import write_shards

    for name in [m for m in sys.modules if m.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"blockwright\[hf\]"):
        write_shards(tmp_path, {}, 10)


def test_exporting_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        assert hf_export.main([str(path), str(tmp_path / "hf")]) == 64
        assert f"error: RUN = {path}\n" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_imported_folder_with_a_strange_composition_is_refused(single: Path, tmp_path: Path) -> None:
    from blockwright.plugins.hub.exporting import export_folder

    import_folder(single, tmp_path / "out")
    (tmp_path / "out" / "model.yaml").write_text("attention: {_target_: os.system}")
    with pytest.raises(ConfigError, match="_target_"):
        export_folder(tmp_path / "out", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()

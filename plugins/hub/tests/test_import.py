"""What importing does besides parity: memory, dtypes, files, keys that nothing reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import blockwright
from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub import hf_import
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError
from tests import test_printed_commands as commands
from tests.test_printed_commands import ODD

odd, printed, trains = commands.odd, commands.printed, commands.trains
MB = 2**20


def mixtral(folder: Path) -> tuple[int, int]:
    """Write one of 16 shards: bytes of the model, bytes of its largest shard."""
    D, F, E, V, n_layers = 256, 512, 8, 1024, 16
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": E, "num_experts_per_tok": 2}
    more = {"model_type": "mixtral", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "hidden_act": "silu"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**sizes, **heads, **more}))
    weight_map: dict[str, str] = {}
    largest = total = 0
    for i in range(n_layers):
        at = f"model.layers.{i}."
        tensors = {at + f"self_attn.{x}_proj.weight": torch.randn(D, D) for x in "qkvo"}
        tensors |= {at + f"{x}_layernorm.weight": torch.ones(D) for x in ("input", "post_attention")}
        tensors[at + "block_sparse_moe.gate.weight"] = torch.randn(E, D)
        for e in range(E):
            for w, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                tensors[at + f"block_sparse_moe.experts.{e}.{w}.weight"] = torch.randn(shape)
        if i == 0:
            tensors |= {"model.embed_tokens.weight": torch.randn(V, D), "model.norm.weight": torch.ones(D)}
            tensors["lm_head.weight"] = torch.randn(V, D)
        file = f"model-{i:05d}-of-{n_layers:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size = sum(t.nbytes for t in tensors.values())
        largest, total = max(largest, size), total + size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total, largest


# The kernel's own high-water mark of this program; getrusage's is inherited from the process that started it.
MEASURE = """
import sys
from pathlib import Path
import torch
from blockwright import registry
registry.load()
import safetensors.torch
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.exporting import export_folder
def memory(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
before = memory("VmRSS")
act = {"import": import_folder, "export": export_folder}[sys.argv[1]]
act(Path(sys.argv[2]), Path(sys.argv[3]), max_bytes=int(sys.argv[4]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_peaks_at_the_model_and_one_shard(environment: dict[str, str], tmp_path: Path) -> None:
    model, shard = mixtral(tmp_path / "in")
    for command, source, out in (("import", "in", "out"), ("export", "out", "hf")):
        arguments = [sys.executable, "-c", MEASURE, command, str(tmp_path / source), str(tmp_path / out), str(shard)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert model < int(done.stdout) < model + shard + 16 * MB, (command, int(done.stdout) / MB, model / MB)


def test_dtype_is_kept_or_the_one_asked_for_and_never_rounds_the_bias_of_a_choice(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("deepseek_v3", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: t.float() + 1e-5 for n, t in tensors.items() if n.endswith("e_score_correction_bias")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {t.dtype for t in tensors.values()}
    assert hf_import.main([str(folder), str(tmp_path / "kept")]) == 0
    assert hf_import.main([str(folder), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    kept, half = (load_file(tmp_path / x / "model.safetensors") for x in ("kept", "half"))
    assert {t.dtype for t in kept.values()} == {*stored, torch.int64} == {torch.bfloat16, torch.float32, torch.int64}
    assert kept["layers.1.ffn.gating.bias"].dtype == half["layers.1.ffn.gating.bias"].dtype == torch.float32
    assert {t.dtype for n, t in half.items() if "gating." not in n} == {torch.float16}
    export_folder(tmp_path / "kept", tmp_path / "hf")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama")


def changed(folder: Path, to: Path, **values: object) -> Path:
    """A checkpoint whose config.json says more."""
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps({**json.loads((to / "config.json").read_text()), **values}))
    return to


def test_files_of_the_tokenizer_travel_along(llama: Path, tmp_path: Path) -> None:
    marks = {"_model_name_or_path": "a/b", "unsloth_fixed": True, "_attn_implementation_autoset": True}
    folder = changed(llama, tmp_path / "in", **marks, temperature=0.6, suppress_tokens=[1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    (folder / "modeling_llama.py").write_text("raise SystemExit('run')")
    import_folder(folder, tmp_path / "out")
    export_folder(tmp_path / "out", tmp_path / "hf")
    for place in ("out", "hf"):
        assert json.loads((tmp_path / place / "tokenizer.json").read_text()) == {"of": "tokenizer.json"}
        assert not (tmp_path / place / "modeling_llama.py").exists()
    before, after = (json.loads((d / "config.json").read_text()) for d in (folder, tmp_path / "hf"))
    for key in ("bos_token_id", "eos_token_id", "architectures", "dtype", "vocab_size", "rope_parameters"):
        assert before[key] == after[key]
    tokens = torch.arange(8)[None]
    assert torch.equal(blockwright.load(str(tmp_path / "out"))(tokens), load(tmp_path / "out")(tokens))
    idle = json.loads((tmp_path / "out" / "origin.json").read_text())["idle"]  # keys that change nothing, and why
    assert {*marks, "temperature"} <= idle.keys() and not {"vocab_size", "rms_norm_eps"} & idle.keys()


def test_gpt2_of_old_without_prefix_and_with_masks_is_read(
    checkpoint: Callable[..., Path], tokens: Tensor, tmp_path: Path
) -> None:
    folder = checkpoint("gpt2")
    import_folder(folder, tmp_path / "new")
    file = folder / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}, file)
    import_folder(folder, tmp_path / "old")
    assert torch.equal(load(tmp_path / "old")(tokens), load(tmp_path / "new")(tokens))


def test_unknown_key_is_refused_until_it_is_ignored_by_name(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, given = changed(llama, tmp_path / "in", colour="blue", shade=3), ["--ignore", "colour", "--ignore", "shade"]
    assert hf_import.main([str(folder), str(tmp_path / "out")]) == 64
    assert "--ignore colour" in capsys.readouterr().err
    assert hf_import.main([str(folder), str(tmp_path / "out"), *given]) == 0
    assert json.loads((tmp_path / "out" / "origin.json").read_text())["ignored"] == {"colour": "blue", "shade": 3}
    values = json.loads((llama / "config.json").read_text())
    FAMILIES["llama"].composition({**values, "pruned_heads": {}, "add_cross_attention": False, "colour": None})
    for value in (False, 0, "", [], {}):  # of old files they are known; others are not
        with pytest.raises(ConfigError):
            FAMILIES["llama"].composition({**values, "gate": value})
    decides = changed(folder, tmp_path / "fp8", quantization_config={"quant_method": "fp8"})
    for options in (["--mtp"], *(["--ignore", key] for key in ("rms_norm_eps", "quantization_config", "color"))):
        assert hf_import.main([str(decides), str(tmp_path / "no"), *given, *options]) == 64
        assert f"error: {options[0]} = {(*options, True)[1]}\n" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_two_names_of_one_setting_must_agree(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(checkpoint("gpt_oss"), tmp_path / "in", experts_per_token=2, initial_context_length=4096)
    import_folder(folder, tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        import_folder(changed(folder, tmp_path / "other", experts_per_token=4), tmp_path / "no")
    assert caught.value.path == "config.json: experts_per_token"


def test_command_that_an_import_prints_trains_from_folders_of_any_name(
    odd: Path, tmp_path: Path, printed: Callable[..., list[str]], trains: Callable[..., dict[str, Any]]
) -> None:
    export_folder(odd / "run", tmp_path / "hf" / ODD)
    out = tmp_path / ODD
    assert trains(printed("import", str(tmp_path / "hf" / ODD), str(out)))["init_from"] == str(out)

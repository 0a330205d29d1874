"""One hostile folder, opened with every command: what it holds is data, and nothing of it runs."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hearing import opened

import blockwright
from blockwright import registry
from blockwright.blocks.checkpoint.manifest import dump_json
from blockwright.blocks.compose import compose
from blockwright.commands import command as known_command
from blockwright.commands import offers
from blockwright.lab.calibration import runs
from blockwright.lab.chat.conversation import ChatText, own_format
from blockwright.lab.own_text import own_text
from blockwright.lab.writer import Writer
from blockwright.registry import REFUSED, ConfigError, Node, Scope
from blockwright.registry.command import run_command
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("hostile_folder")  # its folder is slow to set up

SECRET, VARIABLE = "canary-of-the-environment", "CANARY_TOKEN"
ENVIRONMENT = f"${{oc.env:{VARIABLE}}}"
SECONDS = 20.0  # of the processor, for one command
CANARY = Path("ran")  # made by a payload
YOURS = "credentials"  # a file beside the folder, which the folder names wherever a setting is a path

# Command → its arguments, where FOLDER is the folder. A command that is not here is tried with those of ``ANY`` alone.
FORMS: dict[str, list[str]] = {
    "describe": ["model=FOLDER", "model=FOLDER/model.yaml", "model=file model.file=FOLDER/model.yaml"],
    "diff": ["FOLDER tiny", "FOLDER FOLDER/checkpoints/last.ckpt", "tiny FOLDER/model.yaml", "FOLDER FOLDER --json"],
    "draw": ["FOLDER --out FOLDER/picture.svg", "FOLDER/model.yaml", "file model.file=FOLDER/model.yaml"],
    "plan": ["model=file model.file=FOLDER/model.yaml gpus=8 gpu=h100"],
    "match": ["model=file model.file=FOLDER/model.yaml"],
    "throughput": ["model=file model.file=FOLDER/model.yaml memory=1MB context=16 repeats=1"],
    "ablate": ["FOLDER/ablation.yaml --plan-only"],
    "ladder": ["FOLDER/ablation.yaml --plan-only", "FOLDER"],
    "transfer": ["FOLDER", "model=file model.file=FOLDER/model.yaml base=16 to=32"],
    "coordinates": ["model=file model.file=FOLDER/model.yaml"],
    "calibrate": ["paths.log_dir=FOLDER/FILE --only renamed"],
    "sweep": [f"{action} FOLDER" for action in ("status", "status --json", "stop")],
    "kubernetes": [f"{action} FOLDER" for action in ("status", "logs", "stop")],
    "report": ["FOLDER", "FOLDER --metric val/loss"],
    "verdict": ["FOLDER", "FOLDER --json"],
    "surgery": ["FOLDER model/attention=mla --ledger", "FOLDER model/attention=mla"],
    "generate": ["FOLDER --prompt It --max-new-tokens 2 --device cpu"],
    "chat": [f"{folder} --max-new-tokens 2 --device cpu" for folder in ("FOLDER", "FOLDER --format plain")],
    "skills": ["FOLDER --samples 1", "FOLDER --skill recall --difficulty 2"],
    "cache-loss": ["FOLDER --windows 1", "FOLDER --windows 1 --text FOLDER/huge.txt --text FOLDER/pipe"],
    "evaluate": [
        "FOLDER --suite needle --lengths 32 --samples 1", "FOLDER --task FOLDER/model.yaml", "FOLDER --task task.yaml",
    ],
    "import": ["FOLDER OUT", "FOLDER/model.gguf OUT"],
    "export": [
        "FOLDER OUT", "FOLDER OUT --adapter", "FOLDER OUT --to megatron-bridge gpus=8 gpu=h100",
        "FOLDER OUT --to automodel gpus=8 gpu=h100",
    ],
    "consolidate": ["FOLDER OUT.ckpt"],
    "serve": ["FOLDER --port 0 --device cpu", "FOLDER --port 0 --chat jinja"],
    "data": ["data=mixture data/tokenizer=bytes data.sources={web:{files:FOLDER/pickle.npy}}"],
    "tokenise": ["FOLDER OUT --tokenizer bytes", "FOLDER/text.txt OUT --tokenizer FOLDER/tokenizer.json"],
    "blocks": [],
    "check": [],
}  # fmt: skip
ANY = ("FOLDER", "FOLDER OUT", "FOLDER FOLDER", "model=FOLDER", "init_from=FOLDER", "FOLDER/checkpoints/last.ckpt")
# Forms tried in the usual suite, where each composes with Hydra.
QUICK = {"describe": 1, "diff": 1, "draw": 1, "export": 3, "surgery": 1}
SMALL = {"coordinates": " widths=64,128 seeds=1 steps=1"}  # it trains what init_from is put to
# Training is a program; studio serves until it is ended, and its own tests have hostile folders; the others open none.
SUBCOMMANDS = [name for name in offers() if name not in ("train", "again", "studio", "schema", "new")]
WORST = "data that is a pickle"


def naming(file: Path) -> dict[str, Any]:
    """Settings of a run that name a file in every parameter that a schema marks as a path."""
    found: dict[str, Any] = {}
    for family in registry.families():
        for name in registry.names(family.kind):
            places = [p.name for p in registry.lookup(family.kind, name).schema.parameters.values() if p.place]
            if places:
                *around, last = [name] if family.root == registry.SETTINGS else family.path.split(".")
                node = found
                for key in around:
                    node = node.setdefault(key, {})
                children = {k: v for k, v in node.get(last, {}).items() if isinstance(v, dict)}
                node[last] = {"name": name, **dict.fromkeys(places, str(file)), **children}
    return found


class Runs:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY.absolute()}",)


def call(name: str = "numpy.load", **arguments: Any) -> dict[str, Any]:
    """A node that unpickles; Hydra itself refuses os.system and its like."""
    file = str(Path("folder", "pickle.npy").absolute())
    return {"_target_": name, **(arguments or {"file": file, "allow_pickle": True})}


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def text_of(folder: Path) -> dict[str, Any]:
    return {"_target_": "blockwright.training.data.corpus.TextFiles", "files": str(folder / "text.txt")}


def data(folder: Path, **changes: Any) -> dict[str, Any]:
    """The node of a run's data, in which something is hostile."""
    node = {
        "name": "text",
        "corpus": text_of(folder),
        "sequence_length": 16,
    }
    return {**node, "batch_size": 2, "tokenizer": call(), "cache_dir": str(folder.parent / "elsewhere"), **changes}


def corpus(folder: Path, **changes: Any) -> dict[str, Any]:
    return data(folder, corpus={**text_of(folder), **changes})


# Name → the text of .hydra/config.yaml.
DATA: dict[str, Callable[[Path], Any]] = {
    "all is well but the tokenizer": data,
    "data that is a pickle": lambda f: call("numpy.load", file=f"{f}/pickle.npy", allow_pickle=True),
    "data that is a table": lambda f: call("pandas.read_pickle", filepath_or_buffer=f"{f}/pickle.npy"),
    "data by joblib": lambda f: call("joblib.load", filename=f"{f}/pickle.npy"),
    "data by builtins": lambda f: call("builtins.dict", a=call()),
    "data by a registered name's module": lambda f: call("blockwright.training.data.corpus.os.system"),
    "data that is a partial": lambda f: {**data(f), "_partial_": True, "_args_": [call()]},
    "corpus that is a command": lambda f: data(f, corpus=call()),
    "corpus that holds a command": lambda f: corpus(f, separator=call()),
    "corpus with arguments": lambda f: corpus(f, _args_=[call()]),
    "corpus of conversations": lambda f: corpus(f, _target_="blockwright.training.data.conversations.Conversations"),
    "setting that is a command": lambda f: data(f, seed=call(), documents=call()),
    "transform that is a command": lambda f: data(f, transforms={"a": call()}),
    "the environment as a file": lambda f: corpus(f, files=ENVIRONMENT),
    "the environment as text": lambda f: corpus(f, separator=ENVIRONMENT),
    "the environment decoded": lambda f: corpus(f, separator=f"${{oc.decode:{ENVIRONMENT}}}"),
    "a resolver of hydra": lambda f: corpus(f, separator="${hydra:runtime.cwd}"),
    "the environment in /proc": lambda f: corpus(f, files="/proc/self/environ"),
    "all in /proc": lambda f: corpus(f, files="/proc/**/environ"),
    "the whole disk": lambda f: corpus(f, files="/**/*.txt"),
    "circles of links": lambda f: corpus(f, files=f"{f}/circle/**/*.txt"),
    "a device": lambda f: corpus(f, files="/dev/zero"),
    "a pipe": lambda f: corpus(f, files=f"{f}/pipe"),
    "a terabyte": lambda f: corpus(f, files=f"{f}/huge.txt"),
    "windows beyond the model": lambda f: data(f, sequence_length=10**9),
    "batches beyond memory": lambda f: data(f, batch_size=10**12, eval_batch_size=10**12),
    "a bomb": lambda f: bomb(),
    "words that double": lambda f: "\n".join(
        ["s0: xxxxxxxxxx"] + [f"s{i}: '{f'${{s{i - 1}}}' * 10}'" for i in range(1, 40)]
        + [f"data: {json.dumps(corpus(f, separator='${s39}'))}"]
    ),
    "braces without end": lambda f: "a: '" + "${" * 40_000 + "'",
    "nesting without end": lambda f: "[" * 50_000,
    "no text": lambda f: "\0\xff",
    "no mapping": lambda f: "data: 3",
}  # fmt: skip


def write_settings(folder: Path, found: Any) -> None:
    text = found if isinstance(found, str) else yaml.safe_dump({"data": found, "seed": 0})
    (folder / ".hydra" / "config.yaml").write_bytes(text.encode("latin-1"))


@pytest.fixture(scope="module")
def hostile(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is a run, an imported model, a Hugging Face checkpoint, a sweep and an adapter, all hostile."""
    base = tmp_path_factory.mktemp("hostile")
    folder, before = base / "folder", Path.cwd()
    os.chdir(base)
    decoder = compose(tiny(vocab_size=257, n_layers=1), seed=3)
    for name in ("checkpoints", ".hydra", "0/.hydra", "0/checkpoints", "1/.hydra", "circle"):
        (folder / name).mkdir(parents=True)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
    yours = base / YOURS
    yours.write_text("aws_secret_access_key = abcdef")  # a fine template, too
    settings = naming(yours)
    parts |= {"configuration": settings, "TextDataModule": {"tokenizer": Bytes().to_json()}}
    parts |= {"reward_model": settings["data"]}
    (base / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "It"}], "answer": "t"}))
    (base / "task.yaml").write_text("{prompts: prompts.jsonl, reward: exact_match, samples: 1, max_new_tokens: 2}")
    torch.save(parts, folder / "checkpoints" / "last.ckpt")
    (folder / "checkpoints" / "other.ckpt").write_bytes(pickle.dumps(Runs()))
    for name in ("pickle.npy", "pytorch_model.bin", "adapter_model.bin", "model.gguf", "tokens.npz"):
        (folder / name).write_bytes(pickle.dumps(Runs()))
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(folder / "pipe")
    for name in ("a", "b"):
        (folder / "circle" / name).symlink_to(".")
    (folder / "report").symlink_to(base)
    (folder / "reading").symlink_to(base)
    (folder / "LICENSE").symlink_to("/proc/self/environ")
    (folder / "README.md").symlink_to("/proc/self/environ")
    dump_json(
        folder / "tokenizer_config.json", {"chat_template": "{{ ''.__class__.__mro__ }}", "eos_token": ENVIRONMENT}
    )
    (folder / "chat_template.jinja").symlink_to("/proc/self/environ")
    (folder / "tokenizer.json").write_text("[" * 100_000)
    dump_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": call()})
    dump_json(folder / "config.json", {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}, "x": call()})
    (folder / "ablation.yaml").write_text(yaml.safe_dump({"arms": {"a": [f"+x={ENVIRONMENT}"]}, "base": [str(call())]}))
    over = ["~optimizer", f"+optimizer={json.dumps(call()).replace(chr(34), '')}"]
    dump_yaml(folder / ".hydra" / "overrides.yaml", over)
    jobs = [{"job": n, "overrides": ["+x._target_=numpy.load", f"+x.command={ENVIRONMENT}"]} for n in (0, 1)]
    plan = {"kind": "grid", "metric": "val/loss", "direction": "minimize", "jobs": jobs, "command": ENVIRONMENT}
    dump_json(folder / "plan.json", {**plan, "workers": 10**6, "cwd": "/", "name": ENVIRONMENT})
    dump_json(folder / "0" / "results.json", {"status": "completed", "metrics": {"val/loss": 1.0}, "x": call()})
    (folder / "0" / "curves.json").write_text("[" * 900 + "]" * 900)
    (folder / "1" / "results.json").symlink_to("/proc/self/environ")
    os.mkfifo(folder / "1" / ".hydra" / "overrides.yaml")
    os.mkfifo(folder / "0" / "reading.json")
    (folder / "0" / ".hydra" / "overrides.yaml").write_text(bomb())
    (folder / "multirun.yaml").write_text(bomb())
    for name in ("optimization_results.yaml", "model.yaml"):
        (folder / name).write_text(f"attention: {{name: '{ENVIRONMENT}', _target_: os.system}}\n" + bomb())
    os.mkfifo(folder / ".lock")
    write_settings(folder, DATA[WORST](folder))
    yield folder
    os.chdir(before)


def dump_yaml(file: Path, values: Any) -> None:
    file.write_text(yaml.safe_dump(values))


@pytest.fixture(autouse=True)
def guarded(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment has a secret, and afterwards no payload has run, and no file has the secret."""
    monkeypatch.setenv(VARIABLE, SECRET)
    monkeypatch.setattr("sys.stdin", io.StringIO("It\n"))
    monkeypatch.setenv("PROJECT_ROOT", str(hostile.parent / "project"))
    # calibrate would train its own controls, which are not of the folder
    of_seed = {f"seed={seed}": 1 + seed / 10 for seed in range(100)}  # equal arms, of which each seed has a value
    found = lambda overrides: next(of_seed[word] for word in overrides if word in of_seed)  # noqa: E731
    monkeypatch.setattr(runs, "all_losses", lambda chosen, workers: ((each, found(each)) for each in chosen))
    monkeypatch.chdir(hostile.parent)
    before = set(hostile.parent.iterdir())
    yield
    ran = list(hostile.parent.rglob("ran"))
    for file in ran:
        file.unlink()
    assert not ran, "a payload ran"
    new = [path for path in hostile.parent.iterdir() if path not in before]
    assert not [path for path in new if path.name not in ("project", "OUT", "OUT.ckpt", "logs")], new
    written = [p for root in new for p in (root, *root.rglob("*")) if p.is_file() and p.stat().st_size < 2**24]
    assert not [p for p in written if SECRET.encode() in p.read_bytes()], "the environment was written"
    for path in new:
        subprocess.run(["rm", "-rf", str(path)], check=True)


def run(command: str, words: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    arguments = (words.replace("FOLDER", str(folder)) + SMALL.get(command, "")).split()
    said = io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), opened(folder.parent / YOURS) as found:
        try:
            code = run_command(known_command(command).run, arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    assert time.process_time() - start < SECONDS, said.getvalue()
    assert SECRET not in said.getvalue() and "Traceback" not in said.getvalue()
    assert not found, f"{command} {words} opened {found}"
    return code, said.getvalue()


@contextlib.contextmanager
def as_a_run(folder: Path) -> Iterator[None]:
    """Without its model.yaml, by which it would be an imported model."""
    aside = folder.parent / "model.yaml.aside"
    (folder / "model.yaml").rename(aside)
    try:
        yield
    finally:
        aside.rename(folder / "model.yaml")


def check_all(command: str, forms: Sequence[str], folder: Path) -> None:
    for words in dict.fromkeys(forms):
        code, said = run(command, words, folder)
        assert code in (0, REFUSED) or "usage: lm-eval" in said, f"{command} {words}: {code}\n{said}"


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_no_command_runs_anything_of_the_folder(command: str, hostile: Path) -> None:
    with as_a_run(hostile):
        check_all(command, [*FORMS.get(command, ())[: QUICK.get(command, 9)], "FOLDER"], hostile)


@pytest.mark.slow
@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_no_command_runs_anything_wherever_the_folder_is_named(command: str, hostile: Path) -> None:
    forms = [*FORMS.get(command, ()), *ANY]
    check_all(command, forms, hostile)
    with as_a_run(hostile):
        check_all(command, forms, hostile)


def test_link_to_itself_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("config.json")
    assert run("import", FORMS["import"][0], tmp_path)[0] == REFUSED


HARMLESS = ("all is well but the tokenizer", "transform that is a command", "data that is a partial")


@pytest.mark.parametrize("name", DATA)
def test_no_settings_of_data_build_anything(name: str, hostile: Path) -> None:
    write_settings(hostile, DATA[name](hostile))
    start = time.process_time()
    with as_a_run(hostile), contextlib.nullcontext() if name in HARMLESS else pytest.raises(ConfigError) as refused:
        assert len(own_text(hostile, "RUN").tokens("val"))
    assert time.process_time() - start < SECONDS
    if refused is not None:
        assert SECRET not in str(refused.value) and (
            "--text FILE" in refused.value.remedy or "data." in refused.value.path
        )
    write_settings(hostile, DATA[WORST](hostile))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["cache-loss", "evaluate", "surgery"])
def test_no_settings_of_data_run_anything_in_a_command(command: str, hostile: Path) -> None:
    # WORST is last, for the other tests find it; with evaluate, it alone
    for name in (WORST,) if command == "evaluate" else (*HARMLESS, "the environment in /proc", WORST):
        write_settings(hostile, DATA[name](hostile))
        with as_a_run(hostile):
            code, said = run(command, FORMS[command][0], hostile)
        assert (code == 0) == (name in HARMLESS), said


def talk(place: Path) -> ChatText:
    """A model's own format of conversations, as commands make it."""
    words = Writer.open(place).words
    return ChatText(own_format(place, words) or "plain", words)


def judge(place: Path) -> Any:
    """A reward that the one who trains names, of an untrusted run."""
    return registry.build(
        "reward", Node({"name": "reward_model", "run": str(place)}, "reward"), Scope({}, {}, own=True)
    )


@pytest.mark.parametrize("call", [blockwright.load, Writer.open, talk, judge])
def test_python_runs_nothing_either(call: Callable[[Path], Any], hostile: Path) -> None:
    for place in (hostile, hostile / "checkpoints" / "last.ckpt", hostile / "checkpoints" / "other.ckpt"):
        for around in (contextlib.nullcontext(), as_a_run(hostile)):
            with around, opened(hostile.parent / YOURS) as found, contextlib.suppress(ConfigError):
                call(place)
            assert not found


@pytest.mark.parametrize("name", ["text", "chat", "skills"])
def test_no_settings_of_a_folder_name_files(name: str, hostile: Path) -> None:
    node = {**naming(hostile.parent / YOURS)["data"], "name": name, "corpus": text_of(hostile), "sequence_length": 16}
    write_settings(hostile, {**node, "skill": node})
    with as_a_run(hostile), opened(hostile.parent / YOURS) as found:
        run("skills", FORMS["skills"][0], hostile)
        with contextlib.suppress(ConfigError):
            own_text(hostile, "RUN")
    assert not found
    write_settings(hostile, DATA[WORST](hostile))


def test_every_subcommand_is_tried() -> None:
    assert set(FORMS) >= set(SUBCOMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "import"])
def test_no_command_runs_anything_as_a_process(command: str, hostile: Path) -> None:
    words = (FORMS[command] or list(ANY))[0].replace("FOLDER", str(hostile)).split()
    root = Path(inspect.getfile(blockwright)).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "blockwright", command, *words],
        env=environment, cwd=hostile.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode in (0, REFUSED) and SECRET not in said and "Traceback" not in said, said

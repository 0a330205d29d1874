"""What this tree computes, to the last bit, for work that must change nothing: ``python -m tests.golden write FILE``.

``python -m tests.golden compare FILE`` computes it again and names what differs. A record holds for one machine and one
torch: another processor may sum in another order, so it is written on the machine that compares. Write it before a
restructuring, from the tree as it is; ``--only blocks presets`` takes a few sections.

=========== ============================================================================================================
names       every registered name, and each parameter of a block with its type and default
blocks      a small decoder around every block: parameters in their order, initial values, loss, gradients, packed rows,
            bf16, caches of 16, 8 and 4 bits with what they hold and take, padding, costs
attentions  the same for scored attentions with every position, selector and score, and with shared caches
presets     parameters in their order, configuration, FLOPs, bytes of caches; on the meta device
settings    what each preset and each experiment composes to, and the options of each command
generation  the tokens that are sampled
runs        the figures of short trainings, of each optimizer and schedule, with more than one source and precision
comparisons the verdict and the table of a sweep with known figures
=========== ============================================================================================================
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from blockwright import registry
from blockwright.blocks import cost
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.conformance.setting import Setting, shown
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import generate
from blockwright.registry import BlockError, ConfigError, presets
from blockwright.training.configuration.composing import compose_config

ROOT = Path(__file__).resolve().parent.parent
REFUSED = (BlockError, ConfigError, NotImplementedError)
Record = dict[str, Any]
Model = dict[str, Any]

# --- decoders ---------------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bits(*tensors: Tensor | None) -> str:
    """A hash of types, shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        whole = (tensor.to_dense() if tensor.is_sparse else tensor).detach().contiguous()
        found.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
        found.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
    return found.hexdigest()[:16]


def named(decoder: Decoder) -> str:
    """Names and shapes of parameters in their order, which optimizers' checkpoints number, and of buffers."""
    tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
    return digest(json.dumps([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors]))


def moved(decoder: Decoder) -> Decoder:
    """Gains and biases away from where they begin, each by its own name."""
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim < 2:
                seeded = torch.Generator().manual_seed(int(digest(name), 16) % 2**62)
                parameter.add_(torch.randn(parameter.shape, generator=seeded, dtype=torch.float32), alpha=0.1)
    return decoder


def unless_refused(compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except REFUSED as error:
        return f"refused: {type(error).__name__}"


def computed(model: Model) -> Record:
    """All that a small decoder computes."""
    decoder = compose(model, seed=0)
    length = min(12, decoder.config["max_positions"])
    ids = torch.randint(decoder.config["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0))
    tokens, media = shown(decoder, ids)
    record: Record = {"parameters": named(decoder), "initial": bits(*decoder.state_dict().values())}
    moved(decoder)

    def step(**given: Any) -> str:
        torch.manual_seed(0)
        decoder.train().zero_grad()
        hidden, routings = decoder.hidden(tokens, media=media, **given)
        more = [x for r in routings if r is not None for x in r.losses.values()]
        loss = torch.stack([decoder.nll(hidden, tokens.roll(-1, 1)) / tokens.numel(), *more]).sum()
        loss.backward()
        return bits(loss, hidden, *(p.grad for p in decoder.parameters()))

    record["training"] = unless_refused(step)
    if not media:
        segments = torch.arange(length).div(5, rounding_mode="floor")[None].repeat(2, 1)
        segments[1, -2:] = -1
        positions = (torch.arange(length) % 5)[None].repeat(2, 1)
        record["packed"] = unless_refused(partial(step, segments=segments, positions=positions))
    decoder.eval().zero_grad()
    with torch.no_grad():
        torch.manual_seed(0)
        record["logits"] = bits(decoder(tokens, media=media))

        def decoded(wide: int | None, padding: Tensor | None) -> list[Any]:
            torch.manual_seed(0)
            caches = decoder.new_caches(2, length, wide, padding)
            parts = [decoder.last_hidden(part, caches) for part in ids.split([length - 5, 1, 1, 3], 1)]
            return [bits(*parts), sum(cache.nbytes for cache in caches)]

        for wide in (None, 8, 4):
            for name, padding in (("", None), (" padded", torch.tensor([3, 0]))):
                record[f"cache {wide or 'whole'}{name}"] = unless_refused(partial(decoded, wide, padding))
        torch.manual_seed(0)
        record["bf16"] = unless_refused(lambda: bits(decoder.to(torch.bfloat16)(tokens, media=media)))
    return record | costs(model, 32)


def costs(model: Model, length: int) -> Record:
    made = compose(model, device="meta")
    record: Record = {"counted": repr(cost.count_parameters(made))}
    record["flops"] = unless_refused(lambda: [float(each) for each in cost.flops_per_token(made, length)])
    for wide in (None, 8):
        taken = partial(cost.cache_bytes, made, length, torch.bfloat16, wide)
        record[f"cache bytes {wide or 16}"] = unless_refused(taken)
    return record


# --- sections ---------------------------------------------------------------------------------------------------------


def local(text: str) -> str:
    """Without the modules in which names of this project are: they may move."""
    return re.sub(r"\b(?:blockwright|blocks|training|lab|plugins|registry)(?:\.\w+)*\.(?=\w)", "", text)


def names() -> Iterator[tuple[str, Record]]:
    for kind in registry.kinds():
        for name in registry.names(kind):
            parameters = registry.lookup(kind, name).schema.parameters.values()
            yield f"{kind}/{name}", {p.name: local(f"{p.type} {p.child} {p.default!r}") for p in parameters}


def blocks() -> Iterator[tuple[str, Record]]:
    for kind in registry.kinds():
        for name in registry.names(kind):
            if issubclass(registry.lookup(kind, name).cls, torch.nn.Module):
                try:
                    model = Setting(kind, name).model()
                except ConfigError:
                    continue  # of no decoder: parts of training
                yield f"{kind}/{name}", {"model": model}


FRAME: Model = {
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 3,
    "max_positions": 8192,
    "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "position": {"name": "rope"},
    "ffn": {"name": "swiglu", "d_ff": 24},
    "norm": {"name": "rmsnorm"},
    "residual": {"name": "prenorm"},
    "init": {"std": 0.2, "depth_scaled": False},
}
GQA = FRAME["attention"]
MLA = {"name": "mla", "n_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MLA |= {"kv_norm": "rmsnorm", "q_norm": "rmsnorm"}
DSA = {"name": "dsa", "top_k": 4}
CSA = {"name": "csa", "every": 3, "n_heads": 2, "head_dim": 8, "top_k": 2}


def borrowing(attention: Model, *layers: int) -> Model:
    borrowed = [{"layers": layer, "attention": {"kv_source": "borrowed"}} for layer in layers]
    return {"attention": {**attention, "kv_source": "lent"}, "overrides": borrowed}


def attentions() -> Iterator[tuple[str, Record]]:
    changes: dict[str, Model] = {
        "mla with a rank of queries": {"attention": {**MLA, "q_lora_rank": 12}},
        "window": {"attention": {**GQA, "name": "sliding_window", "window": 5}},
        "mla that selects": {"attention": {**MLA, "selector": DSA}},
        "lent": borrowing(GQA, 1, 2),
        "lent by mla": borrowing(MLA, 2),
        "compressed": {"attention": {"name": "shared_kv", "n_heads": 4, "window": 6, "compressor": CSA}},
    }
    for name in registry.names("position"):
        changes[f"gqa, {name}"] = {"position": {"name": name}}
        changes[f"mla, {name}"] = {"attention": MLA, "position": {"name": name}}
    for kind, attention in (("selector", GQA), ("scores", {"name": "mha", "n_heads": 4})):
        for name in registry.names(kind):
            changes[f"{kind}, {name}"] = {"attention": {**attention, kind: {"name": name}}}
    for name, change in changes.items():
        yield name, {"model": {**FRAME, **change}}


def of_presets() -> Iterator[tuple[str, Record]]:
    for name in presets.names():
        model = preset(name, {} if presets.read(name).get("vocab_size") else {"vocab_size": 256})
        made = compose(model, device="meta")
        length = min(4096, made.config["max_positions"])
        yield name, {"config": digest(json.dumps(made.config)), "parameters": named(made), **costs(model, length)}


def options(command: str) -> list[str]:
    words = [sys.executable, "-m", "blockwright", *command.split(), "--help"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said)))


def settings() -> Iterator[tuple[str, Record]]:
    overrides = {f"model={name}": [f"model={name}"] for name in presets.names()}
    experiments = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    for group in ("experiment", "optimizer", "scheduler", "trainer", "task", "data", "callbacks", "logger"):
        found = sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
        overrides |= {f"{group}={name}": [f"{group}={name}"] for name in found}
    for name in experiments:
        overrides[f"{name}, model=tiny"] = [f"experiment={name}", "model=tiny"]
    for name, words in overrides.items():
        yield name, {"whole": unless_refused(partial(composed, words))}
    listed = subprocess.run(
        [sys.executable, "-m", "blockwright"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for command in re.findall(r"^ +(\w+) ", listed.stdout + listed.stderr, re.M):
        yield f"command {command}", {"options": options(command)}


def composed(words: list[str]) -> str:
    """Of keys in any order: that of the options of a block is no setting."""
    return digest(local(json.dumps(OmegaConf.to_container(compose_config(words), resolve=False), sort_keys=True)))


SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_k": 5},
)


def generation() -> Iterator[tuple[str, Record]]:
    for name, attention in {"gqa": GQA, "mla": MLA, "delta": "gated_delta"}.items():
        decoder = moved(compose({**FRAME, "attention": attention}, seed=0)).eval()
        prompt = torch.arange(9)[None]
        record = {str(given): generate(decoder, prompt, 12, **given).flatten().tolist() for given in SAMPLED}
        yield name, record


SHORT = "model.n_layers=2 model.d_model=32 model.max_positions=64 data=text data.sequence_length=32 data.batch_size=4"
SHORT += " data.eval_batch_size=8 data.eval_windows=4 trainer.max_steps=20 trainer.val_check_interval=10"
SHORT += " trainer.log_every_n_steps=1 callbacks.report.sample_tokens=8 logger=csv"
RUNS = {
    "usual": "",
    "two batches a step": "trainer.accumulate_grad_batches=2",
    "bf16": "trainer.precision=bf16-true",
    "mixed": "trainer.precision=bf16-mixed",
    "packed documents": "data.separator=document",
    "dropout": "model.dropout=0.1",
    "recomputed": "model.activation_checkpointing=true",
    "ema": "callbacks=ema",
    **{f"optimizer {name}": f"optimizer={name}" for name in ("adamw", "muon", "normuon", "soap")},
    **{f"schedule {name}": f"scheduler={name}" for name in ("constant", "warmup_stable_decay", "warmup_step_decay")},
    "gqa, dense": "model/attention=gqa model/ffn=swiglu",
    "gated delta": "model/attention=gated_delta",
    "sorting": "data=sorting data.batch_size=8",
    "width": "parametrisation=width",
}


def runs() -> Iterator[tuple[str, Record]]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(40)]
    text = "\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(60))
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            (corpus := Path(folder, "corpus.txt")).write_text(text)
            where = [f"hydra.run.dir={folder}/run", f"paths.data_dir={folder}/data", f"paths.log_dir={folder}"]
            own = [f"data.corpus.files={corpus}"] if "data=" not in changes else []
            usual = [w for w in SHORT.split() if w.partition("=")[0] not in changes]
            command = [sys.executable, "train.py", *usual, *own, *where, *changes.split()]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            rows: list[Any] = []
            for file in Path(folder).rglob("metrics.csv"):
                kept = re.compile(r"(train/(loss|lr|grad_norm|z_loss)|val/|test/|step$)")
                rows = [{k: v for k, v in row.items() if kept.match(k) and v} for row in csv.DictReader(file.open())]
            last = [row for row in rows if "train/loss" in row][-1:]
            refused = re.findall(r"rule: +(.*)", done.stderr)
            yield name, {"code": done.returncode, "rows": digest(json.dumps(rows)), "last": last, "refused": refused}


def comparisons() -> Iterator[tuple[str, Record]]:
    sys.path.insert(0, str(ROOT / "tests" / "lab"))
    from sweep_folder import ablation

    with tempfile.TemporaryDirectory() as folder:
        ablation(Path(folder, "arms"))
        words = [sys.executable, "-m", "blockwright", "report", f"{folder}/arms"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        yield "report", {"code": done.returncode, "said": digest(done.stdout.replace(folder, ""))}
        for file in sorted(Path(folder, "arms").glob("*.*")):
            if file.suffix in (".json", ".csv", ".md"):
                yield file.name, {"content": digest(file.read_text().replace(folder, ""))}


SECTIONS: Mapping[str, Callable[[], Iterator[tuple[str, Record]]]] = {
    "names": names,
    "blocks": blocks,
    "attentions": attentions,
    "presets": of_presets,
    "settings": settings,
    "generation": generation,
    "runs": runs,
    "comparisons": comparisons,
}


def made(only: list[str], before: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
    """Every record; a decoder's is of the model that was written before, if one was."""
    for section in only:
        listed = {f"{section}: {name}": record for name, record in SECTIONS[section]()}
        listed |= {key: {"model": r["model"]} for key, r in before.items() if key in listed and "model" in r}
        for key, record in listed.items():
            if "model" in record:
                found = unless_refused(partial(computed, record["model"]))
                record |= found if isinstance(found, dict) else {"whole": found}
            yield key, json.loads(json.dumps(record))


def difference(old: Record | None, new: Record | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    return "differs in " + ", ".join(name for name in {**old, **new} if old.get(name) != new.get(name))


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("what", choices=["write", "compare"])
    options.add_argument("file", type=Path)
    options.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    given = options.parse_args()
    torch.set_num_threads(1)
    here = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}
    held: dict[str, Any] = (
        json.loads(given.file.read_text()) if given.what == "compare" else {"made": here, "records": {}}
    )
    if held["made"] != here:
        print(f"written with {held['made']}, and this is {here}: bits may differ")
    before: dict[str, Record] = {key: r for key, r in held["records"].items() if key.split(":")[0] in given.only}
    now: dict[str, Record] = {}
    unlike = 0
    for key, record in made(given.only, before):
        now[key] = record
        if given.what == "compare" and before.get(key) != record:
            unlike += 1
            print(key, difference(before.get(key), record), flush=True)
    if given.what == "write":
        given.file.write_text(json.dumps({"made": here, "records": now}, indent=0) + "\n")
        print(f"{len(now)} records in {given.file}")
        return 0
    gone = [key for key in before if key not in now]
    print(*(f"{key} {difference(before[key], None)}" for key in gone), sep="\n")
    print(f"{len(before)} records, {unlike + len(gone)} differ")
    return bool(unlike or gone)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    raise SystemExit(main())

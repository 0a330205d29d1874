"""A published chat model, fine-tuned and exported: what leaves with it beside the weights."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.lab import consolidate
from blockwright.lab.writer import Writer
from blockwright.plugins.hub import exporting, hf_export, importing, lm_eval
from blockwright.plugins.hub.lm_eval import Blockwright
from blockwright.registry import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.data.tokenizers import companions
from blockwright.training.entry.preflight import preflight
from blockwright.training.parallel.strategy import save_folder

pytestmark = pytest.mark.xdist_group("fine_tuned")  # its fixture trains a run, once

END, BEGIN, TURN, UNKNOWN = 256, 257, 258, 259
WORDS = {"<|endoftext|>": END, "<s>": BEGIN, "<|turn|>": TURN, "<unk>": UNKNOWN}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [{"role": "user", "content": "To be?"}, {"role": "assistant", "content": "Or not."}]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral in bf16 with a chat template, two end tokens, and files that only mean something where it was made."""
    folder = tmp_path_factory.mktemp("published")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, **WORDS}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(list(WORDS))
    special = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<|turn|>", "unk_token": "<unk>"}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, **special, model_max_length=60, padding_side="left"
    )
    words.chat_template = {"default": TEMPLATE, "short": "{{ messages[0].content }}"}
    words.save_pretrained(folder)
    ids = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": TURN}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=264, **sizes, num_key_value_heads=2, max_position_embeddings=64, sliding_window=None, **ids
    )
    model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
    further = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    model.generation_config = transformers.GenerationConfig(**{**ids, "eos_token_id": [END, TURN]}, **further)
    model.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("You may.")
    (folder / "README.md").write_text("# 97 % on a benchmark")
    file = folder / "tokenizer_config.json"
    of_a_machine = {"auto_map": {"AutoTokenizer": ["words.Words", None]}, "name_or_path": "/home/another/model"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **of_a_machine}))
    return folder


@pytest.fixture(scope="module")
def imported(published: Path) -> Path:
    importing.import_folder(published, published / "out")
    return published / "out"


@pytest.fixture(scope="module")
def settings(small: list[str], imported: Path) -> list[str]:
    """The small run, from the imported model."""
    words = ["data/tokenizer=pretrained", f"data.tokenizer.file={imported / 'tokenizer.json'}"]
    return [*(o for o in small if "model." not in o), f"init_from={imported}", "model=pretrained", *words]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step: ``last.ckpt``, ``best.ckpt``, and ``sharded.ckpt``, a folder."""
    folder = tmp_path_factory.mktemp("run")
    plain = preflight(compose_config(settings, output_dir=str(folder)))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(**quiet, max_steps=1, limit_val_batches=0, accelerator="cpu", default_root_dir=folder)
    trainer.fit(parts.build("task", plain), parts.build("data", plain))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    shutil.copyfile(folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:  # the same checkpoint as many ranks write it, by a single rank
        save_folder(read_checkpoint(folder / "checkpoints" / "last.ckpt"), folder / "checkpoints" / "sharded.ckpt")
    finally:
        torch.distributed.destroy_process_group()
    return folder


@pytest.mark.parametrize("source", ["", "checkpoints/sharded.ckpt"])
def test_template_and_every_special_token_leave_with_a_fine_tuned_model(
    source: str, run: Path, published: Path, tmp_path: Path
) -> None:
    assert exporting.export_folder(run / source, tmp_path / "hf") == ("mistral", None)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (published, tmp_path / "hf"))
    for options in ({}, {"add_generation_prompt": True}, {"chat_template": "short"}):
        said = ours.apply_chat_template(TALK, tokenize=False, **options)
        assert said == theirs.apply_chat_template(TALK, tokenize=False, **options)
    for name in ("special_tokens_map", "padding_side", "model_max_length", "clean_up_tokenization_spaces"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config, generation = model.config, model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BEGIN, [END, TURN], TURN)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (BEGIN, [END, TURN], TURN)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)


def test_licence_leaves_with_it_and_what_was_true_elsewhere_does_not(run: Path, imported: Path, tmp_path: Path) -> None:
    for source, name, dtype in ((run, "trained", None), (run, "published", "original"), (imported, "imported", None)):
        options = ["--dtype", dtype] if dtype else []
        assert hf_export.main([str(source), str(tmp_path / name), *options]) == 0
        assert (tmp_path / name / "LICENSE.txt").read_text() == "You may."
        assert not (tmp_path / name / "README.md").exists()
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert not {"auto_map", "name_or_path"} & settings.keys() and settings["padding_side"] == "left"
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert values["dtype"] == values["torch_dtype"] == ("float32" if name == "trained" else "bfloat16")
        assert values["attention_dropout"] == 0.0  # idle here, kept for further training
    assert (imported / "README.md").is_file()


def test_generation_begins_and_ends_with_the_models_own_tokens(
    run: Path, imported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    continuations = lm_eval.Continuations

    def spy(decoder: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        seen.update(options, prompts=prompts)
        return continuations(decoder, prompts, *args, **options)

    monkeypatch.setattr(lm_eval, "Continuations", spy)
    for source in (run, imported):
        writer = Writer.open(source, device="cpu")
        assert writer.encode("a", bos=True)[0] == BEGIN and writer.words.stop_tokens() == {END, TURN}
        assert writer.words.stop_tokens(["<unk>", "Q:"]) == {END, TURN, UNKNOWN}  # no text spells a special token
        model = Blockwright(str(source), add_bos_token=True)
        model.generate_until([Instance("generate_until", {}, ("a", {"max_gen_toks": 2, "until": ["<unk>"]}), 0)])
        assert seen["prompts"][0][0] == model.prefix_token_id == BEGIN
        assert seen["stop_tokens"] == {END, TURN, UNKNOWN}
    folder = shutil.copytree(imported, tmp_path / "without")  # a token that begins a document
    for name in ("tokenizer_config.json", "generation_config.json", "origin.json"):
        values = json.loads((folder / name).read_text())
        (values.get("config", values)).pop("bos_token_id", None)
        values.pop("bos_token", None)
        (folder / name).write_text(json.dumps(values))
    with pytest.raises(ConfigError) as refused:
        Writer.open(folder, device="cpu").encode("a", bos=True)
    assert refused.value.path == "--bos"
    with pytest.raises(ConfigError) as refused:
        Blockwright(str(folder), add_bos_token=True)
    assert refused.value.path == "model_args.add_bos_token"


def test_consolidated_run_keeps_its_tokenizer_and_origin_and_the_printed_command_starts_from_it(
    run: Path, imported: Path, published: Path, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "an out"
    assert consolidate.main([str(run), str(out)]) == 0
    program, file, *words = shlex.split(capsys.readouterr().out.partition("Start from it: ")[2])
    origins = [json.loads((folder / "origin.json").read_text()) for folder in (out, imported)]
    assert origins[0] == origins[1] and Writer.open(out, device="cpu").words.ends == {END, TURN}
    exporting.export_folder(out, tmp_path / "hf")
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (published, tmp_path / "hf"))
    assert ours.chat_template == theirs.chat_template
    assert [program, file] == ["blockwright", "train"]
    given = [o for o in small if not o.startswith(("model.", "data/tokenizer", "data.tokenizer"))]
    preflight(compose_config([*given, *words], output_dir=str(tmp_path)))
    with pytest.raises(ConfigError) as refused:  # other ids
        preflight(compose_config([*given, *words[:2]], output_dir=str(tmp_path)))
    assert all(word in shlex.split(refused.value.remedy.partition(": ")[2].partition(";")[0]) for word in words[2:])


def test_resumed_run_keeps_the_origin_and_takes_another_template(
    run: Path, settings: list[str], tmp_path: Path
) -> None:
    last = run / "checkpoints" / "last.ckpt"
    plain = preflight(compose_config([*settings, f"ckpt_path={last}"], output_dir=str(tmp_path)))
    checkpoint, task, data = read_checkpoint(last), parts.build("task", plain), parts.build("data", plain)
    task.on_load_checkpoint(checkpoint)
    assert task.origin["model_type"] == "mistral"
    state = checkpoint["TextDataModule"]
    data.load_state_dict({**state, "tokenizer": {**state["tokenizer"], "companions": {}}})
    older = {k: v for k, v in state["tokenizer"].items() if k not in ("companions", "special")}
    data.load_state_dict({**state, "tokenizer": older})
    assert type(data.tokenizer).from_json(older).ends == {END}
    with pytest.raises(ConfigError):  # another vocabulary
        data.load_state_dict({**state, "tokenizer": {**state["tokenizer"], "eos": 3}})


STRANGE: list[tuple[str, Any]] = [
    ("companions", {"../../stolen.json": "{}"}),
    ("companions", {"additional_chat_templates/../x.jinja": ""}),
    ("companions", {"tokenizer_config.json": 5}),
    ("companions", {"tokenizer_config.json": "[" * 10**5}),
    ("companions", {"chat_template.jinja": "x" * (companions.MAX_BYTES + 1)}),
    ("special", {"bos": "x", "ends": [1], "pad": None, "unk": None}),
    ("special", [1]),
    ("origin", {"config": torch.zeros(1)}),
    ("origin", {"licences": {"../LICENSE": ""}}),
    ("origin", {"config": {"x": "y" * 2**20}}),
]


@pytest.mark.slow
def test_untrusted_checkpoint_writes_nothing_but_files_of_a_tokenizer(run: Path, tmp_path: Path) -> None:
    for part, value in STRANGE:
        checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
        (checkpoint if part == "origin" else checkpoint["TextDataModule"]["tokenizer"])[part] = value
        torch.save(checkpoint, tmp_path / "strange.ckpt")
        with pytest.raises(ConfigError):
            exporting.export_folder(tmp_path / "strange.ckpt", tmp_path / "hf")
        assert [file.name for file in tmp_path.iterdir()] == ["strange.ckpt"]

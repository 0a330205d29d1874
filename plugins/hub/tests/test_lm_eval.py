"""lm-evaluation-harness on our models, with data that lies here, against figures computed directly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import generate
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.hub import lm_eval as module
from blockwright.plugins.hub.lm_eval import Blockwright, main
from blockwright.registry import ConfigError
from blockwright.training.data.chat.formats import ChatML, encode
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("lm_eval")  # its fixture is slow to set up

QUESTIONS = [
    {"question": "What is black?", "choices": ["Night", "Snow at noon"], "answer": 0},
    {"question": "Who was it?", "choices": ["No one", "A", "Another one"], "answer": 2},
    {"question": "Two and two are", "choices": ["four", "five", "three and one"], "answer": 0},
    {"question": "é?", "choices": ["è", "ê"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def run(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose model is random but sharp."""
    folder = tmp_path_factory.mktemp("run")
    decoder = compose(tiny(vocab_size=257, max_positions=16, init={"std": 0.3, "depth_scaled": False}), seed=3)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
    (folder / "checkpoints").mkdir()
    torch.save({**parts, "TextDataModule": {"tokenizer": Bytes().to_json()}}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Blockwright:
    return Blockwright(str(run), batch_size=3, max_length=64)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks over a local file."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", file=file) + text)
    return tmp_path


def nats(decoder: Decoder, context: str, continuation: str) -> float:
    """Token by token, each with its own pass."""
    tokens = [*(context.encode() or [256]), *continuation.encode()]
    total = 0.0
    for i in range(len(tokens) - len(continuation.encode()), len(tokens)):
        total += float(decoder(torch.tensor([tokens[:i]]))[0, -1].log_softmax(-1)[tokens[i]].detach())
    return total


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, 0) for a in arguments]


@pytest.mark.slow
def test_figures_of_tasks_equal_a_direct_computation(
    model: Blockwright, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tasks / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["local_choice", "local_rolling"], task_manager=manager, bootstrap_iters=0
    )["results"]
    right = bits = size = 0.0
    for q in QUESTIONS:
        scores = [nats(model.decoder, q["question"], f" {choice}") for choice in q["choices"]]
        right += scores.index(max(scores)) == q["answer"]
        bits -= nats(model.decoder, "", q["question"]) / torch.log(torch.tensor(2.0)).item()
        size += len(q["question"].encode())
    assert 0 < right < len(QUESTIONS)
    assert found["local_choice"]["acc,none"] == right / len(QUESTIONS)
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)


def test_likelihoods_do_not_depend_on_what_they_are_batched_with(model: Blockwright) -> None:
    pairs = [("a", " bcd"), ("", "no context"), ("long context before it", "x"), ("blank behind ", "y"), ("é", "è")]
    found = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        moved = len(context) - len(context.rstrip())  # the harness moves a final blank behind
        expected = nats(model.decoder, context.rstrip(), " " * moved + continuation)
        assert value == pytest.approx(expected, abs=1e-4)


def test_short_text_is_rotated_beside_a_long_one_as_by_itself(
    model: Blockwright, tiny: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    position = {"name": "longrope", "original_positions": 8}
    longrope = compose(tiny(vocab_size=257, position=position, init={"std": 0.3, "depth_scaled": False}), seed=3)
    monkeypatch.setattr(model, "decoder", longrope.eval())
    pairs = [("a", " bcd"), ("long context before it", "x"), ("b", " cdefg")]
    together = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (value, _) in zip(pairs, together, strict=True):
        ((alone, _),) = model.loglikelihood(ask("loglikelihood", pair), disable_tqdm=True)
        assert value == pytest.approx(alone, abs=1e-4)


def test_text_longer_than_the_model_is_predicted_once_a_token(run: Path) -> None:
    short = Blockwright(str(run), max_length=8)
    text = "twenty-one characters"
    tokens = [256, *text.encode()]
    expected = 0.0
    for start in range(1, len(tokens), 8):  # windows of 8 predictions; the last has a full context
        end = min(start + 8, len(tokens))
        first = max(0, end - 1 - 8)
        logits = short.decoder(torch.tensor([tokens[first : end - 1]]))[0].log_softmax(-1).detach()
        expected += sum(float(logits[i - 1 - first, tokens[i]]) for i in range(start, end))
    [found] = short.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_ends_before_the_first_stop(
    model: Blockwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, words = "To be, or", Bytes()
    tokens: Tensor = generate(model.decoder, torch.tensor([words.encode(context).tolist()]), 20, temperature=0)[0]
    whole = words.decode(tokens[len(context) :].numpy())
    settings = [{"until": [], "max_gen_toks": 20}, {"until": [whole[5], whole[9]], "max_gen_toks": 20}]
    full, cut = model.generate_until(ask("generate_until", *((context, s) for s in settings)))
    assert full == whole
    assert cut == min(whole.split(whole[5])[0], whole.split(whole[9])[0], key=len)
    new = tokens[len(context) :].tolist()
    found = model._loglikelihood_tokens([(None, list(context.encode()), [t]) for t in (new[0], (new[0] + 1) % 128)])
    assert [greedy for _, greedy in found] == [True, False]
    monkeypatch.setattr(Bytes, "ends", frozenset({256, new[4]}))  # at every end token
    [text] = model.generate_until(ask("generate_until", (context, {"max_gen_toks": 20})))
    assert text == words.decode(new[: new.index(new[4])])


def test_generation_keeps_the_prompt_and_says_what_had_no_room(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of 16 positions, asked for 256 tokens, which is the harness's default."""
    seen: list[tuple[list[int], int]] = []
    monkeypatch.setattr(module, "Continuations", lambda _, rows, room, *a, **k: seen.append((rows[0], room)) or [])
    model = Blockwright(str(run))
    contexts = ["twelve bytes", "sixteen letters:", "longer than the sixteen positions", "", "a"]
    settings = [{}, {}, {}, {}, {"max_gen_toks": 3}]
    model.generate_until(ask("generate_until", *zip(contexts, settings, strict=True)))
    kept = [list(context.encode()[-15:]) or [256] for context in contexts]
    assert seen == list(zip(kept, [4, 1, 1, 15, 3], strict=True))
    [said] = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert "4 of 5" in said and "2 prompts" in said
    caplog.clear()
    model.generate_until(ask("generate_until", ("a", {"max_gen_toks": 3})))
    assert not [record for record in caplog.records if record.name == module.__name__]


def test_generation_takes_every_field_of_sampling_and_every_name_of_the_length(
    model: Blockwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    continuations = module.Continuations

    def spy(*args: Any, **options: Any) -> Any:
        seen[:] = args[2:4]
        return continuations(*args, **options)

    monkeypatch.setattr(module, "Continuations", spy)
    fields = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    assert fields.keys() == Sampling.__dataclass_fields__.keys()
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        model.generate_until(ask("generate_until", ("a", {**fields, name: 3})))
        assert seen == [3, Sampling(**fields)]
    model.generate_until(ask("generate_until", ("a", {**fields, "do_sample": False})))
    assert seen[1] == Sampling(**{**fields, "temperature": 0.0})


OPTIONS = {"batch_size": [0, -1, "x"], "max_length": [0, -1, "x"], "max_gen_toks": [-1], "dtype": ["float8"]}
OPTIONS |= {"device": ["foo"], "--model_args path": [5], "model_args.bogus": [1]}
OF_GENERATION: dict[str, list[Any]] = {"max_gen_toks": [-1], "max_tokens": [-1], "temperature": [-1], "min_p": [-1]}
OF_GENERATION |= {"top_k": [-1, 2.5], "until": [5, [None]], "top_p": [0, "most", True], "repetition_penalty": [0]}
OF_GENERATION |= {"do_sample": ["yes"], "num_beams": [4]}


def test_option_or_setting_that_cannot_be_is_refused_by_name(run: Path, model: Blockwright, tmp_path: Path) -> None:
    for name, value in ((name, value) for name, values in OPTIONS.items() for value in values):
        with pytest.raises(ConfigError) as refused:
            Blockwright.create_from_arg_obj({"path": str(run), name.rpartition(".")[2].rpartition(" ")[2]: value})
        assert refused.value.path == name, value
    for name, value in ((name, value) for name, values in OF_GENERATION.items() for value in values):
        with pytest.raises(ConfigError) as refused:
            model.generate_until(ask("generate_until", ("a", {"do_sample": True, name: value})))
        assert refused.value.path == f"generation_kwargs.{name}", value
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del content["TextDataModule"]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError):  # no tokenizer
        Blockwright(str(tmp_path / "x.ckpt"))


@pytest.fixture
def talker(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A folder with a tokenizer that has ChatML's special tokens."""
    words = {**{chr(c): c - 32 for c in range(32, 127)}, "Ċ": 95, "<|im_start|>": 96, "<|im_end|>": 97}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": w, "special": True, **plain} for w, i in words.items() if i > 95]
    engine = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}}
    decoder = compose(tiny(vocab_size=98, max_positions=64), seed=3)
    (tmp_path / "model.yaml").write_text(json.dumps(decoder.config))
    save_file(decoder.state_dict(), tmp_path / "model.safetensors")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**engine, "pre_tokenizer": level, "decoder": level}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return tmp_path


def test_conversation_is_encoded_as_in_training_and_users_write_no_special_token(talker: Path) -> None:
    model = Blockwright(str(talker), chat="chatml")
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "a<|im_end|>b\ue003<|im_start|>\ue003"}]
    text = model.apply_chat_template(said)
    plain = [said[0], {**said[1], "content": said[1]["content"].replace("\ue003", "")}]
    expected = encode(ChatML().open(plain), model.words)[0].tolist()
    assert model.tok_encode(text) == expected and expected.count(97) == 2 and expected.count(96) == 3
    answered = [*plain, {"role": "assistant", "content": "yes"}]
    whole = encode(ChatML().render(answered), model.words)[0].tolist()
    assert whole[: -len(model.tok_encode("\n")) - 1] == model.tok_encode(text + "yes")
    assert model.tok_encode(model.apply_chat_template(answered, add_generation_prompt=False)) == whole[:-2]


def test_answer_ends_where_the_format_ends_it_which_must_be_named(
    talker: Path, model: Blockwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking, seen = Blockwright(str(talker)), []
    names = {str(talking.chat_template(name)) for name in ("chatml", "plain")}
    assert len(names) == 2 and talking.chat_template(False) is None
    monkeypatch.setattr(module, "Continuations", lambda *a, stop_tokens, **_: seen.append(stop_tokens) or [])
    context = talking.apply_chat_template([{"role": "user", "content": "a"}])
    talking.generate_until(ask("generate_until", (context, {"until": []})))
    assert 97 in seen[0]
    with pytest.raises(ConfigError):
        model.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(ConfigError):  # it has no special tokens
        model.chat_template("chatml")


@pytest.mark.slow
def test_command_line_evaluates_a_run(run: Path, tasks: Path, environment: dict[str, str]) -> None:
    root = Path(__file__).resolve().parents[2]
    variables = {**environment, "HF_HOME": str(tasks / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "blockwright.plugins.hub.lm_eval", "--model_args", f"path={run},max_length=64"]
    options = ["--tasks", "local_choice", "--include_path", str(tasks), "--batch_size", "2"]
    done = subprocess.run([*command, *options], cwd=tasks, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "local_choice" in done.stdout, done.stderr[-2000:]


def test_command_line_refuses_a_run_that_is_not_there(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval"])  # which the harness reads
    options = ["--tasks", "local_choice", "--include_path", str(tasks), "--batch_size", "2"]
    with pytest.raises(SystemExit, match=r"^64$"):
        main(["--model_args", "path=/no where,max_length=64", *options])
    said = capsys.readouterr().err
    assert "error: --model_args path = /no where" in said and "Traceback" not in said

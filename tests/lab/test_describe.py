"""The cost card: published figures to the last digit, and what the command says."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cost import deepseek_moe_flops
from blockwright.blocks.kernels import timing
from blockwright.blocks.kernels.products import Choice, Faster
from blockwright.lab import card, describe
from blockwright.lab.card import Options, read
from blockwright.lab.describe import figures, main
from blockwright.lab.models import changes_model, load
from blockwright.registry import REFUSED, register
from blockwright.registry.command import run_command

pytestmark = pytest.mark.xdist_group("describe")  # its cards are made once

ROOT = Path(__file__).resolve().parent.parent.parent

# Numbers remembered a token; then total, active, active − embedding, active − embedding − head, attention, routed
# experts: counted on transformers' models and by closed forms. GPT-2's and Gemma's head is their embedding.
MODELS = {
    "deepseek_v2": (34560, 235741434880, 21375800320, 20851512320, 20327224320, 8953651200, 222717542400),
    "deepseek_v2_5": (None, 235741434880, 21375800320, 20851512320, 20327224320, 8953651200, 222717542400),
    "deepseek_v2_lite": (15552, 15706484224, 2661150208, 2451435008, 2241719808, 371602944, 14394851328),
    "deepseek_v3": (35136, 671026404352, 37552282624, 36625603584, 35698924544, 11413547008, 653908770816),
    "deepseek_67b": (194560, 67425001472, 67425001472, 66586140672, 65747279872, 14344519680, 0),
    "deepseek_7b": (245760, 6910365696, 6910365696, 6490935296, 6071504896, 2013265920, 0),
    "llama2_7b": (262144, 6738415616, 6738415616, 6607343616, 6476271616, 2147483648, 0),
    "llama2_13b": (409600, 13015864320, 13015864320, 12852024320, 12688184320, 4194304000, 0),
    "llama2_70b": (163840, 68976648192, 68976648192, 68714504192, 68452360192, 12079595520, 0),
    "mixtral_8x7b": (65536, 46702792704, 12879925248, 12748853248, 12617781248, 1342177280, 45097156608),
    "qwen3_30b_a3b": (49152, 30532122624, 3353032704, 3041867776, 2730702848, 905981952, 28991029248),
    "olmoe_1b_7b": (65536, 6919161856, 1282017280, 1178994688, 1075972096, 268500992, 6442450944),
    "gpt_oss_20b": (24576, 20914757184, 4187440704, 3608307264, 3029173824, 637203456, 19116933120),
    "deepseek_moe_16b": (114688, 16375728128, 2828650496, 2618935296, 2409220096, 469762048, 14948499456),
    "ablation_moe_mha": (110592, 15787866112, 2742532096, 2532816896, 2323101696, 452984832, 14394851328),
    "deepseek_vl2_tiny_language": (30720, 2934734080, 739605760, 574127360, 408648960, 78643200, 2422210560),
    "deepseek_vl2_small_language": (15552, 15706484224, 2661150208, 2451435008, 2241719808, 371602944, 14394851328),
    # the tower is 412,987,248, the projector 18,355,200, and there are two marks
    "deepseek_vl2_base": (17280, 27464893808, 4886431088, 4555474288, 4224517488, 956513280, 24631050240),
    "deepseek_vl2_base_language": (17280, 27033546240, 4455083520, 4124126720, 3793169920, 956513280, 24631050240),
    "gpt2": (18432, 124439808, 124439808, 85842432, 85842432, 28348416, 0),
    # 24 layers, four visits; totals of Ouro: of the headers of its files
    "ouro_1_4b": (393216, 1434652673, 1434652673, 1333989377, 1233326081, 402653184, 0),
    "ouro_2_6b": (None, 2667974657, 2667974657, 2567311361, 2466648065, 805306368, 0),
    # 4 layers, and 4 of 32 visits; total: of the shapes of the released code
    "huginn_3_5b": (1393920, 3564976800, 3564976800, 3218946720, 3218946720, 892193280, 0),
    # 128 more a layer, of the indexer
    "deepseek_v3_2": (42944,),
}
# What else the models hold: shared experts, router, dense ffn, norms.
REMAINDER = {
    "deepseek_v2": (2783969280, 48332800, 188743680, 619520),
    "deepseek_v2_lite": (449839104, 3407872, 67239936, 112640),
    "deepseek_v3": (2554331136, 106430464, 1189085184, 881664),
}
# Training FLOPs of 4096 tokens, in 10^12, as DeepSeekMoE prints them.
PRINTED = {"deepseek_7b": 183.5, "llama2_7b": 187.9, "deepseek_moe_16b": 74.4, "deepseek_67b": 2057.5}


@functools.cache
def described(name):
    """At 4,096 tokens where the paper prints FLOPs of them; counting takes the longer, the more there are."""
    return figures(load(name), Options(context=4096 if name in PRINTED else 16))


QUICK = ("gpt2", "deepseek_v2_lite")


@pytest.mark.parametrize("model", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS])
def test_figures_are_those_of_the_published_model_to_the_last(model):
    found = described(model)
    counted, cache = found["parameters"], found["cache"]
    families = counted["families"]
    names = ("active", "active_without_embedding", "active_without_embedding_and_head")
    of = (families["attention"], families["routed_experts"])
    held, *expected = MODELS[model]
    if expected:
        assert [counted["total"] - families["mtp"], *(counted[n] for n in names), *of] == expected
    if model in REMAINDER:
        others = ("shared_experts", "router", "dense_ffn", "norms")
        assert tuple(families[family] for family in others) == REMAINDER[model]
    if held:
        assert (cache["elements_per_token"], cache["elements_constant"]) == (held, 0)
        bytes_ = {name: held * size for name, size in (("fp32", 4), ("bf16", 2), ("fp8", 1), ("at_bits", 2))}
        assert cache["bytes_per_token"] == bytes_
    if model in PRINTED:
        assert found["flops"]["deepseek_moe_formula"] / 1e12 == pytest.approx(PRINTED[model], rel=1e-3)


PAPER = [  # layers, width, vocabulary, ratio of the ffn, 10^12 FLOPs
    (30, 4096, 102400, 1, 183.48),
    (32, 4096, 32000, 1, 187.94),
    (28, 2048, 102400, 2, 74.42),
    (95, 8192, 102400, 1, 2057.46),
    (62, 4096, 102400, 2, 572.71),  # GShard 137B
    (62, 4096, 102400, 16 * 1408 / (8 / 3 * 4096), 585.49),  # DeepSeekMoE 145B
    (62, 4096, 102400, 8 * 1408 / (8 / 3 * 4096), 374.59),  # its half-activated twin
]


def test_formula_gives_every_figure_at_the_papers_own_ratio():
    for *shape, printed in PAPER:
        assert deepseek_moe_flops(*shape, 4096) / 1e12 == pytest.approx(printed, abs=0.005)


@pytest.mark.slow
def test_formula_counts_each_visit_of_a_loop():
    shape, flops = described("ouro_1_4b")["shape"], described("ouro_1_4b")["flops"]
    once, again = (
        deepseek_moe_flops(layers, shape["d_model"], shape["vocab_size"], flops["ffn_ratio"], flops["context"])
        for layers in (shape["n_layers"], 4 * shape["n_layers"])
    )
    assert once < flops["deepseek_moe_formula"] == again


@pytest.mark.slow
def test_multi_token_prediction_is_a_family_of_its_own_and_never_active():
    counted = figures(load("deepseek_v3", ["model.mtp={depth: 1}"]), Options(context=16))["parameters"]
    assert counted["families"]["mtp"] == 11_610_067_968
    assert counted["total"] == MODELS["deepseek_v3"][1] + 11_610_067_968
    assert counted["active"] == MODELS["deepseek_v3"][2]


def test_training_state_and_cache_are_weighed_by_recipe_and_context():
    training = described("gpt2")["training"]
    assert training["bytes_per_parameter"] == 16
    assert training["bytes"]["total"] == 16 * 124_439_808 == 8 * training["bytes_per_gpu"]
    assert sum(v for k, v in training["bytes"].items() if k != "total") == training["bytes"]["total"]
    decoder = load("gpt2", ["model.n_layers=1"])
    for recipe, size in (("fp32", 16), ("bf16", 8)):
        training = figures(decoder, Options(context=8, recipe=recipe, gpus=7))["training"]
        assert training["bytes_per_parameter"] == size
        assert training["bytes_per_gpu"] == -(-training["bytes"]["total"] // 7)
    cache = figures(load("gpt2"), Options(cache_context=1000, cache_bits=6))["cache"]
    assert cache["bytes_at_context"]["bf16"] == 1000 * cache["bytes_per_token"]["bf16"]
    assert cache["bytes_at_context"]["at_bits"] == 1000 * MODELS["gpt2"][0] * 6 / 8


@pytest.mark.slow
def test_flops_are_those_of_the_whole_decoder_run_at_once():
    from torch.utils.flop_counter import FlopCounterMode

    decoder = load("tiny", ["model.overrides=[{layers: 2, attention: {name: gqa, n_heads: 4}}]"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, 48, dtype=torch.long, device="meta"))
    flops = figures(decoder, Options(context=48))["flops"]
    assert flops["forward_per_token"] == counter.get_total_flops() / 48
    assert flops["training_per_token"] == 3 * flops["forward_per_token"]


@pytest.fixture
def plugins(temporary_blocks):
    """Attentions of a plug-in: one without a cache, one that remembers a window and a sum."""

    @register("attention", "forgetful")
    class Forgetful(Attention):
        def __init__(self, d_model: int, layer_idx: int) -> None:
            super().__init__()
            self.mix = nn.Linear(d_model, d_model * (1 + layer_idx), bias=False)

        def forward(self, x: Any, positions: Any, *, segments: Any = None, cache: Any = None) -> Any:
            return self.mix(x)[..., : x.shape[-1]]

    class Memory:
        def __init__(self, nbytes):
            self.nbytes = nbytes

    @register("attention", "windowed")
    class Windowed(Forgetful):
        def __init__(self, d_model: int, window: int = 16) -> None:
            super().__init__(d_model, 0)
            self.window = window

        def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Any:
            return Memory(batch * (min(length, self.window) * 10 * dtype.itemsize + 100 * 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "seeing", "reading"), [("deepseek_vl2_tiny", (0.67, 6.67), (0.49, 2.57))]
)  # TFLOP, as counted from the released code
def test_image_is_seen_and_read_at_its_cost(model, seeing, reading):
    found = described(model)["inputs"]["images"]
    for key, tiles, tokens, sight, text in zip(("1x1", "3x3"), (1, 10), (421, 2017), seeing, reading, strict=True):
        image = found[key]
        assert (image["tiles"], image["tokens"]) == (tiles, tokens)
        assert image["embedding_flops"] / 1e12 == pytest.approx(sight, rel=0.01)
        assert image["reading_flops"] / 1e12 == pytest.approx(text, rel=0.01)
        assert image["cache_bytes"] == 2 * 30720 * tokens
    assert described("llama2_7b")["inputs"] == {}


@pytest.mark.usefixtures("plugins")
def test_parameters_of_a_plug_in_belong_to_the_family_whose_contract_they_keep():
    found = figures(load("gpt2", ["model/attention=forgetful", "model.n_layers=3"]), Options(context=8))
    assert found["parameters"]["families"]["attention"] == 768 * 768 * (1 + 2 + 3)  # no two layers are alike
    assert found["cache"]["elements_per_token"] is None


def test_quantised_cache_is_weighed_beside_the_arithmetic_with_its_scales():
    decoder = load("deepseek_v2_lite", ["model.n_layers=1"])
    for bits, a_layer in ((8, 576 + 18), (6, 432 + 18), (4, 288 + 18)):
        cache = figures(decoder, Options(context=8, cache_context=100, cache_bits=bits))["cache"]
        assert cache["bytes_per_token"]["at_bits"] == 576 * bits / 8
        assert (cache["bytes_per_token"]["stored"], cache["bytes_at_context"]["stored"]) == (a_layer, 100 * a_layer)
    assert "stored" not in figures(decoder, Options(context=8, cache_bits=5))["cache"]["bytes_per_token"]


@pytest.mark.usefixtures("plugins")
def test_cache_of_a_window_saturates_and_a_state_is_told_apart():
    found = figures(load("gpt2", ["model/attention=windowed"]), Options(context=8, cache_context=4096))["cache"]
    assert (found["elements_per_token"], found["elements_constant"]) == (12 * 10, 12 * 100)
    assert found["elements_beyond_windows"] == 0
    assert found["elements_at_context"] == 12 * (16 * 10 + 100)
    assert found["bytes_at_context"]["bf16"] == 12 * (16 * 20 + 400)  # the state stays fp32


@pytest.mark.slow
def test_beyond_windows_a_token_adds_its_share_of_the_keys_of_windows():
    found = figures(load("deepseek_v4_flash", []), Options(context=8))["cache"]
    assert found["elements_per_token"] == 43 * 512  # the windows still grow
    assert found["elements_beyond_windows"] == 21 * (512 + 128) / 4 + 20 * 512 / 128


@pytest.mark.parametrize(("mixer", "tails"), [("kda", 3 * 3 * 768)])
def test_states_of_a_recurrent_mixer_are_fp32_at_every_precision_and_its_last_tokens_are_not(mixer, tails):
    found = figures(load("gpt2", [f"model/attention={mixer}", "model.n_layers=1"]), Options(context=8))["cache"]
    state = found["elements_constant"] - tails
    assert found["bytes_at_context"] == {
        "fp32": 4 * (state + tails),
        "bf16": 4 * state + 2 * tails,
        "fp8": 4 * state + tails,
        "at_bits": ANY,
    }


def answer(capsys, words):
    main(words.split())
    return capsys.readouterr().out


def row(table, label):
    """The cells of a row but its label."""
    line = next(line for line in table.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split("  ")


def test_json_is_one_document_of_plain_numbers_under_stable_keys(capsys):
    told = json.loads(answer(capsys, "model=gpt2,tiny model.n_layers=1 --json"))
    assert set(told) == {"models", "against", "changes"}
    assert [m["model"] for m in told["models"]] == ["gpt2", "tiny"] and told["against"] == "tiny"
    assert [m["flops"]["context"] for m in told["models"]] == [1024, 1024]  # for which both are made
    for model in told["models"]:
        documented = (ROOT / "docs/how-to/cost-card.md").read_text()
        assert not [key for key in model if f"`{key}" not in documented]
        assert all(type(v) in (int, float, str) for v in describe.flat(model).values())
    (change,) = told["changes"]
    a, b = (m["parameters"]["total"] for m in told["models"])
    assert (change["model"], change["change"]["parameters.total"]) == ("gpt2", a / b - 1)
    assert "cache.bits" not in change["change"]


@pytest.mark.slow
def test_overrides_hold_for_every_model_and_contexts_for_each(capsys):
    words = "model/attention=mqa model.attention.n_heads=4 against=gpt2 context=64,32 cache.context=99 --json"
    told = json.loads(answer(capsys, f"model=gpt2,tiny {words}"))
    layers_heads = [(12, 768 // 4), (4, 192 // 4)]
    assert [m["cache"]["elements_per_token"] for m in told["models"]] == [2 * n * h for n, h in layers_heads]
    assert told["against"] == "gpt2" and [c["model"] for c in told["changes"]] == ["tiny"]
    assert [m["flops"]["context"] for m in told["models"]] == [64, 32]
    assert [m["cache"]["context"] for m in told["models"]] == [99, 99]


@pytest.mark.slow
def test_a_file_of_a_composition_and_a_checkpoint_are_described_too(capsys, tmp_path, tiny):
    from omegaconf import OmegaConf

    from blockwright.blocks.compose import read as read_model

    (tmp_path / "own.yaml").write_text(OmegaConf.to_yaml(tiny()))
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    torch.save({"hyper_parameters": {"model": read_model(tiny(moe=True))}, "state_dict": {}}, run / "last.ckpt")
    models = f"{tmp_path / 'own.yaml'},{tmp_path / 'run'},{run / 'last.ckpt'}"
    told = json.loads(answer(capsys, f"model={models} model.vocab_size=99 --json"))
    dense, *mixtures = (m["parameters"] for m in told["models"])
    assert dense["families"]["embedding"] == 99 * 48 and dense["families"]["routed_experts"] == 0
    assert mixtures[0] == mixtures[1] and mixtures[0]["families"]["routed_experts"] == 6 * 3 * 48 * 12


def test_a_file_takes_groups_and_keys_as_a_preset_does(capsys, tmp_path, tiny):
    from omegaconf import OmegaConf

    written, wanted = tmp_path / "own model.yaml", tmp_path / "wanted.yaml"
    written.write_text(OmegaConf.to_yaml(tiny()))
    wanted.write_text(OmegaConf.to_yaml({**tiny(), "n_layers": 1, "attention": {"name": "mqa", "n_heads": 2}}))
    totals = []
    for words in (["model/attention=mqa", "model.attention.n_heads=2", "model.n_layers=1"], []):
        main([f"model={written if words else wanted}", *words, "--json"])
        totals.append(json.loads(capsys.readouterr().out)["models"][0]["parameters"]["total"])
    assert totals[0] == totals[1]


LARGEST = "deepseek_v3"


@pytest.mark.slow
def test_the_largest_model_takes_seconds_and_little_memory_and_no_lightning(environment):
    probe = (
        "import re, sys, blockwright.lab.describe as d\nd.main(sys.argv[1:])\n"
        # its own peak: ru_maxrss also counts the process that started it
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], 'lightning' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", probe, f"model={LARGEST}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    kilobytes, lightning = done.stdout.splitlines()[-1].split()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert int(kilobytes) < 1.5e6 and lightning == "False"


@pytest.mark.slow
def test_reader_that_has_seen_enough_is_no_error(environment):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "blockwright.lab.describe", "model=tiny", "context=8", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_plot_draws_families_and_cache_and_a_model_without_one(capsys, tmp_path):
    answer(capsys, f"model=gpt2,tiny context=8 --plot {tmp_path / 'costs.svg'}")
    written = (tmp_path / "costs.svg").read_text()
    assert "gpt2, attention: 28,348,416" in written and "gpt2: 124,439,808 active" in written
    assert written.count('class="curve') == 4  # a line of the cache and one of the legend, for each model
    words = "model=gpt2,gpt2 model/attention=forgetful model.n_layers=1 context=8"
    table = answer(capsys, f"{words} --plot {tmp_path / 'none.svg'}")
    assert [c.strip() for c in row(table, "cache numbers per token") if c.strip()] == ["none", "none"]
    assert (tmp_path / "none.svg").exists()


def test_one_value_is_for_all_models_and_several_are_for_each():
    request = read(["model=gpt2,tiny", "cache.bits=6,16", "gpus=4", "training.recipe=fp32,mixed"])
    assert [(o.cache_bits, o.gpus, o.recipe) for o in request.options] == [(6, 4, "fp32"), (16, 4, "mixed")]


MISTAKES = {
    "": "model",
    "model=deepsek_v2": "model",
    "gpt2": "command line",
    "model=gpt2 cache.bits=0": "cache.bits",
    "model=gpt2,tiny cache.bits=1,2,3": "cache.bits",
    "model=gpt2 context=1e30": "context",
    "model=gpt2 gpus=0": "gpus",
    "model=gpt2 against=gpt2": "against",
    "model=gpt2,tiny against=gpt3": "against",
    "model=gpt2 optimizer.lr=1": "optimizer.lr",
    "model=gpt2 --jsn": "command line",
    "model=gpt2 --plot costs.xls": "--plot",
    "model=gpt2 context=8 --plot no/such/folder.svg": "--plot",
    "model=no/such.yaml": "model",
}


@pytest.mark.parametrize(("words", "path"), MISTAKES.items())
def test_a_mistake_is_one_message(capsys, words, path):
    assert run_command(main, words.split()) == REFUSED
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {path}") and said.err.count("error: ") == 1


def test_overrides_of_the_model_are_told_from_others():
    keys = ("model.n_layers", "model/attention", "+model.mtp", "~model/position", "modelling", "data", "models.x", "")
    assert [key for key in keys if changes_model(key)] == list(keys[:4])


def test_card_says_what_was_measured_here_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(timing.VARIABLE)
    found = (Faster("many rows", "oneDNN", "MKL", 1.4), Faster("1 row", "fast", "torch", 1.25))
    monkeypatch.setattr(describe, "kept", lambda of: Choice("medium", {1: ("fast",)}, found=found))
    main(["model=tiny", "--json"])
    (model,) = json.loads(capsys.readouterr().out)["models"]
    shown = model["kernels"]["products"]
    assert (
        shown["many rows"] == "oneDNN (oneDNN 1.40 × MKL)" and shown["1 row"] == "fast, else torch (fast 1.25 × torch)"
    )
    card.show({"models": [model], "changes": [], "against": model["model"]})
    assert "fast 1.25 × torch" in capsys.readouterr().out
    monkeypatch.setattr(describe, "kept", lambda of: None)
    assert set(describe.figures(load("tiny", []), Options())["kernels"]["products"]) == {"chosen"}

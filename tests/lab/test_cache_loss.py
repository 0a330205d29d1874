"""What quantised caches cost in perplexity."""

import json
import math

import pytest
import torch
from run_folder import write_run

from blockwright.blocks.compose import compose
from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.lab.cache_loss import losses, main, mean_loss, text_windows
from blockwright.lab.writer import Writer
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.tokenizer import Bytes

pytestmark = pytest.mark.xdist_group("cache_loss")  # its fixture is slow to set up

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12


@pytest.fixture(scope="module")
def decoder(tiny):
    model = tiny(vocab_size=257, attention={"name": "mla", "n_heads": 4}, init={"std": 0.2, "depth_scaled": False})
    return compose(model, seed=3).eval()


@pytest.fixture(scope="module")
def run(decoder, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), decoder, TEXT)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where the tokens of a run's own text go: the project's data."""
    monkeypatch.setenv("PROJECT_ROOT", str(tmp_path))


def window(n=70):
    ids = torch.tensor([[*TEXT.encode()][: n + 1]])
    return ids[:, :-1], ids[:, 1:]


def test_exact_caches_lose_what_one_pass_loses(decoder):
    tokens, targets = window()
    targets = targets.clone()
    targets[0, 5:20] = IGNORED
    with torch.no_grad():
        expected = decoder.nll(decoder.hidden(tokens)[0], targets) / 55
    assert mean_loss(decoder, [(tokens, targets)], None) == pytest.approx(float(expected), rel=1e-5)


def test_each_row_has_the_bytes_it_holds_and_its_change_against_exact_caches(decoder):
    rows = losses(decoder, [window()], [8, 6, 4])
    assert [row["bits"] for row in rows] == [None, 8, 6, 4]
    held = [row["bytes_per_token"] for row in rows]
    assert held == sorted(held, reverse=True) and held[0] == sum(c.nbytes for c in decoder.new_caches(1, 1))
    assert rows[0]["change"] == 0 and all(0 < abs(row["change"]) < 0.05 for row in rows[1:])
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["change"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"] - 1)


def test_command_measures_a_runs_own_validation_text(run, capsys):
    main([str(run), "--bits", "6", "--windows", "3", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [row["bits"] for row in told["caches"]] == [None, 6] and told["tokens"] == 3 * 48
    main([str(run), "--windows", "3"])
    assert "6 bits" in capsys.readouterr().out


def test_command_takes_any_text(run, decoder, capsys):
    file = run / "0.txt"
    main([str(run), "--text", str(file), "--length", "60", "--windows", "1", "--bits", "8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 60
    assert told["caches"][0]["loss"] == pytest.approx(mean_loss(decoder, [window(60)], None), rel=1e-6)


def test_windows_are_spread_over_all_files(decoder, tmp_path):
    writer = Writer(decoder, Bytes())
    for name in "ab":
        (tmp_path / name).write_text(name * 1000)
    found = list(text_windows(writer, [tmp_path / "a", tmp_path / "b"], 20, 4))
    assert [chr(tokens[0, 0]) for tokens, _ in found] == ["a", "a", "b", "b"]


def test_bits_that_change_nothing_are_refused_and_those_of_some_layers_said(tiny):
    kda, mha = {"name": "kda", "n_heads": 2, "head_dim": 8}, {"name": "mha", "n_heads": 2}

    def writer(**given):
        return Writer(compose(tiny(vocab_size=257, n_layers=2, **given)).eval(), Bytes())

    hybrid = {"variants": {"attention": {"linear": kda}}, "layout": {"attention": "linear attention"}}
    assert writer(attention=mha, **hybrid).cached(4) == "4 bits in 1 of 2 layers"
    assert writer(attention=mha).cached(4) == "4 bits"
    for do in (lambda of: of.cached(4), lambda of: of.write("a", 1, bits=4), lambda of: of.memory(8, 4)):
        with pytest.raises(ConfigError, match="stay exact"):
            do(writer(attention=kda))


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["--text", "/nowhere"], "--text"),
        (["--text", "EMPTY"], "--text"),
        (["--text", "/dev/zero"], "--text"),
        (["--text", "SHORT", "--length", "60"], "--text"),
        (["--text", "TEXT", "--length", "5000"], "--length"),
        (["--windows", "-1"], "--windows"),
        (["--length", "0"], "--length"),
    ],
)
def test_mistake_is_one_message_at_its_option(words, path, run):
    (run / "short").write_text(TEXT[:60])
    (run / "empty").touch()
    files = {"EMPTY": str(run / "empty"), "TEXT": str(run / "0.txt"), "SHORT": str(run / "short")}
    with pytest.raises(ConfigError) as refused:
        main([str(run), *(files.get(word, word) for word in words)])
    assert refused.value.path == path


def test_model_that_is_no_run_needs_a_text(run):
    with pytest.raises(ConfigError, match="--text"):
        main([str(run / "checkpoints" / "last.ckpt")])


def test_conversations_of_a_run_are_no_text(run, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    (tmp_path / ".hydra" / "config.yaml").write_text("data: {name: chat}")
    with pytest.raises(ConfigError, match=r"is no text, but conversations.*--text FILE"):
        main([str(tmp_path)])


def test_tokens_of_a_run_go_to_the_projects_cache(run, tmp_path):
    main([str(run), "--windows", "1"])
    assert (tmp_path / "data" / "cache").is_dir() and not (run / "cache").exists()

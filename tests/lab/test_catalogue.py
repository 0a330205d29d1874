"""The catalogue's page: current, of this distribution only, and ticked by probes that can fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention.gqa import GQA
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.position.base import Position
from blockwright.lab import abilities, catalogue
from blockwright.lab.abilities import host
from blockwright.lab.catalogue import PAGE, REMEDY, builtin, main, papers, stale
from blockwright.registry import ConfigError, register


@pytest.mark.slow
def test_page_is_current() -> None:
    fault = stale()
    assert fault is None, fault


def test_every_block_of_this_distribution_is_on_the_page() -> None:
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", PAGE.read_text(), re.M | re.S))
    for kind in filter(builtin, registry.kinds()):
        assert re.findall(r"^\| `(\w+)`", sections[kind], re.M) == builtin(kind), REMEDY


def test_every_tick_is_explained() -> None:
    ticks = {tick for asked in abilities.ABILITIES.values() for tick in asked} | set(abilities.OF_A_DECODER)
    assert set(abilities.MEANING) == ticks


@pytest.mark.usefixtures("temporary_blocks")
def test_blocks_of_plug_ins_are_left_out() -> None:
    register("norm", "plugin_norm")(type("PluginNorm", (registry.lookup("norm", "rmsnorm").cls,), {}))
    assert "plugin_norm" in registry.names("norm") and "plugin_norm" not in builtin("norm")


def test_papers_are_those_of_the_docstring_without_its_arguments() -> None:
    class Block:
        """A block.

        Wang & Komatsuzaki 2021; Thinking Machines 2026; YOCO, Xiong et al. 2020, arXiv 2002.04745,
        §2: y = x. Again arXiv 2002.04745.

        Args:
            alpha: as Noether 1999, arXiv 9999.99999
        """

    link = "[2002.04745](https://arxiv.org/abs/2002.04745)"
    assert papers(Block) == f"Wang & Komatsuzaki 2021, Thinking Machines 2026, Xiong et al. 2020, {link}"


# --- every probe can fail ---------------------------------------------------------------------------------------------


class Peeking(GQA):
    """Sees the whole sequence."""

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given) + x.mean(1, keepdim=True)


class PeekingInTraining(Peeking):
    """Sees the whole sequence while it trains."""

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        see = super() if self.training else super(Peeking, self)
        return see.forward(x, given)


class Cacheless(GQA):
    """Has no cache."""

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Any:
        raise NotImplementedError


class Unpositioned(GQA):
    """Turns nothing when it decodes step by step, or ever."""

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given._replace(positions=torch.zeros_like(given.positions)))


class Undivided(GQA):
    """Ignores documents."""

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given._replace(segments=None))


class Forgetting(GQA):
    """Decodes each token as if it were the first."""

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        return super().forward(x, given._replace(cache=None))


@pytest.mark.usefixtures("temporary_blocks")
@pytest.mark.parametrize(
    ("broken", "lost"),
    [
        (Peeking, {"causal", "causal in training", "decodes by cache", "packs"}),
        (PeekingInTraining, {"causal in training"}),
        (Cacheless, {"decodes by cache"}),
        (Unpositioned, {"uses position"}),
        (Undivided, {"packs"}),
        (Forgetting, {"decodes by cache"}),
    ],
)
def test_attention_that_cannot_do_a_thing_gets_no_tick_for_it(broken: type, lost: set[str]) -> None:
    register("attention", "broken")(broken)
    assert unticked("attention", "broken") == lost


def unticked(kind: str, name: str) -> set[str]:
    return {tick for tick, asked in abilities.ABILITIES[kind].items() if not asked(host(kind, name)[0])}


@pytest.mark.slow
def test_ticks_of_gates_are_those_of_what_they_do() -> None:
    assert unticked("gating", "softmax_topk") == {"adds a loss", "adapts"}
    assert unticked("gating", "sigmoid_bias") == {"adds a loss"}
    assert unticked("balance", "expert") == set()
    assert unticked("ffn", "swiglu") == {"routes"}
    assert unticked("position", "none") == {"tells the order"}


def test_token_that_no_expert_takes_is_seen() -> None:
    decoder, gate = host("gating", "softmax_topk")
    forward = type(gate).forward

    class Losing(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            routing = forward(gate, *arguments)  # type: ignore[arg-type]
            lost = torch.full_like(routing.experts[:, -1:], len(routing.load))
            return routing._replace(experts=torch.cat((routing.experts[:, :-1], lost), 1))

    assert abilities.complete(decoder)

    class Still(nn.Module):
        def forward(self, x: Tensor, routing: Any) -> Tensor:
            return x

    ffn: Any = decoder.layers[0].ffn
    ffn.gating, ffn.experts = Losing(), Still()
    assert not abilities.complete(decoder)


def test_block_without_a_place_is_refused_with_the_remedy(temporary_blocks: None) -> None:
    @registry.family("ornament")
    class Ornament(Position):
        pass

    register("ornament", "star")(type("Star", (Ornament,), {}))
    with pytest.raises(ConfigError, match=r"lab/abilities\.py"):
        host("ornament", "star")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page in a folder of its own, of which the code now says two lines."""
    monkeypatch.setattr(catalogue, "PAGE", tmp_path / "catalogue.md")
    monkeypatch.setattr(catalogue, "markdown", lambda: "first\nsecond\n")
    return tmp_path / "catalogue.md"


def test_check_passes_a_current_page_and_tells_how_to_mend_another(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text("first\nsecond\n")
    assert main(["--check"]) == 0
    page.write_text("first\nother\n")
    assert main(["--check"]) == 1
    told = capsys.readouterr().err
    assert REMEDY in told and "other" in told and "second" in told
    page.unlink()
    assert main(["--check"]) == 1


def test_without_a_word_it_prints_the_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and capsys.readouterr().out == "first\nsecond\n"
    with pytest.raises(ConfigError, match="--check"):
        main(["--chek"])

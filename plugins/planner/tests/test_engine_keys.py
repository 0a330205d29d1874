"""What is written for an engine holds only keys that the engine has."""

from __future__ import annotations

import ast
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainings import LAYOUTS, RATES, made

from blockwright.plugins.planner.handover.export import ENGINES
from blockwright.plugins.planner.layout import Layout

KEYS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("engine_keys.yaml").read_text())


def sections(tree: Mapping[str, Any], names: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, set[str]]]:
    """Section → the keys in it, for each section that is recorded."""
    yield at, set(tree)
    for key, value in tree.items():
        inner = f"{at}.{key}" if at else key
        if isinstance(value, Mapping) and inner in names:
            yield from sections(value, names, inner)


def named(engine: str, tree: Mapping[str, Any]) -> list[str]:
    """The keys that the engine does not have."""
    known = KEYS[engine]
    found = []
    for at, keys in sections(tree, known):
        found += [f"{at}.{key}" for key in keys - {*known[at]["keys"], *known[at].get("others", ())}]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_only_keys_of_the_engine_are_written(engine: str) -> None:
    for layout, rates, weights in itertools.product(LAYOUTS, RATES, (True, False)):
        for family in ENGINES[engine].families:
            tree = yaml.safe_load(ENGINES[engine].text(made(layout, rates, weights), family))
            assert not named(engine, tree)
            assert not {s for s, v in tree.items() if isinstance(v, dict)} - KEYS[engine].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_recorded_keys_are_those_of_an_installed_engine(engine: str) -> None:
    """Read from its sources, which need not be importable."""
    for section, recorded in KEYS[engine].items():
        declared = set().union(*(fields(*place.split()) for place in recorded["declared"])) or set(recorded["keys"])
        assert not set(recorded["keys"]) - declared, section


def fields(package: str, file: str, name: str) -> set[str]:
    """The annotated attributes of a class in a package's sources."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / file).read_text())
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_automodel_reads_how_the_gpus_are_shared_out(layout: Layout, family: str) -> None:
    reader = pytest.importorskip("nemo_automodel.recipes._dist_utils", exc_type=ImportError)
    from nemo_automodel.components.distributed.pipelining.functional import calculate_virtual_stages

    tree = yaml.safe_load(ENGINES["automodel"].text(made(layout), family))
    found = reader.parse_distributed_section(tree["distributed"])
    assert [found[f"{k}_size"] for k in ("tp", "pp", "cp", "ep")] == [
        *(layout.tensor, layout.pipeline, layout.context, layout.expert)
    ]
    pipeline = found["pipeline_config"]
    assert (pipeline is not None) == (layout.pipeline > 1)
    if pipeline is not None:
        single = layout.interleave == 1
        given = (27, pipeline.layers_per_stage, layout.pipeline, single, pipeline.round_virtual_stages_to_pp_multiple)
        assert calculate_virtual_stages(*given)[1] == layout.interleave


@pytest.mark.parametrize(("pipeline", "interleave"), [(4, 1), (8, 3), (2, 2)])
def test_megatron_reads_which_layers_a_stage_has(pipeline: int, interleave: int) -> None:
    name = "megatron.core.transformer.pipeline_parallel_layer_layout"
    reader: Any = pytest.importorskip(name, exc_type=ImportError).PipelineParallelLayerLayout
    layout = Layout(pipeline=pipeline, interleave=interleave)
    tree = yaml.safe_load(ENGINES["megatron-bridge"].text(made(layout), "deepseek_v3"))
    found = reader(tree["model"]["pipeline_model_parallel_layout"], pipeline)
    found.validate_layer_layout(27, 1)
    assert found.virtual_pipeline_model_parallel_size == interleave

"""The rules of CONTRIBUTING.md that a machine can hold."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs", "plugins", "registry", "blocks", "training", "lab")
PACKAGES = ("src", "registry", "blocks", "training", "lab", "plugins", "benchmarks", "docs")
AVOIDED = re.compile(
    r"\b(?:(?:go|goes|going|gone|went) on\b|(?<!blockwright-)guests?\b|strangers?\b|wishes\b|front door\b|the house\b"
    r"|(?:is|are|was|were|be) told\b|(?:told|tells) of\b|(?:no|some|every)body\b|whoever\b|a person\b|by heart\b"
    r"|mend(?:s|ed)?\b|anew\b|lest\b|of one's own\b|swept into\b|known here\b|to the bit\b|hand(?:s|ed)? on\b"
    r"|the way back\b|held to\b|known of\b|shar(?:e|es|ed|ing) out\b)",
    re.IGNORECASE,
)  # the glossary in CONTRIBUTING.md gives the words to use
TEXTS = {
    tokenize.STRING,
    tokenize.COMMENT,
    getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
}  # 3.12 splits f-strings
SOURCES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "tests" not in p.parts]


@pytest.mark.xdist_group("house")
def test_tests_of_a_group_run_on_one_worker(request: pytest.FixtureRequest) -> None:
    """Some versions of pytest make xdist ignore the groups, so that each worker runs each costly fixture."""
    assert not hasattr(request.config, "workerinput") or request.node.nodeid.endswith("@house")


def _imported(tree: ast.AST) -> set[str]:
    """Top-level packages."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_core_imports_nothing_that_an_extra_brings() -> None:
    heavy = {"scipy", "jinja2", "tensorboard"}
    for source in SOURCES:
        text = source.read_text()
        if not any(name in text for name in heavy):
            continue
        tree = ast.parse(text)
        at_start = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        part = source.relative_to(ROOT)
        below = part.parts[0] in ("lab", "plugins", "benchmarks") or part.name == "template.py"  # of Jinja
        assert not heavy & _imported(at_start if below else tree), source


def test_init_files_hold_no_code() -> None:
    for source in SOURCES:
        if source.name == "__init__.py":
            for node in ast.parse(source.read_text()).body:
                allowed = ast.Import | ast.ImportFrom | ast.Expr | ast.Assign
                assert isinstance(node, allowed) or _refuses_other_names(node), source


def test_no_module_gives_one_name_to_two_things() -> None:
    """The later one would take the place of the earlier one in functions that were written for that."""
    twice = {}
    for source in SOURCES:
        names: Counter[str] = Counter()
        for node in ast.parse(source.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += not any("overload" in ast.unparse(each) for each in node.decorator_list)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(each.id for target in targets for each in ast.walk(target) if _is_bound(each))
        twice[source] = {name for name, times in names.items() if times > 1 and name != "_"}
    assert not {source: names for source, names in twice.items() if names}


def _is_bound(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _refuses_other_names(node: ast.stmt) -> bool:
    """Whether a statement is the guard of a folder at the top, which is importable only as a part of blockwright."""
    text = ast.unparse(node)
    return text.startswith("if __name__ != 'blockwright.") and "raise ImportError" in text


@pytest.mark.parametrize("package", ["registry", "blocks", "training", "lab"])
def test_second_copy_under_another_name_is_refused(package: str) -> None:
    with pytest.raises(ImportError, match=f"write `from blockwright.*{package}"):
        importlib.import_module(package)


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "core", "helpers", "misc"}
    assert not [p for p in SOURCES if p.stem in drawers or p.parent.name in drawers]


def test_documents_that_commands_print_are_strict_json() -> None:
    """By ``registry.command.strict_json``: of a diverged run Python's own writer prints NaN, which no other reads."""
    commands = [source for source in SOURCES if source.relative_to(ROOT).parts[0] != "benchmarks"]
    assert not [source for source in commands if "print(json.dumps" in source.read_text()]


def test_no_block_takes_open_ended_arguments() -> None:
    for source in (ROOT / "blocks").rglob("*.py"):
        text = source.read_text()
        for node in ast.walk(ast.parse(text)) if re.search(r"\*\*\w+: ", text) else ():  # all parameters are typed
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{source}:{node.lineno}"


def test_a_block_is_in_the_file_of_its_kind_or_in_one_of_its_own_and_knows_no_block_of_another_kind() -> None:
    """A block receives its children built, so it imports their contracts alone."""
    from blockwright import registry

    blocks = {registry.lookup(kind, name).cls: kind for kind in registry.kinds() for name in registry.names(kind)}
    own = {(cls.__module__, cls.__name__): kind for cls, kind in blocks.items()}
    for (module, _), kind in own.items():
        if module.startswith("blockwright.blocks."):
            assert re.fullmatch(rf"blockwright\.blocks\.{kind}(\.\w+)?", module)
    for source in (ROOT / "blocks").rglob("*.py"):
        kind = source.relative_to(ROOT / "blocks").with_suffix("").parts[0]
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                foreign = {own.get((node.module or "", alias.name), kind) for alias in node.names} - {kind}
                assert not foreign, f"{source}:{node.lineno}"


def test_a_file_that_a_comment_or_a_page_names_exists() -> None:
    path = re.compile(r"(?<![\w/.])(?:blocks|training|lab|registry|plugins)/[\w/]+\.py\b")
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md"), ROOT / "CONTRIBUTING.md"]
    for source in [*SOURCES, *pages, *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "plugins").glob("*/conf/**/*.yaml")]:
        gone = [name for name in path.findall(source.read_text()) if not (ROOT / name).exists()]
        assert not gone, source


@pytest.mark.parametrize("folder", ["registry", "blocks", "training", "lab"])
def test_the_map_of_a_folder_names_all_that_is_in_it(folder: str) -> None:
    """In the table at its end: no file is added that a newcomer is not led to."""
    told = (ROOT / folder / "README.md").read_text().partition("## All of it")[2]
    named = sorted(re.findall(r"`(\w+(?:\.py|/))`", told))
    held = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert named == sorted(f"{path.name}/" if path.is_dir() else path.name for path in held if path.stem != "__init__")


def _prose() -> Iterator[tuple[str, str]]:
    """Place → text: documents, YAML, and the docstrings, comments and strings of the sources and tests."""
    for path in [ROOT / "README.md", *(file for each in DOCUMENTS for file in sorted((ROOT / each).rglob("*.md")))]:
        yield str(path), path.read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    yield "CONTRIBUTING.md", re.sub(r"\| not \| but \|\n(?:\|.*\n)*", "", contributing)  # the glossary itself
    for path in sorted([*(ROOT / "conf").rglob("*.yaml"), *ROOT.glob("plugins/*/conf/**/*.yaml")]):
        yield str(path), path.read_text()
    tests = [ROOT / "conftest.py", *(ROOT / "tests").rglob("*.py"), *ROOT.glob("plugins/*/tests/**/*.py")]
    tests.remove(Path(__file__).resolve())  # it lists the words
    for path in [*SOURCES, *tests]:
        text = path.read_text()
        if not AVOIDED.search(text):  # no need to tell its prose from its names, which takes a hundred times longer
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in TEXTS:
                yield f"{path}:{token.start[0]}", token.string


def test_prose_uses_the_words_of_the_glossary() -> None:
    found = [f"{where}: {match[0]}" for where, text in _prose() for match in AVOIDED.finditer(str(text))]
    assert not found, "see the glossary in CONTRIBUTING.md"


def test_every_file_of_the_package_that_is_no_python_is_in_the_wheel() -> None:
    """But for documents, which the site shows from the repository."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    linked = [each.resolve() for each in (ROOT / "src" / "blockwright").iterdir()]
    files = [file for each in linked for file in ([each] if each.is_file() else each.rglob("*")) if file.is_file()]
    files = [file for file in files if not {"tests", "__pycache__"} & {*file.relative_to(ROOT).parts}]
    data = [file for file in files if file.suffix not in (".py", ".md")]
    assert len(data) > 200
    left = [str(file.relative_to(ROOT)) for file in data if not any(fnmatch(file.name, each) for each in patterns)]
    assert not left

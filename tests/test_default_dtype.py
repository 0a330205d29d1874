"""Nothing that computes depends on the default dtype, which a trainer with ``bf16-true`` may lower inside a step.

A tensor made from Python numbers without a dtype has the default one: in bfloat16, 257 is 256, and a log-probability of
−8 is off by up to 0.016. So each such tensor names its dtype. What no text shows, such as a quotient of counts, is seen
by the conformance kit's check "default dtype" and by ``tests/training/test_half_precision.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Without benchmarks/, whose scripts are no part of a training.
FOLDERS = ("src", "registry", "blocks", "training", "lab", "plugins", "packages")
SOURCES = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if "tests" not in p.relative_to(ROOT).parts]
# From numbers, or from a shape alone, these make a tensor of the default dtype. Others keep that of a tensor that they
# are given: zeros_like, new_zeros, from_numpy, x / 2.
MAKERS = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "full", "zeros", "ones", "empty", "empty_strided", "eye"),
    *("linspace", "logspace", "rand", "randn", "sparse_coo_tensor", "hann_window", "hamming_window", "Tensor"),
}
DEFAULT = {"get_default_dtype", "set_default_dtype", "set_default_tensor_type"}
OWNER = ROOT / "blocks" / "precision.py"  # the one place that sets the default and restores it
PARAMETER = ("Parameter", "from_pretrained")  # of the model's dtype: compose() casts what it has drawn in fp32


def faults(tree: ast.AST) -> Iterator[str]:
    """Line and text of each expression whose result depends on the default dtype."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    exempt = {id(inner) for call in calls if _name(call).endswith(PARAMETER) for inner in ast.walk(call)}
    for call in calls:
        if id(call) not in exempt and _depends(call):
            yield f"{call.lineno}: {ast.unparse(call)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            hidden = {alias.name for alias in node.names} & (MAKERS - {"Tensor"} | DEFAULT | {"arange"})
            yield from (f"{node.lineno}: write torch.{name}" for name in sorted(hidden))


def _name(call: ast.Call) -> str:
    """Of what is called: torch.full, or the last part of a longer name."""
    owner = getattr(call.func, "value", None)
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return f"{owner.id}.{name}" if isinstance(owner, ast.Name) else name


def _depends(call: ast.Call) -> bool:
    owner, _, name = _name(call).rpartition(".")
    if owner != "torch" or any(keyword.arg in ("dtype", "out") for keyword in call.keywords):
        return False
    return name in MAKERS | DEFAULT or (name == "arange" and any(map(_is_fraction, call.args)))


def _is_fraction(argument: ast.expr) -> bool:
    """Whether an argument of ``arange`` is no whole number: it has a float in it, or a quotient."""
    return any(
        (isinstance(node, ast.Constant) and isinstance(node.value, float))
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div))
        for node in ast.walk(argument)
    )


def test_every_tensor_from_numbers_names_its_dtype() -> None:
    texts = {p: p.read_text() for p in SOURCES if p != OWNER}
    some = re.compile(rf"torch\.(arange|{'|'.join(MAKERS | DEFAULT)})\b|from torch import")  # else no need to parse it
    found = [
        f"{p.relative_to(ROOT)}:{fault}"
        for p, text in texts.items()
        if some.search(text)
        for fault in faults(ast.parse(text))
    ]
    assert not found, "add dtype=torch.float32, or torch.int64 for what counts"


DEPENDS = (
    *("torch.tensor([0.5])", "torch.tensor(values, device=device)", "torch.zeros(3).masked_fill_(mask, 1)"),
    *("torch.full((2,), 0.5)", "nn.functional.pad(torch.ones(2), (1, 1))", "torch.arange(0, 1, 0.1)"),
    *("torch.arange(n / 2)", "torch.get_default_dtype()", "from torch import zeros"),
)
PASSES = (
    *("torch.tensor([0.5], dtype=torch.float32)", "torch.arange(n, device=device)", "torch.zeros_like(x)"),
    *("x.new_zeros(3)", "nn.Parameter(torch.empty(3))", "from torch import Tensor, nn"),
    "nn.Embedding.from_pretrained(torch.empty(3, 4), freeze=False)",
)


def test_text_that_depends_on_the_default_dtype_is_found_and_other_text_passes() -> None:
    assert [len(list(faults(ast.parse(text)))) for text in DEPENDS] == [1] * len(DEPENDS)
    assert not [text for text in PASSES if list(faults(ast.parse(text)))]

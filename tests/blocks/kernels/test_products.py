"""How a process multiplies: as it was chosen, at full precision, and as before where it was chosen for a while."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch.nn import functional as F

from blockwright.blocks.kernels import products
from blockwright.blocks.kernels.products import Choice, Faster, linear, use, used, using
from blockwright.blocks.kernels.seam import kernel
from tests.blocks.kernels.compared import drawn

CHOICE = Choice("medium", {1: ("torch",), 8: ()}, True, (Faster("1 row", "a", "b", 1.25),))


def test_medium_is_taken_where_it_keeps_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, device, expected in ((4e-7, "cpu", "medium"), (2e-3, "cpu", "highest"), (4e-7, "cuda", "highest")):
        monkeypatch.setattr(products, "error_of_medium", lambda error=error: error)
        torch.set_float32_matmul_precision("high")  # what an earlier job of the process has left
        use(Choice("medium"), device)
        assert used().matmul == expected == torch.get_float32_matmul_precision()
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        use(Choice("high"), device, stated=True)
        assert torch.get_float32_matmul_precision() == "high"


def test_error_is_measured_and_no_choice_has_it() -> None:
    assert 0 < products.error_of_medium() < 1e-2 and torch.get_float32_matmul_precision() == "highest"
    a, b = drawn(300, 700).float(), drawn(700, 200, seed=1).float()
    exact = a.double() @ b.double()
    for matmul in ("highest", "medium"):
        use(Choice(matmul))  # type: ignore[arg-type]
        assert ((a @ b).double() - exact).norm() / exact.norm() < products.FULL_FP32


@pytest.mark.usefixtures("temporary_blocks")
def test_rows_are_multiplied_by_what_was_chosen_for_so_many() -> None:
    calls: list[tuple[str, int]] = []
    for name, most in (("first", 2), ("second", 9)):

        def call(x: Any, weight: Any, bias: Any = None, name: str = name) -> Any:
            calls.append((name, len(x)))
            return F.linear(x, weight, bias)

        call.__name__ = name
        kernel("linear", name, devices=("cpu",), automatic=False, takes=lambda x, w, b, most=most: len(x) <= most)(call)
    kernel("linear", "of a gpu", devices=("cuda",), automatic=False)(lambda x, w, b: None)
    weight = drawn(6, 5)
    chosen = Choice(few_rows={1: ("second",), 4: ("of a gpu", "first", "second", "unknown")})
    with torch.no_grad():
        for outside in (Choice(), chosen):
            use(outside)
            with using(chosen):
                for rows in (1, 2, 3, 4, 5):
                    torch.testing.assert_close(linear(drawn(rows, 5), weight), drawn(rows, 5) @ weight.t())
            assert used() == outside
        assert linear(drawn(0, 5), weight).shape == (0, 6)
        before = list(calls)
        use(Choice())
        linear(drawn(1, 5), weight)
    use(chosen)
    linear(drawn(1, 5).requires_grad_(), weight)
    assert calls == before
    assert [call for call in before if call[1]] == 2 * [("second", 1), ("first", 2), ("second", 3), ("second", 4)]


def test_few_rows_and_many_are_torchs_to_rounding() -> None:
    names = tuple(products.implementations("linear"))
    given = list(pairs([1, 3, 8, 9], [(64, 272), (48, 37), (272, 64)], [torch.float32, torch.bfloat16], names))
    for rows, (n, k), dtype, name in given:
        x, weight = drawn(rows, k).to(dtype), drawn(n, k, seed=1).to(dtype)
        with torch.no_grad(), using(Choice("medium", {8: (name,)}, True)):
            got = linear(x, weight)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), rtol=bound, atol=20 * bound)


def test_for_a_while_leaves_the_process_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), using(CHOICE):
        assert used().cached
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high" and used() == Choice()
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_choice_survives_json() -> None:
    assert Choice.read(json.loads(json.dumps(CHOICE.as_plain()))) == CHOICE
    assert Choice.read(Choice().as_plain()) == Choice()


def test_whatever_else_is_no_choice() -> None:
    good = CHOICE.as_plain()
    bad: list[Any] = [None, [], "medium", {}, 3.0]
    bad += [good | {"matmul": value} for value in ("fast", None, ["medium"], {})]
    bad += [good | {"cached": value} for value in (1, "yes", None)]
    bad += [good | {"few_rows": value} for value in (None, [1], {"x": []}, {"1": None}, {"1": 3}, {"1": [[]]})]
    bad += [good | {"few_rows": {str(i): [] for i in range(99)}}, good | {"found": [["", "", "", 1.0]] * 99}]
    bad += [good | {"found": value} for value in (None, 1, [[]], [["a", "b", "c", "d"]], [["a"]], ["abcd"], [None])]
    bad += [good | {"found": [["\x1b[2J", "a", "b", 1.0]]}, good | {"found": [[1, 2, 3, 1.0]]}]
    assert [each for each in bad if Choice.read(each) is not None] == []
    unknown = Choice.read(good | {"few_rows": {"1": ["os.system", "torch"]}, "more": 1})
    assert unknown is not None and unknown.few_rows == {1: ("torch",)}

"""Which attention kernel a GPU would use: torch's conditions, and that no preset holds all scores."""

from __future__ import annotations

import pytest
import torch

from blockwright import preset
from blockwright.blocks.compose import compose
from blockwright.blocks.kernels import attention
from blockwright.blocks.kernels.attention import Called
from blockwright.blocks.on_gpu import CARDS, MATH, attention_kernels, every, takers

BF16, FP32 = torch.bfloat16, torch.float32
A100, H100 = CARDS["sm_80"], CARDS["sm_90"]
# heads of queries, of keys; widths of keys, of values; type; card; masked; which take it
TAKERS = [
    (4, 4, 128, 128, BF16, A100, False, ["flash", "efficient"]),
    (4, 4, 128, 128, BF16, H100, False, ["flash", "efficient", "cudnn"]),
    (4, 2, 128, 128, BF16, H100, False, ["flash", "cudnn"]),
    (4, 2, 512, 512, BF16, H100, False, []),
    (4, 4, 512, 512, BF16, H100, False, ["efficient"]),
    (4, 4, 192, 128, BF16, H100, False, ["efficient", "cudnn"]),
    (4, 4, 192, 128, BF16, A100, False, ["efficient"]),
    (4, 4, 12, 12, BF16, A100, False, ["flash"]),
    (4, 4, 12, 12, FP32, A100, False, ["efficient"]),
    (4, 2, 64, 64, FP32, A100, False, []),
    (4, 4, 64, 64, BF16, A100, True, ["efficient"]),
    (4, 2, 64, 64, BF16, A100, True, []),
]


@pytest.mark.parametrize("row", TAKERS, ids=str)
def test_torchs_conditions(row: tuple[int, int, int, int, torch.dtype, tuple[int, int], bool, list[str]]) -> None:
    N, K, H, V, dtype, card, masked, expected = row
    q, k, v = (torch.empty(2, n, 9, h, dtype=dtype, device="meta") for n, h in ((N, H), (K, H), (K, V)))
    mask = torch.empty(1, 1, 9, 9, dtype=torch.bool, device="meta") if masked else None
    assert takers(Called(q, k, v, mask, "all" if masked else "square", 1.0), card) == expected


@pytest.mark.parametrize("name", ["gemma4_31b", "gpt_oss_20b"])
def test_presets_that_torchs_fused_kernels_would_refuse_are_written_as_they_take_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, here = compose(preset(name), device="meta"), {"sm_80": A100}
    assert MATH not in every(attention_kernels(decoder, here)["sm_80"])
    monkeypatch.setattr(attention, "as_efficient_takes", lambda call: call)
    assert MATH in every(attention_kernels(decoder, here)["sm_80"])

"""The error of a rank whose peer has gone, told from others."""

from __future__ import annotations

import pytest
import torch

from blockwright.training.parallel.lost_peer import is_lost_peer

LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.3]:34512",
    "Application timeout caused pair closure; Read error [10.0.0.1]:5: Connection reset by peer",
    "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: Connection refused",
    "NCCL Error 6: ncclRemoteError: remote process exited or there was a network error",
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)",
]
OTHERS = ["CUDA out of memory", "mat1 and mat2 shapes cannot be multiplied", "expected scalar type Float"]


@pytest.mark.parametrize("text", LOST)
def test_lost_peer_is_recognised_also_as_a_cause(text: str) -> None:
    assert is_lost_peer(RuntimeError(text))
    try:
        try:
            raise RuntimeError(text)
        except RuntimeError as cause:
            raise ValueError("while training") from cause
    except ValueError as error:
        assert is_lost_peer(error)


def test_errors_of_the_store_are_of_their_class() -> None:
    assert is_lost_peer(torch.distributed.DistNetworkError("x"))
    assert is_lost_peer(torch.distributed.DistStoreError("x"))


@pytest.mark.parametrize("text", OTHERS)
def test_other_errors_are_none(text: str) -> None:
    assert not is_lost_peer(RuntimeError(text))
    assert not is_lost_peer(ValueError(LOST[0]))

"""The error of a rank whose peer has gone, told from others."""

from __future__ import annotations

import torch

from blockwright.training.entry.ranks import is_lost_peer

LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.3]:34512",
    "Application timeout caused pair closure; Read error [10.0.0.1]:5: Connection reset by peer",
    "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR: Connection refused",
    "NCCL Error 6: ncclRemoteError: remote process exited or there was a network error",
    "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)",
]
OTHERS = ["CUDA out of memory", "mat1 and mat2 shapes cannot be multiplied", "expected scalar type Float"]


def test_lost_peer_is_recognised_also_as_a_cause_and_other_errors_are_none() -> None:
    for text in LOST:
        error = ValueError("while training")
        error.__cause__ = RuntimeError(text)
        assert is_lost_peer(RuntimeError(text)) and is_lost_peer(error)
    assert is_lost_peer(torch.distributed.DistNetworkError("x")) and is_lost_peer(torch.distributed.DistStoreError("x"))
    assert not any(is_lost_peer(error) for error in (*map(RuntimeError, OTHERS), ValueError(LOST[0])))

from __future__ import annotations

from torch import Tensor

from blocks.residual.base import Residual


class Streams(Residual):
    """Several residual streams: the shared base of ``mhc`` and ``hyper_connections``.

    They are opened as M copies, and closed by their mean.
    """

    streams: int

    def open(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, self.streams, -1)

    def close(self, x: Tensor) -> Tensor:
        return x.mean(2)

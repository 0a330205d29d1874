from __future__ import annotations

from torch import Tensor

from blockwright.blocks.closing import Closing
from blockwright.blocks.residual.base import Residual


class Streams(Residual):
    """Several residual streams: the shared base of ``mhc`` and ``hyper_connections``.

    They are opened as M copies. ``closing``, a child of each, makes one of them again.
    """

    streams: int
    closing: Closing

    def open(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, self.streams, -1)

    def close(self, x: Tensor) -> Tensor:
        return self.closing(x)

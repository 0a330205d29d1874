"""x-transformers' decoder with the options of a Llama. For training races only."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from benchmarks.models.base import Model
from benchmarks.race import Contender
from benchmarks.shapes import Shape


class XTransformer(Model):
    """RMSNorm, rotary positions, SwiGLU, no biases, flash attention."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(
            dim=shape.d_model,
            depth=shape.n_layers,
            heads=shape.n_heads,
            attn_dim_head=shape.d_model // shape.n_heads,
            ff_mult=shape.dense_width / shape.d_model,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            use_rmsnorm=True,
            rotary_pos_emb=True,
            attn_flash=True,
        )
        self.module = TransformerWrapper(
            num_tokens=shape.vocab_size,
            max_seq_len=32768,
            attn_layers=layers,
            use_abs_pos_emb=False,
            tie_embedding=False,
        )

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.module(tokens).flatten(0, 1), targets.flatten())

"""Any composition as a model of ``transformers``, for TRL, PEFT, lm-eval and ``generate`` (extra ``transformers``).

After ``import blockwright.plugins.hub.transformers``, ``AutoModelForCausalLM.from_pretrained(DIR)`` loads what
``blockwright export DIR --family blockwright`` or ``save_pretrained`` wrote, and ``blockwright import`` reads both. The
composition is data in config.json and only registered blocks are built: no remote code, no ``trust_remote_code``.

How this differs from models of transformers: padding is never seen and positions count real tokens, whatever
``position_ids`` a caller leaves out; in a packed row a document begins where ``position_ids`` begin again. An argument
without an effect is refused, or listed in ``PACKING`` or ``LOSS``. Where the configuration alone asks for a cache, rows
of several documents or with padding on the right get none, and neither does training.
Not supported: attention maps, padding inside a document, beams that keep rejected tokens (assisted generation),
resizing the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockwright.blocks.compose import check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.products import linear
from blockwright.blocks.kernels.scoring import PADDING
from blockwright.blocks.layer import Layer
from blockwright.plugins.hub.own import MODEL_TYPE
from blockwright.registry import BlockError, ConfigError

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils.deprecation import deprecate_kwarg
    from transformers.utils.generic import can_return_tuple
    from transformers.utils.output_capturing import capture_outputs

    from blockwright.plugins.hub.transformers_cache import BlockwrightCache, fits_cache
except ImportError as error:
    rule = f"needs transformers, which is not installed completely ({error})"
    raise ConfigError(
        "blockwright.plugins.hub.transformers", None, rule, "pip install 'blockwright[transformers]'"
    ) from None

LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")  # read where there are labels
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # repeat what position_ids say
# Arguments of transformers' models → the value that changes nothing, why no other is possible, and what to do.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "output_attentions": (False, "kernels form no attention maps", "Leave it out"),
    "output_router_logits": (False, "routing is not returned", "Balance with BlockwrightConfig(balance_losses=True)"),
    "is_causal": (True, "every composition is causal", "Leave it out"),
}


class BlockwrightConfig(PreTrainedConfig):
    """The configuration of a composition.

    Args:
        composition: as in ``model.yaml``: its text, or the mapping in it
        balance_losses: whether training follows the gates' balance losses too, with the weights of the composition.
            Their gradient is added once a backward pass: divide the weights by the micro-batches of a step
        use_cache: whether a forward pass outside training returns a cache, where it is not given the argument
        settings: transformers' own: bos_token_id, eos_token_id, pad_token_id, …
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    auto_map: ClassVar[dict[str, str]] = {}  # no remote code; TRL reads it where a class is not of transformers itself

    def __init__(
        self, composition: Any = None, balance_losses: bool = False, use_cache: bool = True, **settings: Any
    ) -> None:
        self.composition = None if composition is None else check(composition)
        self.balance_losses, self.use_cache = balance_losses, use_cache
        if self.composition is not None:
            sizes = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}
            settings |= {theirs: self.composition[ours] for theirs, ours in sizes.items()}
            settings["max_position_embeddings"] = self.composition["max_positions"]
            settings["final_logit_softcapping"] = self.composition["logit_softcap"]
        # A tied head is no tensor of its own here, so there is nothing for transformers to tie.
        super().__init__(**{**settings, "tie_word_embeddings": False})


class RecomputedLayer(GradientCheckpointingLayer, Layer):
    """A layer that transformers can ask to recompute its activations for the gradient, and whose output it records."""


class AddedLoss(torch.autograd.Function):
    """Passes a tensor, and adds a loss to whatever loss its gradient belongs to, as DeepSeek's released code does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=ctx.dtype, device=gradients[0].device)


class BlockwrightPreTrainedModel(PreTrainedModel):
    """What the two models share."""

    config_class = BlockwrightConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["RecomputedLayer"]  # noqa: RUF012 # transformers declares it so
    _can_record_outputs = {"hidden_states": RecomputedLayer}  # noqa: RUF012
    decoder: Decoder

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the decoder is initialised by its own rule."""

    def get_input_embeddings(self) -> Any:
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding, and with it a tied head."""
        self.decoder.embedding = value

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        rule = "the vocabulary is part of the composition"
        raise BlockError("vocab_size", self.config.vocab_size, rule, "Compose a model with another vocab_size")


class BlockwrightModel(BlockwrightPreTrainedModel):
    """A composition without its head: tokens → hidden states. The decoder, with its own names, is ``decoder``.

    Args:
        config: of the composition; a new model has the random weights of seed 0
    """

    def __init__(self, config: BlockwrightConfig) -> None:
        super().__init__(config)
        if config.composition is None:
            raise ConfigError("composition", None, "a model needs a composition", "BlockwrightConfig(composition=…)")
        meta = torch.get_default_device().type == "meta"  # from_pretrained fills it
        self.decoder = compose(config.composition, device="meta" if meta else "cpu")
        for layer in self.decoder.layers:
            layer.__class__ = RecomputedLayer
        self.post_init()

    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockwrightCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as in ``BlockwrightForCausalLM``."""
        self._refuse(more, position_ids)
        # Choose kernels again where transformers or accelerate moved the weights one by one
        device = self.decoder.embedding.weight.device
        if getattr(self, "_chosen_for", None) != device:
            self.decoder.choose_kernels()
            self._chosen_for = device
        tokens, embedded = self._tokens(input_ids, inputs_embeds)
        cache = self._cache(cache, use_cache, tokens, attention_mask, position_ids)
        if cache is None:
            positions, segments = _documents(tokens, attention_mask, position_ids)
            hidden, routings = self.decoder.hidden(tokens, positions, segments, embedded=embedded)
        else:
            caches = cache.prepare(tokens, attention_mask, position_ids)
            hidden, routings = self.decoder.hidden(tokens, caches=caches, embedded=embedded)
        if self.config.balance_losses and torch.is_grad_enabled():
            for loss in (value for r in routings if r is not None for value in r.losses.values()):
                hidden = AddedLoss.apply(hidden, loss)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)

    def _refuse(self, more: Mapping[str, Any], positions: Tensor | None) -> None:
        """Refuse arguments, and settings of the configuration, that would have no effect."""
        asked = {name: getattr(self.config, name, None) for name in REFUSED}
        for name, value in {**asked, **more}.items():
            if name in REFUSED:
                only, rule, remedy = REFUSED[name]
            elif name in PACKING and positions is None:
                only, rule = None, "documents are known by position_ids alone"
                remedy = "Give position_ids that begin again at each document"
            elif name in (*PACKING, "output_hidden_states"):  # the latter: capture_outputs has read it
                continue
            else:
                only, rule, remedy = None, "is no argument of this model", "Leave it out"
            if value is not None and value is not only:
                raise BlockError(name, value, rule, remedy)

    def _cache(
        self, cache: Any, asked: bool | None, tokens: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> BlockwrightCache | None:
        """The cache to fill: the given one; a new one where asked for; else one where the row allows it."""
        recomputes = self.training and torch.is_grad_enabled() and self.is_activation_checkpointing
        if cache is not None and not isinstance(cache, BlockwrightCache):
            rule = "must be a BlockwrightCache, which generate makes by itself"
            raise BlockError("cache", type(cache).__name__, rule, "Leave out cache and cache_implementation")
        if cache is not None and recomputes:
            rule = "recomputing a layer would write its tokens twice"
            raise BlockError("cache", type(cache).__name__, rule, "Leave it out, or gradient_checkpointing_disable()")
        if cache is not None or recomputes or asked is False:
            return cache
        if asked or (self.config.use_cache and not self.training and fits_cache(tokens, mask, positions)):
            return BlockwrightCache(self.decoder)
        return None

    def _tokens(self, ids: Tensor | None, embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if (ids is None) == (embeds is None):
            raise BlockError("input_ids", None, "give either input_ids or inputs_embeds", "Leave one of them out")
        if ids is not None:
            return ids, None
        assert embeds is not None
        return torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device), (
            embeds * self.decoder.embedding_scale
        )


class BlockwrightForCausalLM(BlockwrightPreTrainedModel, GenerationMixin):
    """A composition as transformers' causal language model.

    Args:
        config: of the composition; a new model has the random weights of seed 0
    """

    accepts_loss_kwargs = True  # a trainer gives num_items_in_batch, the denominator of a whole step

    def __init__(self, config: BlockwrightConfig) -> None:
        super().__init__(config)
        self.model = BlockwrightModel(config)
        self.post_init()

    @property
    def decoder(self) -> Decoder:  # type: ignore[override] # an attribute there, and read alone
        """Our decoder."""
        return self.model.decoder

    def get_output_embeddings(self) -> Any:
        """The head; where it is tied, a linear layer that shares the embedding's matrix and is no part of the model."""
        if self.decoder.head is not None:
            return self.decoder.head
        V, D = self.decoder.output_weight.shape
        head = torch.nn.Linear(D, V, bias=False, device="meta")
        head.weight = self.decoder.embedding.weight
        return head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head.

        Raises:
            BlockError: it is the embedding
        """
        if self.decoder.head is None:
            remedy = "Compose the model with tie_embeddings: false, or replace the embedding"
            raise BlockError("tie_embeddings", True, "the head is the embedding", remedy)
        self.decoder.head = new_embeddings

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockwrightCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens → logits, and a loss given labels; arguments as in every causal model of transformers.

        Args:
            input_ids: [B,T]
            attention_mask: [B,T], or [B,S] with a cache: 0 for padding, on either side of a document; with a cache on
                the left only
            position_ids: [B,T]; documents begin where they do not rise by 1; with a cache, one document a row
            cache: from an earlier call
            inputs_embeds: [B,T,D] instead of input_ids, as the embedding gives them (scaled here)
            labels: [B,T], −100 where not scored; shifted here
            use_cache: return a cache; None: as the configuration says, outside training, where a row allows it
            logits_to_keep: compute those of the last n tokens, or of these places, alone; 0 for all
            more: of transformers' loss (``LOSS``); ``return_dict``; ``output_hidden_states``: the input of the first
                layer and the output of each, the last one behind the norm. Between layers of several streams they are
                [B,T,n,D]

        Returns:
            loss, logits, cache and hidden states, as far as asked for

        Raises:
            BlockError: a mask or a cache of another kind, or an argument without an effect
        """
        settings = {name: more.pop(name) for name in LOSS if name in more}
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        found = self.model(*given, **more, return_dict=True)
        hidden = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self._logits(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **settings)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=found.cache, hidden_states=found.hidden_states)

    def _logits(self, hidden: Tensor) -> Tensor:
        """By calling the head, so that an adapter around it takes part."""
        head, cap = self.decoder.head, self.decoder.logit_softcap
        logits = linear(hidden, self.decoder.output_weight) if head is None else head(hidden)
        return logits if cap is None else cap * (logits / cap).tanh()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch: int, length: int
    ) -> Any:
        for name in ("cache_implementation", "cache_config"):
            if (value := getattr(generation_config, name, None)) is not None:
                rule = "a composition has its own caches"
                raise BlockError(name, value, rule, "Leave it out")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = BlockwrightCache(self.decoder, length)


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Refuse a mask that is not 1 for tokens and 0 for padding, [B,T]."""
    if mask.shape != shape:
        remedy = "Give the padding alone"
        raise BlockError("attention_mask", tuple(mask.shape), f"must be {tuple(shape)}", remedy)
    if ((mask != 0) & (mask != 1)).any():
        rule = "must be 1 for tokens and 0 for padding"
        raise BlockError("attention_mask", mask.max().item(), rule, "Separate documents by position_ids")


def _documents(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions [B|1,T] and segments [B,T] of tokens [B,T]: padding is in no document, ``PADDING``.

    Raises:
        BlockError: a mask of another kind, or padding inside a document
    """
    if mask is not None:
        _check_mask(mask, tokens.shape)
        if not mask.all():
            return _padded_documents(mask.bool(), positions)
    if positions is None:
        return torch.arange(tokens.shape[1], device=tokens.device)[None], None
    begins = (positions[:, 1:] != positions[:, :-1] + 1).long()
    if not begins.any():
        return positions, None
    return positions, torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(len(tokens), -1)


def _padded_documents(real: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``_documents``, of rows with padding; ``real`` [B,T]."""
    positions = real.long().cumsum(1) - 1 if positions is None else positions.expand(real.shape)
    places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    last = torch.where(real, places, -1).cummax(1).values
    earlier = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # place of the real token before; −1: none
    rise = positions - positions.gather(1, earlier.clamp(min=0))
    adjacent = earlier == places - 1
    begins = (earlier < 0) | (rise <= 0) | (adjacent & (rise != 1))
    if (real & ~adjacent & ~begins).any():
        rule = "has padding inside a document, where windows and recurrent layers would count it"
        raise BlockError("attention_mask", "…", rule, "Pad on the left or on the right")
    return positions.clamp(min=0), torch.where(real, (real & begins).long().cumsum(1), PADDING)


AutoConfig.register(MODEL_TYPE, BlockwrightConfig, exist_ok=True)
AutoModel.register(BlockwrightConfig, BlockwrightModel, exist_ok=True)
AutoModelForCausalLM.register(BlockwrightConfig, BlockwrightForCausalLM, exist_ok=True)

"""Any composition as a model of ``transformers``, for TRL, PEFT, lm-eval and ``generate`` (extra ``transformers``).

After ``import interop.transformers``, ``AutoModelForCausalLM.from_pretrained(DIR)`` loads what ``blockwright export DIR
--family blockwright`` or ``save_pretrained`` wrote, and ``blockwright import`` reads both. The composition is data in
config.json and only registered blocks are built: no remote code, no ``trust_remote_code``.

How this differs from models of transformers: padding is never seen and positions count real tokens, whatever
``position_ids`` a caller leaves out; in a packed row a document begins where ``position_ids`` begin again.
Not supported: attention maps, beams that keep rejected tokens (assisted generation), resizing the vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from blocks.compose import check, compose
from blocks.decoder import Decoder, Layer
from blocks.kernels.few_rows import linear
from interop.own import MODEL_TYPE
from registry import BlockError, ConfigError, load

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils.deprecation import deprecate_kwarg

    from interop.transformers_cache import BlockwrightCache
except ImportError as error:
    rule = f"needs transformers, which is not installed completely ({error})"
    raise ConfigError("interop.transformers", None, rule, "pip install 'blockwright[transformers]'") from None


class BlockwrightConfig(PreTrainedConfig):
    """The configuration of a composition.

    Args:
        composition: as in ``model.yaml``: its text, or the mapping in it
        balance_losses: whether training follows the gates' balance losses too, with the weights of the composition.
            Their gradient is added once a backward pass: divide the weights by the micro-batches of a step
        settings: transformers' own: bos_token_id, eos_token_id, pad_token_id, …
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    auto_map: ClassVar[dict[str, str]] = {}  # no remote code; TRL reads it where a class is not of transformers itself

    def __init__(self, composition: Any = None, balance_losses: bool = False, **settings: Any) -> None:
        load()
        self.composition = None if composition is None else check(composition)
        self.balance_losses = balance_losses
        if self.composition is not None:
            sizes = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}
            settings |= {theirs: self.composition[ours] for theirs, ours in sizes.items()}
            settings["max_position_embeddings"] = self.composition["max_positions"]
            settings["final_logit_softcapping"] = self.composition["logit_softcap"]
        # A tied head is no tensor of its own here, so there is nothing for transformers to tie.
        super().__init__(**{**settings, "tie_word_embeddings": False})


class RecomputedLayer(Layer):
    """A layer that transformers can ask to recompute its activations for the gradient."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None

    def forward(self, *arguments: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(super().forward, *arguments)
        return super().forward(*arguments)


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

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the decoder is initialised by its own rule."""

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

    def get_input_embeddings(self) -> Any:
        return self.decoder.embedding

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockwrightCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as in ``BlockwrightForCausalLM``."""
        self._follow_device()
        if attention_mask is not None and attention_mask.ndim != 2:
            raise BlockError("attention_mask", tuple(attention_mask.shape), "must be [B,T]", "Give the padding alone")
        tokens, embedded = self._tokens(input_ids, inputs_embeds)
        recomputes = self.training and torch.is_grad_enabled() and self.is_activation_checkpointing
        if cache is None and use_cache and not recomputes:
            cache = BlockwrightCache(self.decoder)
        if cache is None:
            positions, segments = _documents(tokens, attention_mask, position_ids)
            hidden, routings = self.decoder.hidden(tokens, positions, segments, embedded=embedded)
        else:
            if not isinstance(cache, BlockwrightCache):
                rule = "must be a BlockwrightCache, which generate makes by itself"
                raise BlockError("cache", type(cache).__name__, rule, "Leave out cache and cache_implementation")
            caches = cache.prepare(tokens, attention_mask)
            hidden, routings = self.decoder.hidden(tokens, caches=caches, embedded=embedded)
        if self.config.balance_losses and torch.is_grad_enabled():
            for loss in (value for r in routings if r is not None for value in r.losses.values()):
                hidden = AddedLoss.apply(hidden, loss)
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)

    def _tokens(self, ids: Tensor | None, embeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if (ids is None) == (embeds is None):
            raise BlockError("input_ids", None, "give either input_ids or inputs_embeds", "Leave one of them out")
        if ids is not None:
            return ids, None
        assert embeds is not None
        return torch.zeros(embeds.shape[:2], dtype=torch.int64, device=embeds.device), (
            embeds * self.decoder.embedding_scale
        )

    def _follow_device(self) -> None:
        """Choose kernels again where transformers or accelerate moved the weights one by one."""
        device = self.decoder.embedding.weight.device
        if getattr(self, "_chosen_for", None) != device:
            self.decoder.choose_kernels()
            self._chosen_for = device


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
    def decoder(self) -> Decoder:
        """Our decoder."""
        return self.model.decoder

    def get_input_embeddings(self) -> Any:
        return self.decoder.embedding

    def get_output_embeddings(self) -> Any:
        """The head; where it is tied, a linear layer that shares the embedding's matrix and is no part of the model."""
        if self.decoder.head is not None:
            return self.decoder.head
        V, D = self.decoder.output_weight.shape
        head = torch.nn.Linear(D, V, bias=False, device="meta")
        head.weight = self.decoder.embedding.weight
        return head

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
        return_dict: bool | None = None,
        **loss_settings: Any,
    ) -> Any:
        """Tokens → logits, and a loss given labels; arguments as in every causal model of transformers.

        Args:
            input_ids: [B,T]
            attention_mask: [B,T], or [B,S] with a cache: 0 for padding, on either side; with a cache on the left only
            position_ids: [B,T]; without a mask, documents begin where they do not rise by 1
            cache: from an earlier call
            inputs_embeds: [B,T,D] instead of input_ids, as the embedding gives them (scaled here)
            labels: [B,T], −100 where not scored; shifted here
            use_cache: return a cache
            logits_to_keep: compute those of the last n tokens, or of these places, alone; 0 for all
            loss_settings: of transformers' loss: num_items_in_batch

        Raises:
            BlockError: a mask or a cache of another kind
        """
        given = (input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        found = self.model(*given)
        hidden = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self._logits(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_settings)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, cache=found.cache)
        return output if return_dict is not False else output.to_tuple()

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
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = BlockwrightCache(self.decoder, length)


def _documents(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions [B|1,T] and segments [B,T] of tokens [B,T]: padding is a document of its own."""
    if mask is not None and not mask.all():
        real = mask.long()
        counted = (real.cumsum(1) - 1).clamp(min=0)
        return counted if positions is None else positions.clamp(min=0), real
    if positions is None:
        return torch.arange(tokens.shape[1], device=tokens.device)[None], None
    begins = (positions[:, 1:] != positions[:, :-1] + 1).long()
    if not begins.any():
        return positions, None
    return positions, torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(len(tokens), -1)


AutoConfig.register(MODEL_TYPE, BlockwrightConfig, exist_ok=True)
AutoModel.register(BlockwrightConfig, BlockwrightModel, exist_ok=True)
AutoModelForCausalLM.register(BlockwrightConfig, BlockwrightForCausalLM, exist_ok=True)

"""Strict reading of ``config.json``: every key is translated, known to have no effect, or refused by name.

A place in a composition and in a built decoder has a name (``show``).

A family's settings are rows of one table that work in both directions: ``read`` puts a value of config.json into the
composition, ``write`` puts what the built decoder has into config.json.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, did_you_mean


def put(model: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path of a composition."""
    *parents, last = path.split(".")
    reduce(lambda node, key: node.setdefault(key, {}), parents, model)[last] = value


def show(decoder: Decoder, place: str | Callable[[Decoder], Any]) -> Any:
    """An attribute of a built decoder by its dotted path, or the result of a function.

    The first segment may be ``first`` (layer 0), ``dense`` or ``sparse`` (the first layer without or with routed
    experts), ``full`` or ``linear`` (the first layer whose attention reads all tokens, or remembers a state).

    Raises:
        AttributeError: this decoder has no such attribute
    """
    if callable(place):
        return place(decoder)
    root, _, rest = place.partition(".")
    start = STARTS[root](decoder) if root in STARTS else getattr(decoder, root)
    return reduce(getattr, rest.split(".") if rest else [], start)


def sparse(decoder: Decoder) -> Any:
    """The first layer with routed experts.

    Raises:
        AttributeError: there is none
    """
    return _layer(decoder, routed=True)


def dense(decoder: Decoder) -> Any:
    """The first layer without routed experts.

    Raises:
        AttributeError: there is none
    """
    return _layer(decoder, routed=False)


def full(decoder: Decoder) -> Any:
    """The first layer whose attention reads all tokens, or those of a window.

    Raises:
        AttributeError: there is none
    """
    return _first(decoder, lambda layer: not isinstance(layer.attention, Recurrent))


def linear(decoder: Decoder) -> Any:
    """The first layer whose attention remembers a state of fixed size.

    Raises:
        AttributeError: there is none
    """
    return _first(
        decoder, lambda layer: isinstance(layer.attention, Recurrent) and not getattr(layer.attention, "empty", False)
    )


def _layer(decoder: Decoder, routed: bool) -> Any:
    return _first(decoder, lambda layer: hasattr(layer.ffn, "gating") == routed)


def _first(decoder: Decoder, wanted: Callable[[Any], bool]) -> Any:
    for layer in decoder.layers:
        if wanted(layer):
            return layer
    raise AttributeError("no such layer")


STARTS: dict[str, Callable[[Decoder], Any]] = {
    "first": lambda decoder: decoder.layers[0],
    "dense": dense,
    "sparse": sparse,
    "full": full,
    "linear": linear,
}


REQUIRED = object()

PROVENANCE = "origin of the file, and marks of the tools that wrote it"
STORAGE = "storage dtype, which the tensors carry themselves"
TRAINING = "training only"
GENERATION = "generation defaults, repeated in generation_config.json"
TOKENS = "ids of tokens"
OUTPUTS = "what transformers returns and which kernel it takes, not what the model computes"

_IDLE = {
    PROVENANCE: """architectures auto_map transformers_version _name_or_path _model_name_or_path name_or_path
        _commit_hash tokenizer_class unsloth_fixed unsloth_version finetuning_task is_llama_config rope_interleaved
        transformers.js_config""",
    STORAGE: "torch_dtype dtype use_bfloat16",
    TRAINING: """initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop pretraining_tp
        output_router_logits router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux ep_size
        gradient_checkpointing tf_legacy_loss""",
    GENERATION: """bos_token eos_token unk_token sep_token pad_token cls_token mask_token
        use_cache cache_implementation cache_config max_cache_len max_length min_length max_new_tokens min_new_tokens
        max_time stop_strings do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k
        top_p top_h min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
        length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size prefix bad_words_ids
        force_words_ids constraints suppress_tokens begin_suppress_tokens sequence_bias remove_invalid_values
        renormalize_logits token_healing guidance_scale watermarking_config exponential_decay_length_penalty
        penalty_alpha dola_layers low_memory task_specific_params is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind assistant_early_exit
        assistant_ensemble_weight target_lookbehind speculation_type prompt_lookup_num_tokens max_matching_ngram_size
        use_mtp prefill_chunk_size compile_config disable_compile continuous_batching_config _from_model_config""",
    OUTPUTS: """output_attentions output_hidden_states output_scores output_logits output_past return_dict
        return_dict_in_generate tie_last_hidden_states problem_type id2label label2id num_labels _num_labels torchscript
        chunk_size_feed_forward is_encoder_decoder is_decoder attn_implementation _attn_implementation
        _attn_implementation_autoset _flash_attn_2_enabled experts_implementation _experts_implementation""",
}
IDLE = {key: reason for reason, keys in _IDLE.items() for key in keys.split()}


def idle(key: str) -> str | None:
    """Why a key changes no logit of any family; None for one that is translated, refused, or ignored on request.

    These are the keys that transformers writes for every model, whatever its family, and has written in the past.
    """
    return TOKENS if re.fullmatch(r"\w+_token_ids?", key) else IDLE.get(key)


# Settings of transformers' base class that no family has; each passes at the value by which it is absent.
ABSENT: dict[str, Any] = {
    "add_cross_attention": False,
    "pruned_heads": {},
    "rm_head": False,
    "tie_encoder_decoder": False,
}
# Read here, never in a family's table.
ALWAYS_READ = {"model_type", "quantization_config"}


class Config:
    """The contents of a config.json, recording which keys have been read. Null counts as absent.

    Args:
        values: the contents
        mtp: whether to keep multi-token prediction heads
        ignored: keys that the user declares to have no effect
    """

    def __init__(self, values: Mapping[str, Any], mtp: bool = False, ignored: Collection[str] = ()) -> None:
        self.values, self.mtp, self.ignored = dict(values), mtp, frozenset(ignored)
        self.taken = set(ALWAYS_READ)

    def take(self, *names: str, kind: type | None = None, default: Any = REQUIRED) -> Any:
        """The value of the first of ``names`` that is present, else the default.

        Raises:
            ConfigError: the key is required and missing, the value has the wrong type, or two names contradict each
                other
        """
        self.taken.update(names)
        given = [name for name in names if self.values.get(name) is not None]
        for name in given[1:]:
            if self.values[name] != self.values[given[0]]:
                rule = f"contradicts {given[0]} = {self.values[given[0]]}"
                raise refusal(name, self.values[name], rule, "Keep the one that the model was trained with")
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if kind is float:
                return number(name, value)
            if kind is not None and type(value) is not kind:
                raise refusal(name, value, f"must be of type {kind.__name__}", "Correct the value in config.json")
            return value
        if default is REQUIRED:
            raise refusal(names[0], None, "is required", "Use a config.json that has it")
        return default

    def refuse_unread(self, family: str) -> None:
        """Refuse a key with a value that was not read, and an ``ignored`` key that cannot be ignored.

        ``false``, 0 and empty values too: they may switch off what a family does by default.
        """
        for name in sorted(self.ignored):
            if name in self.taken & self.values.keys():
                rule = f"{family} reads this setting: without it the model would compute something else"
                raise ConfigError("--ignore", name, rule, f"Leave out --ignore {name}")
            if name not in self.values:
                unread = [key for key in self.values if key not in self.taken and not idle(key)]
                remedy = did_you_mean(name, unread, "Leave it out: this family reads every key of it")
                raise ConfigError("--ignore", name, "config.json has no such key", remedy)
        for name, value in self.values.items():
            absent = value is None or (name in ABSENT and value == ABSENT[name])
            if name not in self.taken | self.ignored and not (absent or idle(name)):
                rule = f"{family} does not read this setting, so its effect would be lost"
                raise refusal(name, value, rule, f"If you know that it changes no logit, add --ignore {name}")


def refusal(key: str, value: Any, rule: str, remedy: str) -> ConfigError:
    """A ConfigError for a key of config.json."""
    return ConfigError(f"config.json: {key}", value, rule, remedy)


def number(key: str, value: Any) -> float:
    """Check that a number is finite and not negative, as all numbers of config.json must be.

    Raises:
        ConfigError: not a number, negative, NaN, infinite, or an integer beyond float range
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        rule = "must be a finite number and not negative"
        raise refusal(key, value, rule, "Correct the value in config.json")
    return float(value)


class Setting(Protocol):
    """A row of a family's table of settings."""

    def read(self, config: Config, model: dict[str, Any]) -> None:
        """Read from config.json into a composition."""

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        """Write from a built decoder into config.json."""


@dataclass(frozen=True)
class Key:
    """A number or switch that exists on both sides.

    Args:
        theirs: key in config.json
        ours: path in the composition
        shown: where the built decoder has it, see ``show``
        kind: type of the value
        default: the meaning of an absent key, or a function of the Config that returns it
        also: other keys under which it is read but not written
    """

    theirs: str
    ours: str
    shown: str | Callable[[Decoder], Any]
    kind: type = int
    default: Any = REQUIRED
    also: tuple[str, ...] = ()

    def read(self, config: Config, model: dict[str, Any]) -> None:
        default = self.default(config) if callable(self.default) else self.default
        put(model, self.ours, config.take(self.theirs, *self.also, kind=self.kind, default=default))

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        config[self.theirs] = show(decoder, self.shown)


@dataclass(frozen=True)
class Choice:
    """A string in config.json that stands for a value of ours.

    Args:
        theirs: key in config.json
        ours: path in the composition
        shown: where the built decoder has it
        words: their string → our value; of several strings for one value, the first is written
        default: their string when the key is absent
    """

    theirs: str
    ours: str
    shown: str | Callable[[Decoder], Any]
    words: Mapping[str, Any]
    default: Any = REQUIRED

    def read(self, config: Config, model: dict[str, Any]) -> None:
        word = config.take(self.theirs, default=self.default)
        if not isinstance(word, str) or word not in self.words:
            raise refusal(self.theirs, word, "is not supported", f"Known: {', '.join(self.words)}")
        put(model, self.ours, self.words[word])

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        value = show(decoder, self.shown)
        config[self.theirs] = next(word for word, known in self.words.items() if known == value)


@dataclass(frozen=True)
class Fixed:
    """A setting with one supported value; any other is refused.

    Args:
        theirs: key in config.json
        value: the supported value, also the meaning of an absent key
        also: equivalent values
        written: whether to write it
    """

    theirs: str
    value: Any
    also: tuple[Any, ...] = ()
    written: bool = True

    def read(self, config: Config, model: dict[str, Any]) -> None:
        value = config.take(self.theirs, default=self.value)
        if not any(value == allowed and type(value) is type(allowed) for allowed in (self.value, *self.also)):
            remedy = "Checkpoints with another value cannot be imported"
            raise refusal(self.theirs, value, f"must be {self.value!r}: the other is not implemented", remedy)

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        if self.written:
            config[self.theirs] = self.value


@dataclass(frozen=True)
class Unused:
    """A setting that does not apply to this composition, whatever its value: ignored on read, not written."""

    theirs: str

    def read(self, config: Config, model: dict[str, Any]) -> None:
        config.take(self.theirs, default=None)

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Given:
    """Settings that must be present: the family has defaults that the rows which read them have not.

    Args:
        theirs: their keys
        none: whether null is a value of them, other than what is absent
    """

    theirs: tuple[str, ...]
    none: bool = False

    def read(self, config: Config, model: dict[str, Any]) -> None:
        for name in self.theirs:
            if not (self.none and name in config.values):
                config.take(name)

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """Several keys that belong together, translated by a pair of functions."""

    reader: Callable[[Config, dict[str, Any]], None]
    writer: Callable[[Decoder, dict[str, Any]], None]

    def read(self, config: Config, model: dict[str, Any]) -> None:
        self.reader(config, model)

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        self.writer(decoder, config)

"""The metadata of a GGUF file, read strictly: each key has a type, is listed without an effect, or is refused.

A key that is not known passes with the value 0, false or "": so llama.cpp writes settings of other architectures that
are off. Where another value is the one without an effect, the key is in ``ONLY``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blockwright.registry import ConfigError
from blockwright.registry.schema import conforms, fault

_IDLE = {
    "where the file came from, and how it was made": r"""GGUF\..*|general\.(?!architecture$).*|quantize\..*
        |split\.(no|tensors\.count)""",
    "of SentencePiece, whose tokenizers are not rebuilt": r"""tokenizer\.ggml\.(scores|add_space_prefix
        |remove_extra_whitespaces|precompiled_charsmap|token_type_count|escape_whitespaces|treat_whitespace_as_suffix)""",
    "tokens that other programs use by name": r"""tokenizer\.ggml\.(fim_\w+|prefix|suffix|middle|mask|cls|seperator
        |separator|eom)_(token_id|id)""",
    "beside the tokens, which are read": r"tokenizer\.(huggingface\.json|rwkv\.world)",
    "further chat templates; the default one is read": r"tokenizer\.chat_template(s|\..*)",
    "whether the scaled rotation was trained": r"ARCHITECTURE\.rope\.scaling\.finetuned",
    "how the tensors lie": r"ARCHITECTURE\.tensor_data_layout",
}
IDLE = {re.sub(r"\s", "", pattern): reason for reason, pattern in _IDLE.items()}
# Keys of an architecture with one supported value, which is also the meaning of an absent key.
ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
}
REMEDY = "Import the published safetensors, or convert the model again with llama.cpp"


class Metadata:
    """Key → value of a file, recording which keys have been read.

    Args:
        fields: all of them
        where: the file, for errors
    """

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where, self.taken = fields, where, {"general.architecture"}
        self.architecture = self.take("general.architecture", str)

    def refuse(self, key: str, value: Any, rule: str, remedy: str = REMEDY) -> ConfigError:
        """An error at a key, to be raised."""
        shown = value if not isinstance(value, str | list) or len(value) < 99 else f"{value[:60]}…"
        return ConfigError(f"{self.where}: {key}", shown, rule, remedy)

    def own(self, key: str) -> str:
        """The whole name of a key of the architecture."""
        return f"{self.architecture}.{key}"

    def take(self, key: str, hint: Any, default: Any = ...) -> Any:
        """The value of a key.

        Args:
            key: whole name
            hint: its annotation
            default: of an absent key; left out where it is required
        """
        self.taken.add(key)
        value = self.fields.get(key, default)
        if value is ...:
            raise self.refuse(key, None, "is missing")
        if value is not default and not conforms(value, hint):
            raise self.refuse(key, value, fault(value, hint))
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self.take(key, list)
        if not all(isinstance(each, str) for each in value):
            raise self.refuse(key, value, "must be a list of texts")
        return value

    def wholes(self, key: str, length: int) -> list[int]:
        """A list of so many whole numbers."""
        value = self.take(key, list)
        if len(value) != length or not all(type(each) is int for each in value):
            raise self.refuse(key, value, f"must be a list of {length} whole numbers")
        return value

    def refuse_unread(self) -> None:
        """Refuse a key that was not read, and changes what the model computes or may do so."""
        for key, value in self.fields.items():
            name = key.removeprefix(f"{self.architecture}.")
            allowed = ONLY.get(name, (0, False, ""))
            if key in self.taken or any(value == v and type(value) is type(v) for v in allowed):
                continue
            if not any(re.fullmatch(p.replace("ARCHITECTURE", re.escape(self.architecture)), key) for p in IDLE):
                raise self.refuse(key, value, "is not read here, so its effect would be lost")

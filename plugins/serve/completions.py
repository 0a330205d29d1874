"""OpenAI's protocol of completions: a text is continued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le

from blockwright.plugins.serve.body import Fields
from blockwright.plugins.serve.protocol import Json, Order, Protocol, Token, read_order, room_for
from blockwright.plugins.serve.served import Served
from blockwright.registry.ranges import Count

NEW_TOKENS = 16  # OpenAI's default
Likeliest = Annotated[int, Ge(0), Le(20)]
Prompt = str | list[str] | list[int] | list[list[int]]


class Completions(Protocol):
    """``prompt`` → ``text``."""

    path, prefix = "/v1/completions", "cmpl"
    kind = chunk_kind = "text_completion"

    async def read(self, fields: Fields, served: Served) -> Order:
        return await asyncio.to_thread(self._read, fields, served)

    def _read(self, fields: Fields, served: Served) -> Order:
        given = fields.left.get("prompt")
        if isinstance(given, list) and given:  # numbers of items, before each is looked at
            several = not isinstance(given[0], int)
            served.check_texts(len(given) if several else 1, "prompt")
            for ids in given if several else [given]:
                room_for(served, len(ids) if isinstance(ids, list) else 0, None)
        value: Any = fields.need("prompt", Prompt)
        new_tokens = fields.take("max_tokens", Count, NEW_TOKENS)
        likeliest = fields.take("logprobs", Likeliest)
        prompts = [value] if isinstance(value, str) or (value and isinstance(value[0], int)) else value
        if not prompts:
            raise fields.refuse("prompt", value, "must hold a text, or ids of tokens")
        ids = [_ids(prompt, fields, served) for prompt in prompts]
        return read_order(fields, served, ids, new_tokens, likeliest, chat=False)

    def text(self, text: str) -> Json:
        return {"text": text}

    def opening(self) -> Sequence[Json]:
        return ()

    def delta(self, text: str) -> Json:
        return {"text": text}

    def likelihoods(self, tokens: Sequence[Token]) -> Json:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.likeliest) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _ids(prompt: str | list[int], fields: Fields, served: Served) -> list[int]:
    if isinstance(prompt, str):
        return served.encode(prompt, "prompt")
    if not prompt:
        raise fields.refuse("prompt", prompt, "a model continues at least one token")
    return served.check_ids(prompt, "prompt")

"""OpenAI's protocols: completions, in which a text is continued, and chats, in which the model answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le

from blockwright.plugins.serve.body import Fields
from blockwright.plugins.serve.files import Files
from blockwright.plugins.serve.protocol import UNNAMED, Json, Order, Protocol, Token, read_order, room_for
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


ROLES = ("system", "developer", "user", "assistant")


# Fields of a message that clients send back with an earlier answer.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],)}


class Chat(Protocol):
    """``messages`` → ``message``."""

    path, prefix = "/v1/chat/completions", "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    async def read(self, fields: Fields, served: Served) -> Order:
        files = Files.of(served.writer.decoder)
        fields.check_count("messages", served.room)
        found = fields.need("messages", list)
        for each in found:
            Fields(each if isinstance(each, dict) else {}, "messages.").check_count("content", served.room)
        messages = await asyncio.to_thread(lambda: [_message(each, i, files, served) for i, each in enumerate(found)])
        if not messages:
            raise fields.refuse("messages", [], "a conversation has at least one message")
        new_tokens = _new_tokens(fields)
        wanted, likeliest = fields.take("logprobs", bool, False), fields.take("top_logprobs", Likeliest)
        if likeliest is not None and not wanted:
            raise fields.refuse("top_logprobs", likeliest, "has no effect without logprobs = true")
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(served.renderer, served.render, messages)
        # Pictures one by one, since each takes hundreds of megabytes while it is opened.
        ids, media = await loop.run_in_executor(
            served.renderer if files.contents else None, served.encode_chat, text, files
        )
        wanted_likeliest = (likeliest or 0) if wanted else None
        return read_order(fields, served, [ids], new_tokens, wanted_likeliest, chat=True, media=media)

    def text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> Sequence[Json]:
        return ({"delta": {"role": "assistant", "content": "", "refusal": None}},)

    def delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def likelihoods(self, tokens: Sequence[Token]) -> Json:
        content = [
            {**_likelihood(token.text, token.logprob), "top_logprobs": [_likelihood(*each) for each in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _likelihood(text: str, logprob: float) -> Json:
    """A token alone; the bytes of one that is no whole characters are not known."""
    return {"token": text, "logprob": logprob, "bytes": None if text.startswith(UNNAMED) else list(text.encode())}


def _new_tokens(fields: Fields) -> int | None:
    """``max_completion_tokens``, or ``max_tokens``, its former name."""
    new, former = fields.take("max_completion_tokens", Count), fields.take("max_tokens", Count)
    if new is not None and former not in (None, new):
        raise fields.refuse("max_tokens", former, f"contradicts max_completion_tokens = {new}. Leave it out")
    return former if new is None else new


def _message(value: Any, index: int, files: Files, served: Served) -> Json:
    """A message with its role, and its text with marks of files. A developer's is a system message, the former name."""
    fields = Fields(value if isinstance(value, dict) else {}, f"messages.{index}.")
    if not isinstance(value, dict):
        raise Fields({}).refuse(f"messages.{index}", value, "must be an object with a role and content")
    role = fields.need("role", str)
    if role not in ROLES:
        raise fields.refuse("role", role, f"must be one of {', '.join(ROLES)}")
    content = fields.need("content", str | list)
    fields.finish(WITHOUT_EFFECT)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(_part(each, index, files, served) for each in parts)
    return {"role": "system" if role == "developer" else role, "content": text}


def _part(value: Any, index: int, files: Files, served: Served) -> str:
    fields = Fields(value if isinstance(value, dict) else {}, f"messages.{index}.content.")
    kind = fields.take("type", str)
    if kind is not None and kind == files.part:
        text = files.take(fields)
    elif kind == "text":
        text = fields.need("text", str)
        served.refuse_marks([text], "messages")
    else:
        known = "text" if files.part is None else f"text and {files.part}"
        raise fields.refuse("type", kind, f"this model reads {known}", "unsupported_parameter")
    fields.finish({})
    return text

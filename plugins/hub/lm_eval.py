"""``blockwright evaluate --model_args path=RUN --tasks TASKS``: lm-evaluation-harness (extra ``lm_eval``).

``path`` is a run's folder, a checkpoint, or an imported folder; the other options are the harness's own. With
``--apply_chat_template`` questions are written in the format of the run's conversations, else in the template beside
the tokenizer, or in that named by
``--apply_chat_template NAME`` or ``chat=NAME``; an answer then ends at the format's end too. Not supported: several
processes, and generation of several requests at once.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from blockwright.blocks.checkpoint.source import check_there
from blockwright.blocks.generation.generate import Continuations, TextStream
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.position.base import alike
from blockwright.lab.chat.conversation import ChatText, own_format
from blockwright.lab.writer import Writer, begin
from blockwright.registry import REFUSED, ConfigError, did_you_mean
from blockwright.registry.reading import Remedy, checked, read

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    rule = f"needs the package lm_eval, which is not installed completely ({error})"
    missing = ConfigError(
        "blockwright.plugins.hub.lm_eval", None, rule, "Install it: pip install 'blockwright[lm_eval]'"
    )
    if __name__ != "__main__":
        raise missing from None
    print(missing.render(), file=sys.stderr)
    sys.exit(REFUSED)

PATH = "--model_args path"
_log = logging.getLogger(__name__)

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness's names, by priority
KWARGS = "generation_kwargs"  # of a task of the harness
Stops = Annotated[tuple[str, ...] | None, Remedy('Write e.g. until: ["\\n\\n"]')]
SAMPLING = tuple(Sampling.__dataclass_fields__)
GENERATION = {"until", "do_sample", *LENGTHS, *SAMPLING}
Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # request, context tokens, tokens to score


@register_model("blockwright")
class Blockwright(TemplateLM):
    """A decoder as a language model of the harness.

    Args:
        path: a run's folder, a *.ckpt, or the OUT of blockwright import
        batch_size: requests scored at once; ``auto`` is 8
        max_batch_size: ignored; the harness passes it
        max_length: longest sequence in tokens; None for the model's max_positions
        max_gen_toks: maximum number of generated tokens, if the task sets none
        dtype: of the computation
        device: of the computation; the harness passes cuda:0 by default, replaced by the CPU without a GPU
        add_bos_token: whether to prepend the token that begins a document to every context
        seed: of the sampling
        chat: format of conversations, for ``--apply_chat_template``; None for that of the model
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "float32",
        device: str | None = None,
        add_bos_token: bool = False,
        seed: int = 0,
        chat: str | None = None,
    ) -> None:
        super().__init__()
        size = 8 if isinstance(batch_size, str) and batch_size.startswith("auto") else batch_size
        counts = {
            "batch_size": size,
            "max_gen_toks": max_gen_toks,
            "max_length": 1 if max_length is None else max_length,
        }
        self.batch_size = {name: _count(name, value, 1) for name, value in counts.items()}["batch_size"]
        usable = device if device and (torch.cuda.is_available() or not device.startswith("cuda")) else "cpu"
        writer = Writer.open(str(path), dtype=dtype, device=usable, word=PATH)
        self.words, self.decoder = writer.words, writer.decoder
        self._device = self.decoder.output_weight.device
        self.max_length = max_length or self.decoder.config["max_positions"]
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._prefix = self.words.eos if self.words.bos is None else self.words.bos
        asked = "model_args.add_bos_token"
        self._format = chat or own_format(Path(str(path)), self.words)
        self._chat: ChatText | None = None
        self._in_front = [begin(self.words, asked, "Leave add_bos_token out")] if add_bos_token else []

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Blockwright:
        """Create the model from ``--model_args``.

        Raises:
            ConfigError: an unknown argument, or no ``path``
        """
        known = [name for name in inspect.signature(cls).parameters if name != "self"]
        for name, value in arg_dict.items():
            if name not in known:
                raise ConfigError(f"model_args.{name}", value, "is not a model argument", did_you_mean(name, known))
        if "path" not in arg_dict:
            raise ConfigError("model_args.path", None, "is required", "Write --model_args path=RUN")
        return super().create_from_arg_obj(arg_dict, additional_config)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.words.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Part of the keys of request caches."""
        return f"blockwright-{self.words.fingerprint()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the format of conversations, and return what its text depends on, a part of the keys of caches."""
        if chat_template is False or chat_template is None:
            return None
        return self._chosen(chat_template if isinstance(chat_template, str) else None).chat.identity()

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, its special tokens marked (lab/chat/conversation.py)."""
        return self._chosen().render(chat_history, add_generation_prompt)

    def _chosen(self, name: str | None = None) -> ChatText:
        if self._chat is None or name:
            if name is None and self._format is None:
                rule = "the model has no format of conversations, so it must be named"
                raise ConfigError(
                    "model_args.chat", None, rule, "Write --apply_chat_template chatml, or another format"
                )
            self._chat = ChatText(name or self._format or "", self.words)
        return self._chat

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text."""
        front = [] if add_special_tokens is False else self._in_front
        return [*front, *(self.words.encode(string).tolist() if self._chat is None else self._chat.encode(string))]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding gives it."""
        found: dict[int, tuple[float, bool]] = {}
        lengths = [min(len(context) + len(scored) - 1, self.max_length) for _, context, scored in requests]
        for batch in alike(self.decoder, lengths, self.batch_size):
            rows = [[*requests[i][1], *requests[i][2]][-self.max_length - 1 :] for i in batch]
            logits = self.decoder(self._padded([row[:-1] for row in rows])).float()
            for i, row, scores in zip(batch, rows, logits, strict=True):
                n = min(len(requests[i][2]), len(row) - 1)
                found[i] = _score(scores[len(row) - 1 - n : len(row) - 1], row[len(row) - n :])
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, every token predicted once with the longest possible context."""
        totals = []
        for request in requests:
            tokens = self.words.encode(request.args[0]).tolist()
            windows = get_rolling_token_windows(tokens, self._prefix, max_seq_len=self.max_length, context_len=1)
            pieces: list[Scored] = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pieces)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to an end token of the model or the first stop string."""
        texts, short = [], _Short()
        for request in requests:
            context, settings = request.args
            for key in settings:
                if key not in GENERATION:
                    rule = "is not a supported generation setting"
                    raise ConfigError(f"generation_kwargs.{key}", settings[key], rule, did_you_mean(key, GENERATION))
            texts.append(self._continue(context, settings, short))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        short.warn(len(texts), self.max_length)
        return texts

    def _continue(self, context: str, settings: dict[str, Any], short: _Short) -> str:
        """The continuation of a context, which is kept; the answer gets the room that it leaves, at least a token."""
        # The stop strings of a request
        until, sampling = list(checked(settings.get("until"), Stops, f"{KWARGS}.until") or ()), _sampling(settings)
        asked = next((name for name in LENGTHS if settings.get(name) is not None), None)
        most = self.max_gen_toks if asked is None else _count(f"generation_kwargs.{asked}", settings[asked], 0)
        whole = self.tok_encode(context) or [self._prefix]
        tokens = whole[-max(1, self.max_length - 1) :]
        room = min(most, self.max_length - len(tokens))
        short.prompts += len(tokens) < len(whole)
        short.answers += room < most
        ends = self.words.stop_tokens(until) | (self._chat.ends if self._chat else frozenset())
        rows = Continuations(self.decoder, [tokens], room, sampling, seed=self.seed, stop_tokens=ends)
        text, pieces = TextStream(self.words.decode, until), []
        for (token,) in rows:
            assert token is not None
            pieces.append(text.push(token))
            if text.ended:
                break
        return "".join([*pieces, text.close()])

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B,T], padded on the right, which a causal model does not see."""
        length = max(map(len, rows))
        return torch.tensor(
            [[*row, *[0] * (length - len(row))] for row in rows], device=self._device, dtype=torch.int64
        )


@dataclass
class _Short:
    """How many requests did not fit the model.

    Args:
        prompts: that lost their beginning
        answers: that were given less room than was asked
    """

    prompts: int = 0
    answers: int = 0

    def warn(self, requests: int, longest: int) -> None:
        """Warn once, if there were any."""
        if self.answers:
            lost = f"; {self.prompts:,} prompts are longer than that, and lost their beginning" if self.prompts else ""
            _log.warning(
                "%s of %s answers had less room than max_gen_toks: prompts are kept, and sequences have at most %s "
                "tokens%s",
                *(f"{n:,}" for n in (self.answers, requests, longest)),
                lost,
            )


def _count(name: str, value: Any, least: int) -> int:
    """An integer option; the command line may pass it as text."""
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) < least:
        raise ConfigError(name, value, f"must be a whole number, at least {least}", f"Write e.g. {name}=8")
    return int(text)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Sampling parameters: greedy, unless ``do_sample`` or a temperature above 0 is set."""
    given = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    drawn = checked(settings.get("do_sample"), bool | None, f"{KWARGS}.do_sample")
    sampling = read(Sampling, given, KWARGS)
    greedy = not drawn if drawn is not None else not given.get("temperature")
    return replace(sampling, temperature=0.0) if greedy else sampling


def _score(logits: Tensor, targets: list[int]) -> tuple[float, bool]:
    """Logits [n,V] and the n next tokens → their log-likelihood, and whether each was the likeliest."""
    wanted = torch.tensor(targets, device=logits.device, dtype=torch.int64)
    nats = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == wanted).all())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness's command line, which reads ``sys.argv``, with this model as its default.

    Args:
        arguments: None for those of the process
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours = not any(a.split("=")[0] in ("--model", "-M", "-h", "--help") for a in given)
    sys.argv[1:] = [*given, "--model", "blockwright"] if ours else given
    try:
        if ours:
            # Refuse a path at which nothing is, before the harness looks for its tasks.
            for part in (part for word in given for part in word.removeprefix("--model_args=").split(",")):
                if part.startswith("path="):
                    check_there(Path(part.removeprefix("path=")), PATH)
        from lm_eval.__main__ import cli_evaluate  # which loads every task

        cli_evaluate()
    except ConfigError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()

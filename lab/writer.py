"""Generate text with a model and its tokenizer::

    from blockwright.lab.writer import Writer
    writer = Writer.open("logs/train/runs/RUN")
    print(writer.write("ROMEO:", 200, temperature=0.8)[0])

Conversations: lab/chat. Not supported: several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from blockwright.blocks.checkpoint.source import Source, build, open_source, usable_device, usable_dtype
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.drafts import Drafter
from blockwright.blocks.generation.generate import Continuations, TextStream
from blockwright.blocks.generation.memory import Memory
from blockwright.blocks.generation.sample import Acceptance, NotFiniteError, Sampling
from blockwright.blocks.generation.speculation import Speculation
from blockwright.blocks.input import Media
from blockwright.lab.attachment import Attachment, refuse_marks
from blockwright.registry import BlockError, ConfigError
from blockwright.training.data.tokenizers.pretrained import Pretrained
from blockwright.training.data.tokenizers.rebuild import rebuild
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Settings of a generation.

    Args:
        new_tokens: maximum number of new tokens; the end of a document ends a text earlier
        sampling: sampling parameters
        stops: strings that end a text, excluded from it; the string of a special token stands for that token
        seed: prompt i draws from seed + i, so it gives the same text whatever the other prompts are
        bits: of the caches' numbers, 8, 6 or 4; None for exact ones
        bos: whether to prepend the token that begins a document to every prompt
        attached: files that marks in the prompts stand for
    """

    new_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    seed: int = 0
    bits: int | None = None
    bos: bool = False
    attached: Attachment | None = None


class Writer:
    """A model and its tokenizer, which has the tokens that begin a document (``bos``) and end a text (``ends``).

    Args:
        decoder: in evaluation mode
        words: its tokenizer

    Attributes:
        drafts: where drafts of the next tokens come from, which make generation faster and change no token; None, the
            default, for none
        acceptance: of the drafts of the last generation
    """

    def __init__(self, decoder: Decoder, words: Tokenizer) -> None:
        self.decoder, self.words = decoder, words
        self.drafts: Drafter | None = None
        self.acceptance = Acceptance()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str | None = None,
        word: str = "MODEL",
        visits: int | None = None,
    ) -> Writer:
        """Load a model with its tokenizer; ``blockwright.load`` loads the same model without one.

        Args:
            path: as in ``blockwright.load``
            dtype: of the computation
            device: of the computation; None for a GPU if there is one
            word: of the command, by which the path is named
            visits: of the layers of its loop; None: as many as the model has

        Raises:
            ConfigError: there is no model, no tokenizer, or no such dtype or device
        """
        wanted = usable_dtype(dtype)
        where = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = Path(path)
        source = open_source(folder, word)
        words = tokenizer_of(source, folder)
        decoder = build(source, dtype=wanted, device=where)
        return cls(decoder if visits is None else _visited(decoder, visits), words)

    def write(
        self,
        prompts: str | Sequence[str],
        new_tokens: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stops: Sequence[str] = (),
        seed: int = 0,
        bits: int | None = None,
    ) -> list[str]:
        """Continuations, without their prompts.

        Args:
            prompts: one, or several, which are batched
            new_tokens, stops, seed, bits: see ``Request``
            temperature, top_k, top_p, min_p, repetition_penalty: see ``Sampling``

        Raises:
            ConfigError: a prompt is empty, or an option out of its range
        """
        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        except BlockError as error:
            raise at_its_option(error) from None
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [""] * len(given)
        for row, piece in self.stream(given, Request(new_tokens, sampling, tuple(stops), seed, bits)):
            texts[row] += piece
        return texts

    def stream(
        self, prompts: Sequence[str], request: Request, ended: Callable[[int, str, int], None] | None = None
    ) -> Iterator[tuple[int, str]]:
        """Yield pieces of text as they come, each with the number of its prompt.

        Args:
            ended: called when a text has ended, with its prompt's number, why (``end`` of the document, ``stop`` or
                ``length``), and its number of tokens

        Raises:
            ConfigError: at once, for an invalid prompt or request
        """
        self.cached(request.bits)
        ids, media = self._encoded(prompts, request)
        return self._pieces(ids, request, self._continued(ids, request, media), ended)

    def _pieces(
        self,
        ids: Sequence[Sequence[int]],
        request: Request,
        rows: Continuations | Speculation,
        ended: Callable[[int, str, int], None] | None,
    ) -> Iterator[tuple[int, str]]:
        texts = [TextStream(self.decode, request.stops) for _ in ids]
        counts, open_rows = [0] * len(ids), set(range(len(ids)))

        def close(row: int, why: str) -> Iterator[tuple[int, str]]:
            open_rows.discard(row)
            if rest := texts[row].close():
                yield row, rest
            if ended:
                ended(row, why, counts[row])

        for tokens in self.sound(rows):
            for row in sorted(open_rows):
                token = tokens[row]
                if token is None:
                    yield from close(row, "end")
                    continue
                counts[row] += 1
                if piece := texts[row].push(token):
                    yield row, piece
                if texts[row].ended:
                    rows.end(row)
                    yield from close(row, "stop")
        for row in sorted(open_rows):
            yield from close(row, "end" if rows.ended[row] else "length")

    def _encoded(self, prompts: Sequence[str], request: Request) -> tuple[list[list[int]], Media]:
        if request.attached is None:
            refuse_marks(self.decoder, prompts)
            return [self.encode(prompt, request.bos) for prompt in prompts], {}
        ids, media = request.attached.encode(self.decoder, prompts, self.encode)
        front = [begin(self.words, "--bos", "Leave --bos out")] if request.bos else []
        return [[*front, *row] for row in ids], media

    def _continued(self, ids: Sequence[Sequence[int]], request: Request, media: Media) -> Continuations | Speculation:
        given = (self.decoder, ids, request.new_tokens, request.sampling)
        stops = self.words.stop_tokens(request.stops)
        try:
            if self.drafts is None:
                return Continuations(*given, seed=request.seed, stop_tokens=stops, bits=request.bits, media=media)
            # Refuse prompts that are more than text, where drafts are made.
            if media:
                rule = f"drafts are of text, and the prompts have {', '.join(media)}"
                raise BlockError("drafts", None, rule, "Leave --drafts out")
            rows = Speculation(*given, drafts=self.drafts, seed=request.seed, stop_tokens=stops, bits=request.bits)
            self.acceptance = rows.acceptance
            return rows
        except BlockError as error:
            raise at_its_option(error) from None
        except NotImplementedError:
            raise self._no_cache() from None

    def sound(self, rows: Iterator[T]) -> Iterator[T]:
        """Tokens as they come.

        Raises:
            ConfigError: the model's logits are not finite
        """
        try:
            yield from rows
        except NotFiniteError:
            rule = "its logits are not finite, so no token can be drawn: it has diverged, or overflows --dtype"
            remedy = "Name an earlier checkpoint, or write --dtype float32"
            raise ConfigError("MODEL", self.decoder.read_from, rule, remedy) from None

    def cached(self, bits: int | None) -> str:
        """How caches hold numbers: ``exact``, ``4 bits``, ``4 bits in 2 of 4 layers``.

        Raises:
            ConfigError: at ``--bits``: every cache stays exact, or the model has none
        """
        if bits is None:
            return "exact"
        try:
            quantise = [getattr(cache, "quantises", True) for cache in self.decoder.new_caches(1, 1, bits)]
        except BlockError as error:
            raise at_its_option(error) from None
        except NotImplementedError:
            raise self._no_cache() from None
        if not any(quantise):
            rule = "changes nothing: this model remembers states or averages alone, which stay exact"
            raise ConfigError("--bits", bits, rule, "Leave it out")
        return f"{bits} bits" + ("" if all(quantise) else f" in {sum(quantise)} of {len(quantise)} layers")

    def memory(self, room: int, bits: int | None = None) -> Memory:
        """Caches of a text that is continued again and again.

        Raises:
            ConfigError: the model has none, or no positions for ``room`` tokens, or ``bits`` change nothing
        """
        self.cached(bits)
        try:
            return Memory(self.decoder, room, bits)
        except BlockError as error:
            raise ConfigError("--context", room, error.rule, error.remedy) from None
        except NotImplementedError:
            raise self._no_cache() from None

    def _no_cache(self) -> ConfigError:
        rule = "an attention of this model has no new_cache, but generation needs a cache"
        return ConfigError("MODEL", self.decoder.config["attention"], rule, "Give the block a new_cache")

    def encode(self, prompt: str, bos: bool = False, option: str = "--prompt") -> list[int]:
        """The ids of a prompt, which ``option`` gave.

        Raises:
            ConfigError: there are none, one is outside the model's vocabulary, no token begins a document, or the
                prompt is no Unicode
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8 arrive as lone surrogates
            raise ConfigError(option, ascii(prompt), "is no text in UTF-8", "Convert it to UTF-8") from None
        front = [begin(self.words, "--bos", "Leave --bos out, and write a prompt")] if bos else []
        ids = [*front, *self.words.encode(prompt).tolist()]
        if not ids:
            remedy = "Write some text, or begin a document: --bos"
            raise ConfigError(option, prompt, "is empty, but a model continues at least one token", remedy)
        self.check_known(ids, option, prompt)
        return ids

    def check_known(self, ids: Sequence[int], option: str, text: str) -> None:
        """Refuse ids of a text that the model has no embedding of.

        Raises:
            ConfigError: at ``option``
        """
        known = self.decoder.config["vocab_size"]
        if max(ids) >= known:
            rule = f"the tokenizer gives id {max(ids)}, but the model has {known}: they do not belong together"
            raise ConfigError(option, text, rule, "Put the tokenizer.json of the model into its folder")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.words.decode(list(ids))


def tokenizer_of(source: Source, folder: Path) -> Tokenizer:
    """The tokenizer that a model was trained with, or the tokenizer.json beside it.

    Raises:
        ConfigError: there is none
    """
    if source.tokenizer is not None:
        return rebuild(source.tokenizer)
    if (folder / "tokenizer.json").is_file():
        return Pretrained(str(folder / "tokenizer.json"))
    raise ConfigError("path", str(folder), "has no tokenizer", "Copy the model's tokenizer.json there")


def begin(words: Tokenizer, option: str, remedy: str) -> int:
    """The token that begins a document.

    Raises:
        ConfigError: at ``option``: the model has none
    """
    if words.bos is None:
        rule = "this model has no token that begins a document: none of its files names a bos_token"
        raise ConfigError(option, True, rule, remedy)
    return words.bos


def at_its_option(error: BlockError) -> ConfigError:
    names = {"new_tokens": "max-new-tokens", "caches": "max-new-tokens"}
    option = names.get(error.parameter, error.parameter.replace("_", "-"))
    remedy = error.remedy.replace(f"{error.parameter}=", f"--{option} ")
    return ConfigError(f"--{option}", error.value, error.rule, remedy)


def _visited(decoder: Decoder, visits: int) -> Decoder:
    try:
        return decoder.with_visits(visits)
    except BlockError as error:
        raise at_its_option(error) from None

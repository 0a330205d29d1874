"""The data module of conversations: supervised fine-tuning is ``task=causal_lm data=chat``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from blockwright.registry import register
from blockwright.registry.errors import ConfigError
from blockwright.training.data.chat.formats import Chat
from blockwright.training.data.conversations import ConversationCorpus
from blockwright.training.data.corpus import SPLITS, Split
from blockwright.training.data.modules.text import Batching, CorpusDataModule
from blockwright.training.data.order import LineBatches
from blockwright.training.data.rows import Rendering, RowOrder, Rows
from blockwright.training.data.tokenizers.files import COMPANIONS
from blockwright.training.data.tokenizers.tokenizer import Tokenizer


@register("data", "chat")
class ChatDataModule(CorpusDataModule):
    """Whole conversations packed into rows, of which the answers are scored.

    A batch is that of ``data=text``, with ``targets`` −100 outside answers, and ``segments`` and ``positions`` always
    present: conversations of a row do not see each other. Rows are the packing of the whole split, in an order
    that is a function of seed and epoch.

    Args:
        batching: the corpus, a ``ConversationCorpus``, and how it is made into batches
        chat: the format of conversations

    Raises:
        ConfigError: at ``data.corpus``, which gives no conversations
    """

    default_children: ClassVar[Mapping[str, Any]] = {"chat": "plain"}

    def __init__(self, batching: Batching, chat: Chat) -> None:
        super().__init__(batching)
        self._check_corpus()
        self.chat = chat
        self.rendering = self._render()
        self._rows: dict[tuple[Split, int], Rows] = {}

    def _check_corpus(self) -> None:
        if not isinstance(self.corpus, ConversationCorpus):
            rule = "this data needs conversations, which the corpus does not give"
            remedy = "Write data.corpus._target_=blockwright.training.data.conversations.Conversations, or of its kind"
            raise ConfigError("data.corpus", type(self.corpus).__name__, rule, remedy)

    def _render(self) -> Rendering:
        return Rendering(self.tokenizer, self.chat, self.sequence_length)

    def check(self) -> None:
        self.corpus.check()
        for split in SPLITS if self.corpus.is_small() else ():
            self.rendering.check(self.corpus.documents(split))

    @property
    def _encoder(self) -> Tokenizer:
        return self.rendering

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.rendering.tokenizer = self.tokenizer
        rank_zero_info(self._describe())

    def _describe(self) -> str:
        counts = self._pack().vocabulary["counts"]
        shares = [
            f"{split}: {len(rows.lengths):,} conversations in {len(rows):,} rows, {rows.lengths.sum():,} tokens, "
            f"{rows.share_scored():.0%} scored"
            for split in SPLITS
            if len((rows := self._packed(split, self.sequence_length)).lengths)
        ]
        cut = f"{counts.get('shortened', 0):,} shortened to whole turns, {counts.get('dropped', 0):,} dropped"
        return f"conversations: {'; '.join(shares)}; {cut} (data.sequence_length={self.sequence_length})"

    def tokens(self, split: Split, places: slice = slice(None)) -> npt.NDArray[Any]:
        """The token ids of a split: conversation after conversation, without what is said of the tokens on disk."""
        return super().tokens(split, places) // 2

    @property
    def order(self) -> RowOrder:  # type: ignore[override]
        return RowOrder(len(self._packed("train", self.sequence_length)), self.batch_size, self.seed)

    def _check_lengths(self) -> None:
        if not self._streams["train"].n_tokens:
            rule = "no conversation of the train split fits into a row, not even its first turns"
            raise ConfigError("data.sequence_length", self.sequence_length, rule, "Raise data.sequence_length")

    def _packed(self, split: Split, length: int) -> Rows:
        if (split, length) not in self._rows:
            self._rows[split, length] = self._make_rows(split, length)
        return self._rows[split, length]

    def _make_rows(self, split: Split, length: int) -> Rows:
        return Rows(self._streams[split], length, self.tokenizer.token_bytes())

    def _dataset(self, split: Split, length: int) -> Any:
        return self._packed(split, length)

    def _line(self, split: Split, length: int, batch_size: int) -> LineBatches:
        rows = len(self._packed(split, length))
        return LineBatches(rows + 1, 1, batch_size, self.eval_windows, *self._share())

    def state_dict(self) -> dict[str, Any]:
        """As in ``CorpusDataModule``; the template of ``data.chat`` takes the place of the tokenizer's, for exports and
        for those who have the checkpoint and not the file."""
        state, template = super().state_dict(), self.rendering.chat.template()
        if template is not None:
            files = {**state["tokenizer"].get(COMPANIONS, {}), "chat_template.jinja": template}
            state["tokenizer"] = {**state["tokenizer"], COMPANIONS: files}
        return state

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "chat": self.rendering.chat.identity()}

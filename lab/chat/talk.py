"""Lines of a user, which are messages or commands, and what is written in answer to each."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TextIO

from blockwright.lab.attachment import attachments, readable
from blockwright.lab.chat.conversation import Conversation
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.printing import printable

MAX_LINE = 1_000_000  # characters
HELP = """\
/retry           take the last answer back, and write another
/system [TEXT]   show the system message, or set it
/clear           forget the conversation; the system message stays
/save FILE       write it as a line of JSON, which data=chat trains on
/quit            end; so does Ctrl-D
A line that begins with a blank is a message, whatever follows. Ctrl-C stops an answer, or else ends."""


class Talk:
    """A conversation by lines.

    Answers go to standard output, everything else to standard error, so that a pipe gets answers alone.

    Args:
        conversation: with the model
        out, notes: where answers and everything else go
        terminal: whether ``out`` is one, which control characters of a model would act on
    """

    def __init__(self, conversation: Conversation, out: TextIO, notes: TextIO, terminal: bool) -> None:
        self.conversation, self.out, self.notes, self.terminal = conversation, out, notes, terminal
        self._files: list[str] = []  # of the next message
        self._kinds = readable(conversation.writer.decoder)
        self._commands: dict[str, Callable[[str], bool]] = {
            "retry": self._retry,
            "system": self._system,
            "clear": self._clear,
            "save": self._save,
            "quit": self._quit,
            "help": self._help,
            **{kind.word: self._attach for kind in self._kinds.values()},
        }

    def take(self, line: str) -> bool:
        """Do what a line says.

        Returns:
            whether the conversation continues

        Raises:
            ConfigError: an unknown command, or one that cannot be done; or a message that the model cannot read
        """
        if len(line) > MAX_LINE:
            raise ConfigError("message", f"{line[:60]}…", f"is longer than {MAX_LINE:,} characters", "Write less")
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._say(line.removesuffix("\n").strip())
            return True
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise self._unknown(name)
        return self._commands[name](rest.strip())

    def _say(self, text: str) -> None:
        for kind in self._kinds.values():
            marks, n = text.count(kind.mark), len(self._files)
            if n and not marks:
                text, marks = kind.mark * n + text, n
            if marks != n:
                rule = f"has {marks} {kind.mark}, and {n} files are named"
                raise ConfigError("message", text[:60], rule, f"Name one for each first: /{kind.word} FILE")
        self._write(lambda: self._said(text))

    def _said(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, with which the files are used up, whether it is read to its end or not."""
        answer = self.conversation.say(text, self._files)
        self._files = []
        return answer

    def _retry(self, rest: str) -> bool:
        _refuse(rest, "/retry")
        self._write(self.conversation.retry)
        return True

    def _system(self, rest: str) -> bool:
        if rest:
            self.conversation.instruct(rest)
        else:
            self._note(self.conversation.system or "no system message but that of the format, if it has one")
        return True

    def _clear(self, rest: str) -> bool:
        _refuse(rest, "/clear")
        self.conversation.clear()
        self._files = []
        return True

    def _save(self, rest: str) -> bool:
        if not rest:
            raise ConfigError("/save", None, "needs a file", "Write /save talk.jsonl")
        if not self.conversation.turns:
            raise ConfigError("/save", rest, "there is nothing to save yet", "Write a message first")
        line = json.dumps(self.conversation.record(), ensure_ascii=False) + "\n"
        try:
            with Path(rest).open("x", encoding="utf-8") as file:
                file.write(line)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError("/save", rest, f"cannot be written ({reason})", "Name a new file") from None
        self._note(f"saved as {rest}")
        return True

    def _quit(self, rest: str) -> bool:
        _refuse(rest, "/quit")
        return False

    def _help(self, rest: str) -> bool:
        shown = [
            f"/{kind.word + ' FILE':<15} show the model a file with the next message" for kind in self._kinds.values()
        ]
        self._note("\n".join([*shown, HELP]))
        return True

    def _attach(self, rest: str) -> bool:
        if not Path(rest).is_file():
            raise ConfigError("FILE", rest, "there is no such file", "Name one that exists")
        self._files.append(rest)
        return True

    def _unknown(self, name: str) -> ConfigError:
        if any(kind.word == name for kind in attachments().values()):
            return ConfigError(f"/{name}", None, "this model reads text alone", "Choose a model that reads such files")
        remedy = f"{did_you_mean(name, self._commands)}; /help lists all; a message may begin with a blank"
        return ConfigError("command", f"/{name[:60]}", "is not a command", remedy)

    def _write(self, answer: Callable[[], Generator[str, None, None]]) -> None:
        """Write an answer as it comes, and what the user should know about it."""
        talk, left_out = self.conversation, self.conversation.left_out
        pieces = answer()
        if talk.left_out > left_out:
            self._note(f"context full: the model no longer sees the first {talk.left_out} messages")
        try:
            with closing(pieces):  # so that what was written is part of the conversation, wherever Ctrl-C comes
                for piece in pieces:
                    self.out.write(printable(piece) if self.terminal else piece)
                    self.out.flush()
        finally:
            self.out.write("\n")
            self.out.flush()
        if talk.ended == "length":
            self._note("the answer was cut: --max-new-tokens and --context bound it")

    def _note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


def _refuse(rest: str, command: str) -> None:
    if rest:
        raise ConfigError(command, rest[:60], "takes nothing", f"Write {command} alone")

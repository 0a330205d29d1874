"""``blockwright serve MODEL [--rows N|--memory BYTES] [--room TOKENS]``: answer requests of OpenAI's protocol by HTTP.

Many requests at once share a running batch; each gets the text that it would get alone. It serves /v1/models,
/v1/completions and /v1/chat/completions; /metrics, /health, and a page to try it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.lab import generate
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.registry.errors import require
from blockwright.registry.limits import read_plain

ROWS, QUEUE, GRACE, PORT = 8, 256, 30.0, 8000
KEY = "BLOCKWRIGHT_API_KEY"


def _parser() -> Parser:
    parser = Parser(prog="blockwright serve", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a *.ckpt, or the OUT of blockwright import")
    parser.add_argument("--name", help="of the model in requests; default: that of its folder or file")
    parser.add_argument("--chat", metavar="FORMAT", help="of conversations; default: the one that it was trained with")
    parser.add_argument("--bos", action="store_true", help="begin prompts with the token that begins a document")
    parser.add_argument("--rows", type=int, metavar="N", help=f"texts computed at once at most; default {ROWS}")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="as many rows as their caches fit into")
    parser.add_argument("--room", type=int, metavar="TOKENS", help="of a prompt and its text; default 2048, or fewer")
    parser.add_argument("--queue", type=int, default=QUEUE, metavar="N", help=f"texts that may wait; default {QUEUE}")
    parser.add_argument("--visits", type=int, metavar="R", help="of a loop's layers; default: those of the model")
    parser.add_argument("--bits", type=int, choices=BITS, help="quantise the caches; default: exact")
    generate.add_draft_options(parser)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or float64")
    parser.add_argument("--device", help="cpu, cuda:0, …; default: a GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine alone")
    parser.add_argument("--port", type=int, default=PORT, help=f"0 for any that is free; default {PORT}")
    proxy = "answer to this name too, such as that of a proxy; may be repeated"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=proxy)
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"holds a key that requests must show; or set {KEY}"
    )
    usual = f"for requests at work to end after SIGTERM; default {GRACE:g}"
    parser.add_argument("--grace", type=float, default=GRACE, metavar="SECONDS", help=usual)
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        ConfigError: an unknown option, or an invalid value
    """
    options = _parser().parse_args(arguments)
    if options.rows is not None and options.memory is not None:
        rule = "gives the number of rows, and so does --rows"
        raise ConfigError("--memory", options.memory, rule, "Leave one of them out")
    generate.check_draft_options(options)
    for name, least in {"rows": 1, "memory": 1, "room": 2, "queue": 0, "port": 0, "grace": 0}.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name}", value, f"must be at least {least}", f"Write {least} or more")
    if options.name is not None and not (options.name and options.name.isprintable()):
        raise ConfigError(
            "--name", ascii(options.name), "is no name: visible characters in a line", "Write e.g. --name mine"
        )
    for name in options.allow_host:
        if not name or not name.isascii() or not name.isprintable() or set(name) & set("/ @?#"):
            rule = "is no host: a name or an address, without http:// and a path"
            raise ConfigError("--allow-host", ascii(name), rule, "Write e.g. --allow-host models.example.com")
    if options.port > 65535:
        raise ConfigError("--port", options.port, "must be at most 65535", "Write e.g. --port 8000")
    if options.grace > 86400:
        raise ConfigError("--grace", options.grace, "must be at most a day, 86400", "Write fewer seconds")
    return options


def key_of(file: Path | None) -> str | None:
    """The key of a file, or of the environment; None without. It is no option: command lines are public.

    Raises:
        ConfigError: the file cannot be read, both are set, or the key is empty or of several words
    """
    name, key = KEY, os.environ.get(KEY)
    if file is not None:
        if key is not None:
            raise ConfigError("--api-key-file", str(file), f"{KEY} is set too", "Leave one of them out")
        name = "--api-key-file"
        key = read_plain(file, name, "Name a file that holds the key", 1000).decode(errors="replace").strip()
    if key is None:
        return None
    if not key.isascii() or not key.isprintable() or len(key.split()) != 1 or key != key.strip():
        raise ConfigError(
            name, "…", "holds no key: a word of visible ASCII characters", "Write one: openssl rand -hex 32"
        )
    return key


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line or the model
    """
    options = read(arguments)
    require("serve", "starlette", "uvicorn", path="command line", value="serve")
    from blockwright.plugins.serve.serving import serve

    serve(options, key_of(options.api_key_file))


if __name__ == "__main__":
    sys.exit(run_command(main))

"""What servers share: the socket that waits for connections, the settings of uvicorn, the end by a signal."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from blockwright.registry import ConfigError

# Settings of uvicorn: HTTP alone, without a log, which would have what clients send.
PLAIN: Mapping[str, Any] = {
    "loop": "asyncio",
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "access_log": False,
    "server_header": False,
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Args:
        host: name or address
        port: 0 for any that is free

    Raises:
        ConfigError: there is no such address on this machine, or the port is in use
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError("--host", host, "is no address", "Write 127.0.0.1, or 0.0.0.0 for all networks") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise _refused(host, port, error) from None
    return listening


def check_free(host: str, port: int) -> None:
    """Refuse a port that is in use, before minutes of work; no connection is accepted meanwhile.

    Raises:
        ConfigError
    """
    with closing(listen(host, port)):
        pass


@contextmanager
def until_signal() -> Iterator[None]:
    """SIGTERM ends the server that runs within, and is no error: uvicorn raises it again once all has ended."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refused(host: str, port: int, error: OSError) -> ConfigError:
    reason = (error.strerror or str(error)).lower()
    if isinstance(error, PermissionError):
        return ConfigError("--port", port, f"cannot be used ({reason})", "Choose one above 1023")
    return ConfigError("--port", port, f"cannot be used at {host} ({reason})", "Choose another, or 0 for any free one")

"""What servers share: the socket that waits for connections, whom they answer, the settings of uvicorn, the end by a
signal."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Site:
    """Which requests come from programs and the server's own page, and which from a page of another site.

    A name of another site may lead to this machine (DNS rebinding), so the host is checked. A browser sends what pages
    of other servers ask for too, so the origin is.

    Args:
        port: that the server listens at
        loopback: whether it listens to this machine alone: then it has the names of this machine; else any, unless
            some are ``allowed``
        allowed: further names, with any port and scheme, such as that of a proxy in front
    """

    port: int
    loopback: bool = True
    allowed: Collection[str] = ()

    def foreign(self, headers: Mapping[str, str], path: str, page: str = "/") -> str:
        """Why a request is of another site; empty for this one's.

        Args:
            headers: of the request, by their names in small letters
            path: of the request
            page: the path that links of other sites may lead to
        """
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        own = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        if host not in own and not self._allows(host) and (self.loopback or self.allowed):
            return "This server answers to the host of the address that it has printed, and to no other"
        if origin is not None:
            scheme, _, of_origin = origin.lower().partition("://")
            same = of_origin == host and (scheme == "http" or host not in own)
            if not same and not self._allows(of_origin):
                return "Requests of other origins are refused"
        if path != page and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "Requests of other sites are refused"
        return ""

    def _allows(self, host: str) -> bool:
        return any(host == name or host.startswith(f"{name}:") for name in map(str.lower, self.allowed))


def is_loopback(listening: socket.socket) -> bool:
    """Whether a socket is reached from this machine alone."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


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

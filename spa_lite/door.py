"""Who may ask the endpoint: the Host and Origin of a request, and its key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from spa_lite.completions import Refused


@dataclass(frozen=True)
class Door:
    """Where the server listens, and the key that it asks for, if any."""

    host: str
    port: int
    key: str | None = field(default=None, repr=False)

    @property
    def local(self) -> bool:
        """Whether only this machine can come in."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """Its address, as this machine sees it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def check(self, headers: Mapping[str, str], path: str) -> None:
        """Raise Refused unless a request may come in.

        A page in somebody's browser may send requests to this machine. It comes with the name of its own site in Host
        (if that name was made to lead here) or in Origin.
        """
        host = headers.get("host", "")
        if not self.known(host):
            raise Refused(421, f"this server is not known under the Host that was asked for: ask {self.url}")
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, "pages of other sites may not ask this server")
        if self.key is not None and path != "/health":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if not (right and scheme.lower() == "bearer"):
                raise Refused(401, "this server wants its API key as Authorization: Bearer", code="invalid_api_key")

    def known(self, host: str) -> bool:
        """Whether a Host header names this server. Numbers do: only a name can be made to lead here by others."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.port or parts.netloc != host or "@" in host:
            return False
        return name == self.host.lower() or is_loopback(name) or (not self.local and is_number(name))


def is_number(host: str) -> bool:
    """Whether a host is an address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    return host == "localhost" or (is_number(host) and ipaddress.ip_address(host).is_loopback)

"""Pictures and sounds at web addresses, fetched so that nobody reaches a private network through this machine.

A name is resolved once, all of its addresses are checked, and the connection goes to one of those: so a name that
means another address a moment later gains nothing.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Thread
from urllib.parse import quote, urljoin, urlsplit

from gemma_wgpu.errors import RequestError
from gemma_wgpu.sources import MOST_BYTES

MOST_REDIRECTS = 3
SECONDS = 10.0
"""A picture or a sound must have arrived after so many seconds, redirects included."""

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16  # bytes
_LEGAL = "/%:@!$&'()*+,;=~?"  # characters of a path or query that stay as they are
_TRANSLATED = IPv6Network("64:ff9b::/96")  # a gateway sends what goes there to the IPv4 address in the last 32 bits


def fetch_bytes(url: str, noun: str, kinds: str, *, private: bool = False) -> bytes:
    """Return the bytes at a web address, which begins with http:// or https://. They may be of any kind.

    `noun` is what messages call them, and `kinds` are the media types that the server is told of, as in "image/*".
    Unless `private` is true, an address is refused if its host, or the host of a redirect, has any address of a
    private network, of this machine, or of another kind that is not for the public. A proxy is not used.

    Raises RequestError, whose sentence begins with the address, if it is refused; if the server cannot be reached, or
    answers with an error, with more than MOST_BYTES bytes, or with more than MOST_REDIRECTS redirects; if the bytes
    have not arrived within SECONDS; or if Python runs in a browser, which has no sockets.
    """
    if sys.platform == "emscripten":
        raise RequestError(
            f"{_shown(url)}: Python cannot fetch a {noun} in a browser; let the browser fetch it, with "
            "pyodide.http.pyfetch, and give the bytes"
        )
    transfer = _Transfer(url, noun, kinds, private)
    future: Future[bytes] = Future()
    # The thread is one that nobody has to wait for, because finding the addresses of a name can take minutes.
    Thread(target=_run, args=(transfer.fetched, future), daemon=True).start()
    try:
        return future.result(SECONDS)
    except TimeoutError:
        raise RequestError(
            f"{_shown(url)}: the {noun} did not arrive within {SECONDS:g} s; try again, or give its bytes"
        ) from None
    finally:
        transfer.stop()


def _run(function: Callable[[], bytes], future: Future[bytes]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # it is raised where the result is awaited
        future.set_exception(error)


@dataclass(frozen=True)
class _Place:
    """What a web address says: the host in ASCII, and the path with the query."""

    secure: bool
    host: str
    port: int
    path: str


class _Transfer:
    """The fetching of one picture or sound. `stop` may be called by another thread."""

    def __init__(self, url: str, noun: str, kinds: str, private: bool) -> None:
        self._url = url
        self._noun = noun
        self._headers = {"User-Agent": "gemma-wgpu", "Accept": kinds}
        self._private = private
        self._socket: socket.socket | None = None
        self._stopped = False

    def fetched(self) -> bytes:
        """Return the bytes at the address, or where it redirects to. Raises RequestError and TimeoutError."""
        url = self._url
        for _ in range(MOST_REDIRECTS + 1):
            try:
                found = self._answer(url)
            except (RequestError, TimeoutError):
                raise
            except (OSError, HTTPException) as error:
                reason = (
                    (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
                )
                raise self._refused(url, f"the server cannot be reached ({_line(reason)})") from error
            if isinstance(found, bytes):
                return found
            try:
                url = urljoin(url, found)
            except ValueError as error:
                raise self._refused(url, f"the server redirects to {_shown(found)}, which is no address") from error
        raise RequestError(
            f"{_shown(self._url)}: there are more than {MOST_REDIRECTS} redirects; give the last address"
        )

    def stop(self) -> None:
        """End the connection, so that whoever reads from it goes on."""
        self._stopped = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, url: str) -> bytes | str:
        """Return the bytes that a server sends, or the address that it redirects to."""
        place = self._place(url)
        connection = HTTPConnection(place.host, place.port)
        connection.default_port = _PORTS["https" if place.secure else "http"]  # the header "Host" leaves it out
        with closing(connection):
            connection.sock = self._connected(place, self._addresses(url, place))
            connection.request("GET", place.path, headers=self._headers)
            with connection.getresponse() as response:
                if response.status in _REDIRECTS:
                    target = response.headers.get("Location")
                    if not target:
                        raise self._refused(url, "the server redirects without saying where to")
                    return target
                if response.status != 200:
                    raise self._refused(url, f"the server answers {response.status} {_line(response.reason)}")
                return self._body(url, response)

    def _place(self, url: str) -> _Place:
        """Return what an address says. Raises RequestError if it is not a web address that is fetched."""
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parts.hostname or "").encode("idna").decode()
        except ValueError as error:
            raise self._refused(url, f"this is not a web address ({_line(str(error))})") from error
        if parts.scheme not in _PORTS:
            raise self._refused(url, "only http and https addresses are fetched")
        if "@" in parts.netloc:
            raise self._refused(url, "an address with a user's name is not fetched")
        if not re.fullmatch(r"[\w.:-]+", host):
            raise self._refused(url, "this is not a web address, because its host is not one")
        path = quote(parts.path or "/", safe=_LEGAL) + ("?" + quote(parts.query, safe=_LEGAL) if parts.query else "")
        return _Place(parts.scheme == "https", host, _PORTS[parts.scheme] if port is None else port, path)

    def _addresses(self, url: str, place: _Place) -> list[str]:
        """Return the addresses of a host. Raises RequestError if one of them must not be reached."""
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if not self._private and not all(_is_public(address) for address in addresses):
            raise self._refused(
                url, f"its host is in a private network or on this machine; give the {self._noun}'s bytes"
            )
        return addresses

    def _connected(self, place: _Place, addresses: list[str]) -> socket.socket:
        """Return a connection to the first of these addresses that answers, encrypted if need be."""
        for number, address in enumerate(addresses, 1):
            try:
                self._keep(socket.create_connection((address, place.port), SECONDS))
                break
            except OSError:
                if number == len(addresses) or self._stopped:
                    raise
        if place.secure:
            import ssl  # not every Python has it

            context = ssl.create_default_context()
            assert self._socket is not None
            self._keep(context.wrap_socket(self._socket, server_hostname=place.host))
        assert self._socket is not None
        return self._socket

    def _keep(self, connection: socket.socket) -> None:
        """Make this the connection that `stop` ends. Raises TimeoutError if it was called already."""
        self._socket = connection
        if self._stopped:
            connection.close()
            raise TimeoutError

    def _body(self, url: str, response: HTTPResponse) -> bytes:
        """Return the body of an answer. Raises RequestError if it is too large, or not whole."""
        data = bytearray()
        too_large = (response.length or 0) > MOST_BYTES
        while not too_large and (chunk := response.read1(_CHUNK)):
            data += chunk
            too_large = len(data) > MOST_BYTES
        if too_large:
            raise self._refused(url, f"the {self._noun} has more than {MOST_BYTES:,} bytes, which is the limit")
        if response.length:
            raise self._refused(url, f"the connection was closed before the whole {self._noun} had come; try again")
        return bytes(data)

    def _refused(self, url: str, why: str) -> RequestError:
        """Return an error that begins with the address that was given, and names the one that it led to."""
        way = _shown(self._url) if url == self._url else f"{_shown(self._url)} leads to {_shown(url)}"
        return RequestError(f"{way}: {why}")


def _is_public(text: str) -> bool:
    """Say whether an IP address is one that everybody may reach."""
    address: IPv4Address | IPv6Address = ip_address(text)
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None:
            return _is_public(str(inner))
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _line(text: str) -> str:
    """Return a foreign text as part of one line."""
    return " ".join(text.split())[:200]


def _shown(url: str) -> str:
    """Return an address for an error message."""
    text = _line(url)
    return text if len(text) == len(url) else f"{text}..."

"""A real server of a model folder, which can do all that servers and connections do."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Reply = Callable[["Handler", bytes], None]


def whole(handler: "Handler", data: bytes) -> None:
    """Send all of the file, or the range that is asked for."""
    handler.send_part(data)


def drop(after: int, linger: float = 0.0) -> Reply:
    """Close the connection when so many bytes have been sent, and have had `linger` seconds to arrive."""

    def reply(handler: "Handler", data: bytes) -> None:
        handler.send_part(data, most=after)
        time.sleep(linger)

    return reply


def stall(after: int) -> Reply:
    """Fall silent, the connection open, when so many bytes have been sent."""

    def reply(handler: "Handler", data: bytes) -> None:
        handler.send_part(data, most=after)
        handler.host.stalled.set()
        handler.host.closing.wait()

    return reply


def reset(handler: "Handler", data: bytes) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def silent(handler: "Handler", data: bytes) -> None:
    handler.host.closing.wait()


def no_ranges(handler: "Handler", data: bytes) -> None:
    handler.send(200, data)


def wrong_range(handler: "Handler", data: bytes) -> None:
    """Send another range than the one that is asked for, as broken caches do."""
    handler.send_part(data, shift=-1)


def unsized(most: int) -> Reply:
    """Send no Content-Length, so that the end of the connection is the end of the file."""
    return lambda handler, data: handler.send(200, data[:most], sized=False)


def flipped(handler: "Handler", data: bytes) -> None:
    handler.send_part(data[:100] + bytes([data[100] ^ 1]) + data[101:])


def answer(code: int, body: bytes = b"") -> Reply:
    return lambda handler, _: handler.send(code, body)


def redirect(to: str) -> Reply:
    return lambda handler, _: handler.send(302, b"", {"Location": to})


class Handler(BaseHTTPRequestHandler):
    server: "Host"

    @property
    def host(self) -> "Host":
        return self.server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition("/")[2]
        self.host.requests.append((name, self.headers.get("Range")))
        self.host.paths.append(self.path)
        replies = self.host.replies.get(path, self.host.replies.get(name, []))
        reply = replies.pop(0) if len(replies) > 1 else replies[0] if replies else whole
        file = self.host.folder / name
        if reply is whole and not (path.startswith("/models/") and file.is_file()):
            reply = answer(404)
        reply(self, file.read_bytes() if file.is_file() else b"")

    def send_part(self, data: bytes, *, most: int | None = None, shift: int = 0) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.send(200, data, most=most)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) + shift
        if start >= len(data):
            self.send(416, b"")
        else:
            part = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self.send(206, data[start:], part, most=most)

    def send(
        self,
        code: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        most: int | None = None,
        sized: bool = True,
    ) -> None:
        self.send_response(code)
        if self.host.open_to_other_sites:
            self.send_header("Access-Control-Allow-Origin", "*")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if sized:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:most])
        self.wfile.flush()


class Host(ThreadingHTTPServer):
    """Serves `folder` under /models/tiny, or any other path in /models.

    `replies` has the replies to the next requests for a file name or a path, and the last reply stays in force.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.replies: dict[str, list[Reply]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.paths: list[str] = []
        self.open_to_other_sites = True
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.url = f"{self.address}/models/tiny"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that was killed."""

    def asked(self) -> list[tuple[str, str | None]]:
        """Return the names and the ranges of the requests since the last call."""
        requests, self.requests = self.requests, []
        return requests

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

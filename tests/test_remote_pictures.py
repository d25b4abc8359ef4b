"""Pictures and sounds come from real servers, and from no private network, whatever an address says."""

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemma_wgpu.errors import RequestError
from gemma_wgpu.fetch import media as module
from gemma_wgpu.fetch.media import MOST_REDIRECTS
from gemma_wgpu.fetch.pictures import fetch_picture
from gemma_wgpu.fetch.sounds import fetch_sound
from gemma_wgpu.pictures import opened
from tests.broken_pictures import REFUSED_ADDRESSES, encoded, picture
from tests.host import Handler, Host, answer, drop, redirect, reset, silent, stall, unsized

PUBLIC = "93.184.215.14"
SILENT = "127.0.0.2"
DATA = encoded(picture(), "PNG")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "a.png").write_bytes(DATA)
    host = Host(tmp_path)
    yield host
    host.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and their addresses, which stand in for those of the name server."""
    names: dict[str, list[str]] = {}
    resolved = socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *_: Any, **options: Any) -> Any:
        if name not in names:
            return resolved(name, port, **options)
        return [answer for address in names[name] for answer in resolved(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.fixture
def connections(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were connected to. The public ones lead to the host of this test."""
    made: list[str] = []
    connected = socket.create_connection

    def create_connection(address: tuple[str, int], *rest: Any) -> socket.socket:
        made.append(address[0])
        if address[0] == SILENT:
            raise ConnectionRefusedError(111, "Connection refused")
        return connected(address if address[0].startswith("127.") else host.server_address[:2], *rest)  # type: ignore

    monkeypatch.setattr(socket, "create_connection", create_connection)
    return made


def refusal(url: str, **options: bool) -> str:
    with pytest.raises(RequestError) as caught:
        fetch_picture(url, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


def test_a_picture_arrives(host: Host) -> None:
    data = fetch_picture(f"{host.url}/a.png?size=1&name=ä#top", private=True)
    assert data == DATA and opened(data).size == (60, 40)
    assert host.paths == ["/models/tiny/a.png?size=1&name=%C3%A4"]


def test_a_picture_of_unknown_length_arrives(host: Host) -> None:
    host.replies["a.png"] = [unsized(len(DATA))]
    assert fetch_picture(f"{host.url}/a.png", private=True) == DATA


def test_a_picture_in_chunks_arrives(host: Host) -> None:
    def chunked(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(data), 1000):
            part = data[start : start + 1000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    host.replies["a.png"] = [chunked]
    assert fetch_picture(f"{host.url}/a.png", private=True) == DATA


def test_a_sound_arrives_the_same_way(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[str | None] = []

    def look(handler: Handler, data: bytes) -> None:
        accepted.append(handler.headers["Accept"])
        handler.send(200, data)

    host.replies["a.png"] = [look]
    assert fetch_sound(f"{host.url}/a.png", private=True) == fetch_picture(f"{host.url}/a.png", private=True) == DATA
    assert accepted == ["audio/*", "image/*"]

    def sentence(private: bool = True) -> str:
        with pytest.raises(RequestError) as caught:
            fetch_sound(f"{host.url}/a.png", private=private)
        return str(caught.value)

    assert "give the sound's bytes" in sentence(private=False)
    host.replies["a.png"] = [drop(len(DATA) - 1)]
    assert "before the whole sound had come" in sentence()
    host.replies["a.png"] = [look]
    monkeypatch.setattr(module, "MOST_BYTES", len(DATA) - 1)
    assert "the sound has more than" in sentence()
    host.replies["a.png"] = [silent]
    monkeypatch.setattr(module, "SECONDS", 0.1)
    assert "the sound did not arrive within 0.1 s" in sentence()


@pytest.mark.parametrize("url", REFUSED_ADDRESSES)
def test_these_addresses_are_refused(url: str, connections: list[str]) -> None:
    assert refusal(url).startswith(url)
    assert not connections


@pytest.mark.parametrize("url", ["", "a.png", "data:,a", "http://[", "http://\u2100.com", "http://" + "a" * 300])
def test_what_is_no_address_is_refused(url: str, connections: list[str]) -> None:
    assert refusal(url, private=True).startswith(url[:200])
    assert not connections


def test_this_machine_is_refused_and_allowed(host: Host) -> None:
    assert "private network" in refusal(f"{host.url}/a.png")
    assert not host.asked()
    assert fetch_picture(f"{host.url}/a.png", private=True) == DATA
    assert host.asked() == [("a.png", None)]


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f::14", "::ffff:8.8.8.8", "64:ff9b::808:808", "172.32.0.1"])
def test_a_public_host_is_allowed(address: str, names: dict[str, list[str]], connections: list[str]) -> None:
    names["pictures.example"] = [address]
    assert fetch_picture("http://pictures.example/models/a.png") == DATA
    assert connections == [address]


def test_an_address_with_a_user_is_refused(names: dict[str, list[str]], connections: list[str]) -> None:
    names["pictures.example"] = [PUBLIC]
    assert "user" in refusal("http://user:word@pictures.example/models/a.png")
    assert not connections


@pytest.mark.parametrize("other", ["10.0.0.1", "127.0.0.1", "::1", "::ffff:192.168.0.1", "169.254.169.254"])
def test_one_private_address_is_enough(other: str, names: dict[str, list[str]], connections: list[str]) -> None:
    for addresses in ([PUBLIC, other], [other, PUBLIC]):
        names["pictures.example"] = addresses
        assert "private network" in refusal("http://pictures.example/models/a.png")
    assert not connections


def test_the_connection_goes_to_the_address_that_was_checked(
    host: Host, connections: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, asked = socket.getaddrinfo, []

    def getaddrinfo(name: str, port: int, *_: Any, **options: Any) -> Any:
        if name == "changing.example":
            asked.append(name)
            name = PUBLIC if len(asked) == 1 else "127.0.0.1"
        return resolved(name, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fetch_picture("http://changing.example/models/a.png") == DATA
    assert (connections, asked) == ([PUBLIC], ["changing.example"])
    assert "private network" in refusal("http://changing.example/models/a.png")
    assert connections == [PUBLIC]


def test_an_address_that_does_not_answer_is_passed_over(
    host: Host, names: dict[str, list[str]], connections: list[str]
) -> None:
    port = host.server_address[1]
    names["pictures.example"] = [SILENT, "127.0.0.1"]
    assert fetch_picture(f"http://pictures.example:{port}/models/a.png", private=True) == DATA
    assert connections == [SILENT, "127.0.0.1"]
    names["pictures.example"] = [SILENT]
    assert "Connection refused" in refusal(f"http://pictures.example:{port}/models/a.png", private=True)


@pytest.mark.parametrize("url", [url for url in REFUSED_ADDRESSES if ":" in url.partition("/")[0]])
def test_redirects_to_these_addresses_are_refused(
    url: str, host: Host, names: dict[str, list[str]], connections: list[str]
) -> None:
    names["pictures.example"] = [PUBLIC]
    host.replies["a.png"] = [redirect(url)]
    assert refusal("http://pictures.example/models/a.png").startswith("http://pictures.example/models/a.png")
    assert set(connections) == {PUBLIC}


def test_redirects_within_a_private_network_are_allowed(host: Host) -> None:
    host.replies["first"] = [redirect("/models/second?a=ä")]
    host.replies["second"] = [redirect(f"//{host.url.partition('//')[2]}/third")]
    host.replies["third"] = [redirect("a.png")]
    assert fetch_picture(f"{host.url}/first", private=True) == DATA
    assert MOST_REDIRECTS == 3
    host.replies["zeroth"] = [redirect("first")]
    assert "more than 3 redirects" in refusal(f"{host.url}/zeroth", private=True)
    host.replies["a.png"] = [redirect("a.png")]
    assert "more than 3 redirects" in refusal(f"{host.url}/a.png", private=True)


def test_redirects_to_nowhere(host: Host) -> None:
    host.replies["a.png"] = [answer(302)]
    assert "without saying where to" in refusal(f"{host.url}/a.png", private=True)
    host.replies["a.png"] = [redirect("http://[::1/b")]
    assert "which is no address" in refusal(f"{host.url}/a.png", private=True)


@pytest.mark.parametrize("code", [204, 206, 304, 400, 401, 403, 404, 429, 500, 503])
def test_other_answers_are_refused(host: Host, code: int) -> None:
    host.replies["a.png"] = [answer(code)]
    sentence = refusal(f"{host.url}/a.png", private=True)
    assert sentence.startswith(f"{host.url}/a.png: the server answers {code} ")


def test_a_server_that_hangs_up(host: Host) -> None:
    for reply in (reset, drop(len(DATA) - 1), drop(0)):
        host.replies["a.png"] = [reply]
        assert refusal(f"{host.url}/a.png", private=True).startswith(f"{host.url}/a.png: the ")


def test_a_server_that_speaks_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ready\r\n")

        threading.Thread(target=speak, daemon=True).start()
        sentence = refusal(f"http://127.0.0.1:{server.getsockname()[1]}/a.png", private=True)
        assert "cannot be reached" in sentence and "220 mail.example" in sentence


def test_nobody_listens(host: Host) -> None:
    host.close()
    assert "Connection refused" in refusal(f"{host.url}/a.png", private=True)


def test_a_name_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert "Name or service not known" in refusal("http://pictures.example/a.png")


@pytest.mark.parametrize("sized", [True, False])
def test_a_large_answer_is_refused(host: Host, sized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", len(DATA))
    if not sized:
        host.replies["a.png"] = [unsized(len(DATA))]
    assert fetch_picture(f"{host.url}/a.png", private=True) == DATA
    monkeypatch.setattr(module, "MOST_BYTES", len(DATA) - 1)
    assert "which is the limit" in refusal(f"{host.url}/a.png", private=True)


def test_an_answer_that_says_it_is_large_is_not_waited_for(host: Host) -> None:
    def large(handler: Handler, _: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "50000001")
        handler.end_headers()
        silent(handler, b"")

    host.replies["a.png"] = [large]
    assert "50,000,000 bytes" in refusal(f"{host.url}/a.png", private=True)


def dripping(handler: Handler, _: bytes) -> None:
    """Send a header a letter at a time, without an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not handler.host.closing.wait(0.01):
        handler.wfile.write(b"a")
        handler.wfile.flush()


@pytest.mark.parametrize("reply", [silent, stall(100), dripping])
def test_a_slow_server_is_left(host: Host, reply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    host.replies["a.png"] = [reply]
    before = set(threading.enumerate())
    assert "did not arrive within 0.3 s" in refusal(f"{host.url}/a.png", private=True)
    monkeypatch.setattr(module, "SECONDS", 60)
    for thread in set(threading.enumerate()) - before:
        if "_run" in thread.name:
            thread.join()  # would not end if its connection were still open


def test_a_slow_name_server_is_left(host: Host, connections: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answered, resolved = threading.Event(), socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *_: Any, **options: Any) -> Any:
        answered.wait()
        return resolved(PUBLIC if name == "pictures.example" else name, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    assert "did not arrive" in refusal("http://pictures.example/a.png")
    answered.set()
    for thread in threading.enumerate():
        if "_run" in thread.name:
            thread.join()
    assert connections == [PUBLIC] and not host.asked()  # it is closed before anything is asked for


def test_a_browser_has_to_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "emscripten")
    assert "pyfetch" in refusal("https://pictures.example/a.png", private=True)


# --- https ---


class Secure(HTTPServer):
    """Serves a picture over TLS, and keeps the names that clients ask for in both protocols."""

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), SecureHandler)
        self.asked: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _, name, __: self.asked.append(name)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that does not trust this server."""


class SecureHandler(BaseHTTPRequestHandler):
    server: Secure

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Host"])
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key, and a certificate for the name pictures.example, which vouches for itself."""
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    name = ["-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name]
    try:
        subprocess.run([*command, "-keyout", key, "-out", file], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    file.write_bytes(key.read_bytes() + file.read_bytes())
    return file


@pytest.fixture
def secure(certificate: Path) -> Iterator[Secure]:
    server = Secure(certificate)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_server_is_told_its_name_and_has_to_prove_it(
    secure: Secure, certificate: Path, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = secure.server_address[1]
    names["pictures.example"] = names["other.example"] = ["127.0.0.1"]
    url = f"https://pictures.example:{port}/a.png"
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(url, private=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.asked.clear()
    assert fetch_picture(url, private=True) == DATA
    assert secure.asked == ["pictures.example", f"pictures.example:{port}"]
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(f"https://other.example:{port}/a.png", private=True)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_the_host_header_leaves_out_the_usual_port(
    scheme: str, port: int, host: Host, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(handler: Handler, data: bytes) -> None:
        seen.append(handler.headers["Host"])
        handler.send(200, data)

    def create_connection(address: tuple[str, int], *_: Any) -> socket.socket:
        seen.append(address)
        connection = socket.socket()
        connection.connect(host.server_address[:2])
        return connection

    class Plain:
        """Stands in for TLS."""

        def wrap_socket(self, connection: socket.socket, server_hostname: str) -> socket.socket:
            seen.append(server_hostname)
            return connection

    host.replies["a.png"] = [look]
    names["xn--bcher-kva.example"] = [PUBLIC]
    monkeypatch.setattr(socket, "create_connection", create_connection)
    monkeypatch.setattr(ssl, "create_default_context", Plain)
    assert fetch_picture(f"{scheme}://Bücher.example/models/a.png") == DATA
    name = "xn--bcher-kva.example"
    assert seen == [(PUBLIC, port), *([name] if scheme == "https" else []), name]

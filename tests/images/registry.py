"""Debian's docker-registry on loopback, and a front for it that asks for tokens and cuts transfers off."""

import contextlib
import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PATIENCE = 15.0  # seconds for the registry to answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def registry(base: Path, users: dict[str, str] | None = None, *, tls: bool = False) -> Iterator[int]:
    """A registry that keeps its blobs in `base`; it wants one of the users' passwords where there are some.

    With `tls` its certificate, `base`/certificate, is signed by itself.
    """
    base.mkdir()
    port = free_port()
    lines = ["version: 0.1", "log:", "  level: error", "storage:", "  filesystem:"]
    lines += [f"    rootdirectory: {base}/blobs"]
    if users:
        for user, password in users.items():
            made = subprocess.run(["htpasswd", "-Bbn", user, password], capture_output=True, check=True)
            with open(base / "users", "ab") as file:
                file.write(made.stdout)
        lines += ["auth:", "  htpasswd:", "    realm: test", f"    path: {base}/users"]
    lines += ["http:", f"  addr: 127.0.0.1:{port}"]
    if tls:
        certificate, key = str(base / "certificate"), str(base / "key")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], capture_output=True, check=True)
        lines += ["  tls:", f"    certificate: {certificate}", f"    key: {key}"]
    (base / "config.yml").write_text("\n".join(lines))
    # It takes variables named REGISTRY_... for settings, of which REGISTRY_AUTH_FILE is none.
    env = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
    serve = ["docker-registry", "serve", str(base / "config.yml")]
    with open(base / "log", "wb") as log:
        process = subprocess.Popen(serve, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (base / "log").read_text()
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@dataclass
class Behaviour:
    """What the front does: `cut` is after how many bytes each of the next answers to a GET of a blob ends.

    `cut_uploads` is after how many each of the next large bodies of a PATCH does; it is `forgetful` where it then knows
    of no upload, as Debian's docker-registry by itself. With `stall` it then sends nothing, until `stalled` is set.
    With `token` a request needs it; `/token` gives it to `user`. `lie` changes a byte of each blob. `asked` are the
    requests that came: method, path and Range or Content-Range.
    """

    cut: list[int] = field(default_factory=list)
    cut_uploads: list[int] = field(default_factory=list)
    forgetful: bool = False
    uploads: dict[str, str] = field(default_factory=dict)
    """Where an upload that was cut off goes on behind the front, by its path."""
    stall: bool = False
    stalled: threading.Event = field(default_factory=threading.Event)
    token: str = ""
    user: tuple[str, str] | None = None
    lie: bool = False
    no_ranges: bool = False
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    authorised: list[str] = field(default_factory=list)


@contextlib.contextmanager
def front(behind: int, behaviour: Behaviour) -> Iterator[int]:
    """A server that passes requests on to the registry on the port `behind`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def do(self) -> None:
            _serve(self, behind, behaviour)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port
    finally:
        behaviour.stalled.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _serve(handler: BaseHTTPRequestHandler, behind: int, behaviour: Behaviour) -> None:
    given = handler.headers.get("Authorization", "")
    size = int(handler.headers.get("Content-Length") or 0)
    cut_off = (
        behaviour.cut_uploads.pop(0) if handler.command == "PATCH" and size > 10_000 and behaviour.cut_uploads else None
    )
    body = handler.rfile.read(size if cut_off is None else cut_off) if size else b""
    part = handler.headers.get("Range", "") or handler.headers.get("Content-Range", "")
    behaviour.asked.append((handler.command, handler.path, part))
    path = urlsplit(handler.path).path
    if path == "/token":
        behaviour.authorised.append(given)
        _answer(handler, 200, f'{{"token": "{behaviour.token}"}}'.encode(), {})
        return
    if behaviour.token and given != f"Bearer {behaviour.token}":
        host = handler.headers["Host"]
        challenge = f'Bearer realm="http://{host}/token",service="test",scope="repository:x:pull,push"'
        _answer(handler, 401, b"{}", {"WWW-Authenticate": challenge})
        return
    if behaviour.forgetful and handler.command == "GET" and "/uploads/" in path:
        _answer(handler, 404, b"{}", {})
        return
    connection = http.client.HTTPConnection("127.0.0.1", behind, timeout=20)
    try:
        left_out = ("Authorization",) if cut_off is None else ("Authorization", "Content-Length")
        headers = {name: value for name, value in handler.headers.items() if name not in left_out}
        if behaviour.no_ranges:
            headers.pop("Range", None)
        target = behaviour.uploads.pop(path, handler.path) if handler.command == "GET" else handler.path
        connection.request(handler.command, target, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        if cut_off is not None:
            behaviour.uploads[path] = "{0.path}?{0.query}".format(urlsplit(answer.headers["Location"]))
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        kept = {name: value for name, value in answer.getheaders() if name not in ("Content-Length", "Connection")}
        is_blob = handler.command == "GET" and "/blobs/sha256:" in path
        if is_blob and behaviour.lie:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if handler.command == "HEAD":
            kept["Content-Length"] = answer.headers.get("Content-Length", "0")
        cut = behaviour.cut.pop(0) if is_blob and len(data) > 10_000 and behaviour.cut else None
        _answer(handler, answer.status, data, kept, cut, behaviour.stalled if behaviour.stall else None)
    finally:
        connection.close()


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    headers: dict[str, str],
    cut: int | None = None,
    stalled: threading.Event | None = None,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if "Content-Length" not in headers:
        handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    if cut is not None:
        handler.wfile.write(data[:cut])
        handler.wfile.flush()
        if stalled is not None:
            stalled.wait(_PATIENCE)
        handler.close_connection = True
        # At once, where the client waits for the rest.
        handler.connection.shutdown(socket.SHUT_RDWR)
        return
    if handler.command != "HEAD":
        handler.wfile.write(data)

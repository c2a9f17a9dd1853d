"""Requests to one repository of a registry.

Source: the OCI distribution specification; Docker's token authentication.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import ipaddress
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from overlayfs_py import __version__
from overlayfs_py.images.manifest import INDEXES, MANIFESTS, Descriptor
from overlayfs_py.images.model import ImageError, digest_of
from overlayfs_py.images.reference import Reference
from overlayfs_py.images.registry.credentials import Credentials
from overlayfs_py.images.streams import CHUNK

_TIMEOUT: Final = (15.0, 60.0)  # seconds to connect, and to wait for data
_ATTEMPTS: Final = 5
_PAUSE: Final = 0.5  # seconds before the second attempt, doubled with each
_LARGEST_DOCUMENT: Final = 16 << 20
_CERTIFICATES: Final = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_SYSTEM_CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_UNTRUSTED: Final = "CERTIFICATE_VERIFY_FAILED"
_DOCKER_HOST: Final = "registry-1.docker.io"
_ACCEPTED: Final = ", ".join((*MANIFESTS, *INDEXES))

Moved = Callable[[str, int, int], None]
"""Progress: the digest of a blob, how many of its bytes are over, how many there are."""


class _CutOff(requests.ConnectionError):
    """An answer ended before all of it had come."""


class Registry:
    """One repository, with what it takes to be let in. Raises ImageError, one line each, for whatever goes wrong."""

    __slots__ = ("aborted", "answers", "credentials", "host", "repository", "scheme", "session", "token", "verify")

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None,
        *,
        plain_http: bool = False,
        tls_verify: bool = True,
    ) -> None:
        self.host = _DOCKER_HOST if reference.host == "docker.io" else reference.host
        self.repository = reference.repository
        self.credentials = credentials
        self.token = ""
        self.aborted = False
        self.answers: set[requests.Response] = set()
        """Those that blobs are read from now."""
        self.session = requests.Session()
        self.session.trust_env = True
        self.session.auth = _no_netrc
        self.session.headers["User-Agent"] = f"ovl/{__version__}"
        retry = Retry(
            total=3,
            backoff_factor=_PAUSE,
            status_forcelist=(429, 502, 503, 504),
            allowed_methods=("GET", "HEAD"),
            raise_on_status=False,
        )
        for prefix in ("https://", "http://"):
            self.session.mount(prefix, HTTPAdapter(max_retries=retry))
        self.verify = _trusted(self.host) if tls_verify else False
        if not tls_verify:
            # The user has asked for it: there is no need to warn at each request.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self.scheme = "http" if plain_http else "https"
        if not plain_http and _is_loopback(self.host):
            self._find_scheme()

    def _find_scheme(self) -> None:
        """On this machine a registry may well speak plain HTTP; it does if it speaks no TLS (as with Docker)."""
        try:
            self.session.head(f"https://{self.host}/v2/", timeout=_TIMEOUT, verify=self.verify).close()
        except requests.RequestException as error:
            # That it is not trusted, or can't be reached at all, the next request says.
            if _UNTRUSTED not in str(error):
                self.scheme = "http"

    def close(self) -> None:
        self.session.close()

    def abort(self) -> None:
        """Let what other threads wait for end at once; nothing is tried again."""
        self.aborted = True
        for answer in list(self.answers):
            # It has been read to its end meanwhile.
            with suppress(OSError, ValueError):
                answer.raw.shutdown()

    def request(self, method: str, url: str, *, expected: tuple[int, ...], **more: Any) -> requests.Response:
        """Send a request, again with authentication where that is asked for; ImageError for any other answer."""
        where = urljoin(f"{self.scheme}://{self.host}/v2/{self.repository}/", url)
        ours = urlsplit(where).netloc == self.host
        try:
            answer = self._send(method, where, ours, more)
            if answer.status_code == 401 and ours:
                with answer:
                    self._authenticate(answer)
                answer = self._send(method, where, ours, more)
        except (requests.RequestException, OSError) as error:
            raise self.unreachable(error) from error
        if answer.status_code not in expected:
            message = _refusal(answer)
            answer.close()
            if answer.status_code in (401, 403):
                raise ImageError(f"{self.host} does not let you {_deed(method)} {self.repository}{message}")
            raise ImageError(f"{self.host} answers {answer.status_code} for {self.repository}{message}")
        return answer

    def _send(self, method: str, where: str, ours: bool, more: Mapping[str, Any]) -> requests.Response:
        arguments = dict(more)
        headers = dict(arguments.pop("headers", {}))
        if self.token and ours:
            headers["Authorization"] = self.token
        data = arguments.get("data")
        if isinstance(data, _Reported):
            data.file.seek(data.start)
        return self.session.request(
            method, where, headers=headers, timeout=_TIMEOUT, verify=self.verify, stream=True, **arguments
        )

    def unreachable(self, error: Exception) -> ImageError:
        """What to say of a connection that could not be made, or broke."""
        if isinstance(error, _CutOff):
            return ImageError(f"the connection to {self.host} was cut off")
        if isinstance(error, requests.exceptions.SSLError):
            return ImageError(f"{self.host} has a certificate that is not trusted: {_innermost(error)}")
        if isinstance(error, requests.Timeout):
            return ImageError(f"{self.host} does not answer in time")
        return ImageError(f"the connection to {self.host} failed: {_innermost(error)}")

    def _authenticate(self, answer: requests.Response) -> None:
        """Get what the registry asks for: a token from the server it names, or the password itself."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        kind, _, rest = challenge.partition(" ")
        known = self.credentials
        if kind.lower() == "basic":
            if known is None or known.identity:
                raise ImageError(f"{self.host} wants a user and password: log in to it (podman login, docker login)")
            self.token = _basic(known)
            return
        if kind.lower() != "bearer":
            raise ImageError(f"{self.host} wants an authentication that is not known here: {kind or 'none named'}")
        values = urllib.request.parse_keqv_list([item for item in urllib.request.parse_http_list(rest) if "=" in item])
        realm = values.get("realm", "")
        if urlsplit(realm).scheme not in ("https", "http"):
            raise ImageError(f"{self.host} names no server to get a token from")
        if urlsplit(realm).scheme == "http" and self.scheme == "https" and known is not None:
            raise ImageError(f"{self.host} wants the password sent unencrypted, to {realm}: it is not")
        self.token = f"Bearer {self._get_token(realm, values)}"

    def _get_token(self, realm: str, values: Mapping[str, str]) -> str:
        asked = {key: values[key] for key in ("service", "scope") if values.get(key)}
        known = self.credentials
        if known is not None and known.identity:
            form = {**asked, "grant_type": "refresh_token", "refresh_token": known.identity, "client_id": "ovl"}
            answer = self.session.post(realm, data=form, timeout=_TIMEOUT, verify=self.verify)
        else:
            headers = {}
            if known is not None:
                headers["Authorization"] = _basic(known)
            answer = self.session.get(realm, params=asked, headers=headers, timeout=_TIMEOUT, verify=self.verify)
        if answer.status_code != 200:
            who = f" to {known.user or 'you'}" if known is not None else ""
            raise ImageError(f"{self.host} gives no token{who}{_refusal(answer)}")
        try:
            body = answer.json()
            token = body.get("token") or body.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not token:
            raise ImageError(f"{self.host} has a server for tokens that gives none")
        return str(token)

    def manifest(self, what: str) -> tuple[bytes, str]:
        """The manifest or index of a tag or digest, as bytes and with its media type."""
        answer = self.request("GET", f"manifests/{what}", expected=(200, 404), headers={"Accept": _ACCEPTED})
        with answer:
            if answer.status_code == 404:
                raise ImageError(f"{self.host} has no {self.repository}{'@' if ':' in what else ':'}{what}")
            data = self._document(answer)
        wanted = what if ":" in what else answer.headers.get("Docker-Content-Digest", "")
        if wanted.startswith("sha256:") and digest_of(data) != wanted:
            raise ImageError(f"{self.host} sends a manifest that is not what its digest says: {wanted}")
        return data, answer.headers.get("Content-Type", "").partition(";")[0].strip()

    def document(self, wanted: Descriptor) -> bytes:
        """A small blob, checked."""
        if wanted.size > _LARGEST_DOCUMENT:
            raise ImageError(f"{wanted.digest} is too large: {wanted.size} bytes")
        with self.request("GET", f"blobs/{wanted.digest}", expected=(200,)) as answer:
            data = self._document(answer)
        if digest_of(data) != wanted.digest:
            raise ImageError(f"{self.host} sends a blob that is not what its digest says: {wanted.digest}")
        return data

    def _document(self, answer: requests.Response) -> bytes:
        data = b""
        try:
            for piece in _pieces(answer):
                data += piece
                if len(data) > _LARGEST_DOCUMENT:
                    raise ImageError(f"{self.host} sends a document that does not end")
        except requests.RequestException as error:
            raise self.unreachable(error) from error
        return data

    def download(self, wanted: Descriptor, partial: Path, target: Path, moved: Moved) -> None:
        """Get a blob to `target`. What came of it before a failure stays at `partial`, and need not come again.

        Raises ImageError, and OSError for what can't be written.
        """
        with _locked_file(partial) as file:
            part = _Part(file)
            attempt = 0
            while True:
                before = part.size
                moved(wanted.digest, before, wanted.size)
                try:
                    self._download_rest(wanted, part, moved)
                    break
                except requests.RequestException as error:
                    attempt = 1 if part.size > before else attempt + 1
                    if attempt >= _ATTEMPTS or self.aborted:
                        raise self.unreachable(error) from error
                    time.sleep(_PAUSE * 2**attempt)
            if part.digest() != wanted.digest or part.size != wanted.size:
                partial.unlink()
                raise ImageError(f"{self.host} sends a blob that is not what its digest says: {wanted.digest}")
            file.flush()
            os.rename(partial, target)

    def _download_rest(self, wanted: Descriptor, part: _Part, moved: Moved) -> None:
        """Append what is missing. RequestException where it breaks off."""
        if part.size >= wanted.size > 0:
            return
        headers = {"Accept-Encoding": "identity"}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
        with self.request("GET", f"blobs/{wanted.digest}", expected=(200, 206, 416), headers=headers) as answer:
            goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {part.size}-")
            if answer.status_code == 200 or not goes_on:
                # All of it comes again.
                part.restart()
            if answer.status_code == 416 or (answer.status_code == 206 and not goes_on):
                raise requests.ConnectionError("the registry can't go on in the middle of a blob")
            self.answers.add(answer)
            try:
                for piece in _pieces(answer):
                    part.append(piece)
                    if part.size > wanted.size:
                        return
                    moved(wanted.digest, part.size, wanted.size)
            finally:
                self.answers.discard(answer)
        if part.size < wanted.size:
            raise _CutOff

    def has_blob(self, digest: str) -> bool:
        with self.request("HEAD", f"blobs/{digest}", expected=(200, 404)) as answer:
            return answer.status_code == 200

    def upload(self, blob: Descriptor, source: Path, moved: Moved) -> None:
        """Put a blob there, unless it is there. Where the connection breaks off it goes on with what is missing."""
        if self.has_blob(blob.digest):
            moved(blob.digest, blob.size, blob.size)
            return
        location, sent = self._begin_upload(), 0
        attempt = 0
        with open(source, "rb") as file:
            while True:
                try:
                    self._upload_rest(location, _Reported(file, blob, moved, sent))
                    return
                except ImageError as error:
                    broken = isinstance(error.__cause__, requests.ConnectionError | requests.Timeout)
                    attempt += 1
                    if not broken or attempt >= _ATTEMPTS or self.aborted:
                        raise
                before = sent
                time.sleep(_PAUSE * 2**attempt)
                location, sent = self._find_upload(location, blob)
                if sent > before:
                    attempt = 0

    def _begin_upload(self) -> str:
        with self.request("POST", "blobs/uploads/", expected=(202,)) as answer:
            return urljoin(answer.url, answer.headers.get("Location", ""))

    def _find_upload(self, location: str, blob: Descriptor) -> tuple[str, int]:
        """Where to go on with an upload, and after how many bytes; a new one where the registry has not kept it."""
        with self.request("GET", location, expected=(200, 202, 204, 400, 404, 405)) as answer:
            match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
            # Registries say 0-0 of nothing, too.
            if answer.status_code < 400 and match is not None and 0 < int(match[1]) < blob.size:
                return urljoin(answer.url, answer.headers.get("Location", location)), int(match[1]) + 1
        return self._begin_upload(), 0

    def _upload_rest(self, location: str, data: _Reported) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        if data.start:
            headers["Content-Range"] = f"{data.start}-{data.blob.size - 1}"
        if len(data):
            with self.request("PATCH", location, expected=(202,), data=data, headers=headers) as answer:
                location = urljoin(answer.url, answer.headers.get("Location", location))
        location += f"{'&' if '?' in location else '?'}digest={data.blob.digest}"
        self.request("PUT", location, expected=(201,)).close()

    def put_manifest(self, what: str, data: bytes, media_type: str) -> None:
        """Give a manifest, whose blobs are there, a tag."""
        headers = {"Content-Type": media_type}
        self.request("PUT", f"manifests/{what}", expected=(201,), data=data, headers=headers).close()


def _pieces(answer: requests.Response) -> Iterator[bytes]:
    """The body of an answer as it comes, nothing held back; RequestException where it breaks off."""
    try:
        while piece := answer.raw.read1(CHUNK):
            yield piece
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.ReadTimeout from error
    except urllib3.exceptions.HTTPError as error:
        raise _CutOff from error


class _Part:
    """The beginning of a blob in a file, and the hash of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = 0
        self.hashed = hashlib.sha256()
        while chunk := file.read(CHUNK):
            self.hashed.update(chunk)
            self.size += len(chunk)

    def append(self, data: bytes) -> None:
        self.file.write(data)
        self.hashed.update(data)
        self.size += len(data)

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.hashed = hashlib.sha256()
        self.size = 0

    def digest(self) -> str:
        return f"sha256:{self.hashed.hexdigest()}"


class _Reported:
    """A file, from `start` on, that tells how much of it was read; requests streams it and takes its length."""

    def __init__(self, file: IO[bytes], blob: Descriptor, moved: Moved, start: int) -> None:
        self.start = start
        self.file = file
        self.blob = blob
        self.moved = moved

    def __len__(self) -> int:
        return self.blob.size - self.start

    def read(self, size: int = -1) -> bytes:
        # http.client asks for 8 KiB at a time, which is slow.
        data = self.file.read(max(size, CHUNK) if size >= 0 else size)
        self.moved(self.blob.digest, self.file.tell(), self.blob.size)
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(CHUNK):
            yield data


@contextmanager
def _locked_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is made where there is none, for us alone, at its start."""
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
            # Another pull has finished the blob, and taken the file, while we waited for it.


def _basic(known: Credentials) -> str:
    """The Authorization header of a user and password."""
    return "Basic " + base64.b64encode(f"{known.user}:{known.password}".encode()).decode()


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from sending what ~/.netrc holds, which is not for registries."""
    return request


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _trusted(host: str) -> bool | str:
    """The file of certificates to trust: the host's own, the machine's, or True for those that requests brings.

    What REQUESTS_CA_BUNDLE names comes first. Source: containers-certs.d(5).
    """
    if os.environ.get("REQUESTS_CA_BUNDLE"):
        return True
    for path in (*(folder / host / "ca.crt" for folder in _CERTIFICATES), _SYSTEM_CERTIFICATES):
        if path.is_file():
            return str(path)
    return True


def _innermost(error: BaseException) -> str:
    """The reason at the bottom of what requests and urllib3 wrap around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        for inner in (getattr(error, "reason", None), *error.args, error.__cause__):
            if isinstance(inner, BaseException):
                error = inner
                break
    return getattr(error, "strerror", None) or str(error)


def _refusal(answer: requests.Response) -> str:
    """What a registry says of why it refuses, for the end of a message."""
    try:
        first = answer.json()["errors"][0]
        return f": {first.get('message') or first.get('code')}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, requests.RequestException):
        # Not in the registries' form: the status has to do.
        return ""


def _deed(method: str) -> str:
    return "read" if method in ("GET", "HEAD") else "write to"

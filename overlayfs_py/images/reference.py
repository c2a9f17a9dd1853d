"""Names of images as Docker reads and writes them.

Source: the distribution project's reference grammar, and what Docker takes a short name for.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from overlayfs_py.images.model import ImageError, is_digest

_DEFAULT_HOST: Final = "docker.io"
_DEFAULT_FOLDER: Final = "library/"
_HOST: Final = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])"
    r"(?::[0-9]+)?"
)
_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_LONGEST: Final = 255


class Reference(NamedTuple):
    """Where an image is: the registry's host, the repository in it, and a tag or the digest of a manifest."""

    host: str
    repository: str
    tag: str
    digest: str

    @property
    def full(self) -> str:
        """The whole name, in which each image is known to the store."""
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.host}/{self.repository}{end}"

    @property
    def short(self) -> str:
        """The name as it is shown, without what Docker adds to short ones."""
        name = self.full
        if self.host == _DEFAULT_HOST:
            name = name.removeprefix(f"{_DEFAULT_HOST}/").removeprefix(_DEFAULT_FOLDER)
        return name


def parse(text: str) -> Reference:
    """Read a name; the host is Docker's and the tag `latest` where there is none. ImageError for what is no name."""
    name, _, digest = text.partition("@")
    if "@" in text and not is_digest(digest):
        raise ImageError(f"{text!r} is no name of an image: what is behind @ has to be sha256: and 64 digits")
    last = name.rpartition("/")[2]
    tag = ""
    if ":" in last:
        name, _, tag = name.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise ImageError(f"{text!r} is no name of an image: bad tag {tag!r}")
    host, slash, path = name.partition("/")
    if not slash or not (set(".:") & set(host) or host == "localhost"):
        host, path = _DEFAULT_HOST, name
    if host == "index.docker.io":
        host = _DEFAULT_HOST
    if host == _DEFAULT_HOST and "/" not in path:
        path = _DEFAULT_FOLDER + path
    if not _HOST.fullmatch(host) or not _PATH.fullmatch(path) or len(path) > _LONGEST:
        raise ImageError(f"{text!r} is no name of an image: it has to be like debian:12 or host:5000/folder/name:tag")
    return Reference(host, path, "" if digest else tag or "latest", digest)

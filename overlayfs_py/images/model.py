"""What an image is: a configuration and a stack of layers, all named by digests.

Source: the OCI image specification, config.md (DiffID, ChainID) and descriptor.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ImageError(Exception):
    """An image, an archive, a registry or the store can't be used: one line that says what is wrong."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image; `path` is its unpacked directory, to be used as a lower layer of an overlay.

    `digest` and `size` (bytes) are those of the blob as it is stored, compressed or not; `diff_id` is the digest of the
    uncompressed archive, `chain_id` that of the stack up to and with this layer.
    """

    chain_id: str
    diff_id: str
    digest: str
    size: int
    path: Path


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a store.

    `id` is the digest of the configuration, `config` what that holds (OCI image configuration), `names` the references
    that lead to it in their short form, `layers` the stack with the bottom first, `size` the bytes of all blobs.
    """

    id: str
    names: tuple[str, ...]
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    size: int

    @property
    def short_id(self) -> str:
        """The first twelve digits of the ID."""
        return self.id.removeprefix("sha256:")[:12]


def is_digest(text: object) -> bool:
    """Whether this is a digest in the one form that is used here: sha256 in lower case."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chain_ids(diff_ids: Sequence[str]) -> Iterator[str]:
    """The chain ID of each layer of a stack, bottom first. Source: config.md, "Layer ChainID"."""
    chain = ""
    for diff_id in diff_ids:
        chain = digest_of(f"{chain} {diff_id}".encode()) if chain else diff_id
        yield chain

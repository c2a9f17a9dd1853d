"""New images: a root filesystem that becomes one, and one more layer on an image that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from overlayfs_py.images.compress import SUFFIX, Output, copy_hashed
from overlayfs_py.images.manifest import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    dump_json,
    make_manifest,
    parse_manifest,
    this_platform,
)
from overlayfs_py.images.model import Image, ImageError, digest_of
from overlayfs_py.images.pack import pack
from overlayfs_py.images.publish import Incoming, Told
from overlayfs_py.images.settings import apply_lines, now
from overlayfs_py.images.store import Store, ignore
from overlayfs_py.images.streams import TarSource, compression_of


def import_root(
    store: Store,
    archive: IO[bytes],
    *,
    name: str | None = None,
    changes: Sequence[str] = (),
    comment: str = "",
    told: Told = ignore,
) -> tuple[Image, list[str]]:
    """Make an image of one layer of the archive of a root filesystem, compressed or not.

    `changes` are lines as of a Dockerfile. Raises ImageError.
    """
    settings = apply_lines({}, changes)
    with store.session() as session:
        blob = session / "layer"
        try:
            digest, size = copy_hashed(archive, blob)
        except OSError as error:
            raise ImageError(f"cannot copy the archive into the store: {error.strerror}") from error
        if size == 0:
            raise ImageError("the archive is empty")
        with open(blob, "rb") as file:
            kind = compression_of(file.read(4))
        with open(blob, "rb") as file, TarSource(file) as source:
            diff_id = source.finish()
        system, _, architecture = this_platform().partition("/")
        config = {
            "created": now(),
            "architecture": architecture,
            "os": system,
            "config": settings,
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [_history("ovl import", comment or "imported from an archive")],
        }
        layer = Descriptor(OCI_LAYER + SUFFIX[kind], digest, size)
        incoming = _incoming(config, [layer], {digest: blob})
        return store.add(session, incoming, [name] if name else [], told=told)


def commit(
    store: Store,
    upper: Path,
    base: Image,
    *,
    changes: Mapping[str, Any] | None,
    name: str | None,
    comment: str,
    author: str,
    created_by: str,
) -> Image:
    """As Store.commit, which is the way to call it."""
    config = dict(base.config)
    settings = dict(config.get("config") or {}) | dict(changes or {})
    config["config"] = {key: value for key, value in settings.items() if value is not None}
    config["created"] = now()
    if author:
        config["author"] = author
    with store.session() as session:
        blob = session / "layer"
        lowers = [layer.path for layer in reversed(base.layers)]
        try:
            with open(blob, "xb") as file:
                output = Output(file, "gzip")
                pack(upper, lowers, output, userxattr=store.userxattr)
                diff_id, digest = output.finish()
        except OSError as error:
            raise ImageError(f"cannot write to the store: {error.strerror}") from error
        layer = Descriptor(OCI_LAYER + SUFFIX["gzip"], digest, output.size)
        config["rootfs"] = {"type": "layers", "diff_ids": [*(known.diff_id for known in base.layers), diff_id]}
        history = config.get("history")
        entry = _history(created_by or "ovl commit", comment, author)
        config["history"] = [*(history if isinstance(history, list) else []), entry]
        for transient in ("container", "container_config", "id", "parent"):
            config.pop(transient, None)
        incoming = _incoming(config, [*store.manifest(base).layers, layer], {digest: blob})
        return store.add(session, incoming, [name] if name else [])[0]


def _history(created_by: str, comment: str = "", author: str = "") -> dict[str, str]:
    entry = {"created": now(), "created_by": created_by, "comment": comment, "author": author}
    return {key: value for key, value in entry.items() if value}


def _incoming(config: Mapping[str, Any], layers: Sequence[Descriptor], blobs: Mapping[str, Path]) -> Incoming:
    data = dump_json(config)
    typed = [_as_oci(layer) for layer in layers]
    manifest = make_manifest(Descriptor(OCI_CONFIG, digest_of(data), len(data)), typed)
    return Incoming(parse_manifest(manifest, OCI_MANIFEST), data, dict(blobs))


def _as_oci(layer: Descriptor) -> Descriptor:
    """A layer under OCI's media type, where it has Docker's."""
    if not layer.media_type.startswith("application/vnd.docker."):
        return layer
    for suffix, kind in ((".gzip", "+gzip"), (".zstd", "+zstd")):
        if layer.media_type.endswith(suffix):
            return Descriptor(OCI_LAYER + kind, layer.digest, layer.size)
    return Descriptor(OCI_LAYER, layer.digest, layer.size)

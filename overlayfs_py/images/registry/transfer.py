"""Pulling images from a registry, and pushing them to one."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from overlayfs_py.images.manifest import (
    INDEXES,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    check_platform,
    choose_platform,
    load_json,
    make_manifest,
    parse_manifest,
    this_platform,
)
from overlayfs_py.images.model import Image, ImageError, digest_of
from overlayfs_py.images.publish import Incoming, Told, check
from overlayfs_py.images.reference import parse
from overlayfs_py.images.registry.client import Moved, Registry
from overlayfs_py.images.registry.credentials import find_credentials
from overlayfs_py.images.save import compressed
from overlayfs_py.images.store import Store, ignore
from overlayfs_py.images.workers import Workers

_AT_ONCE: Final = 3
_KEPT: Final = 7 * 86_400  # seconds that a blob's beginning is kept for whoever goes on with it


@dataclass(frozen=True, slots=True)
class Access:
    """How a registry is reached: another file of credentials than the usual ones, without TLS, or unverified."""

    authfile: Path | None = None
    plain_http: bool = False
    tls_verify: bool = True


def unmoved(_digest: str, _done: int, _size: int) -> None:
    """Progress that no one looks at."""


def pull(
    store: Store,
    name: str,
    *,
    access: Access = Access(),
    platform: str | None = None,
    told: Told = ignore,
    moved: Moved = unmoved,
) -> tuple[Image, list[str]]:
    """Get an image, or what of it is not here yet; it, and warnings. Raises ImageError, with the store as it was."""
    reference = parse(name)
    registry = _registry(name, access)
    try:
        manifest = _manifest(registry, reference.digest or reference.tag, platform or this_platform())
        incoming = Incoming(manifest, registry.document(manifest.config))
        check(incoming)
        check_platform(incoming.config, platform)
        with store.session() as session:
            _drop_old(store.layout.partial)
            _download(store, registry, session, incoming, moved)
            return store.add(session, incoming, [reference.full], told=told)
    finally:
        registry.close()


def _registry(name: str, access: Access) -> Registry:
    reference = parse(name)
    credentials = find_credentials(reference.host, reference.repository, access.authfile)
    return Registry(reference, credentials, plain_http=access.plain_http, tls_verify=access.tls_verify)


def _manifest(registry: Registry, what: str, platform: str) -> Manifest:
    data, media_type = registry.manifest(what)
    for _ in range(4):
        if media_type not in INDEXES:
            break
        index = load_json(data, "the index")
        manifests = index.get("manifests") if isinstance(index, Mapping) else None
        chosen = choose_platform(manifests if isinstance(manifests, list) else [], platform)
        data, media_type = registry.manifest(chosen.digest)
    return parse_manifest(data, media_type)


def _download(store: Store, registry: Registry, session: Path, incoming: Incoming, moved: Moved) -> None:
    """Get the blobs that the store lacks, some at once, to the session's directory."""
    missing = {layer.digest: layer for layer in incoming.manifest.layers if not store.blob(layer.digest).exists()}
    partials = {digest: store.layout.partial / digest.removeprefix("sha256:") for digest in missing}
    try:
        with _workers(registry) as workers:
            jobs = {}
            for digest, layer in missing.items():
                target = session / partials[digest].name
                job = workers.submit(registry.download, layer, partials[digest], target, _checked(moved, workers))
                jobs[job] = digest, target
            for job in as_completed(jobs):
                job.result()
                digest, target = jobs[job]
                incoming.blobs[digest] = target
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # They would keep the disk full.
            for partial in partials.values():
                partial.unlink(missing_ok=True)
        raise ImageError(f"cannot write to the store: {error.strerror}") from error


@contextmanager
def _workers(registry: Registry) -> Iterator[Workers]:
    """Threads that move blobs; what they wait for does not come any more when an exception ends the block."""
    with Workers(_AT_ONCE) as workers:
        try:
            yield workers
        except BaseException:
            registry.abort()
            raise


def _checked(moved: Moved, workers: Workers) -> Moved:
    """Progress that ends what makes it where that is no longer wanted."""

    def told(digest: str, done: int, size: int) -> None:
        workers.check()
        moved(digest, done, size)

    return told


def _drop_old(partial: Path) -> None:
    """Remove the beginnings of blobs that no one came back for."""
    for path in partial.iterdir():
        try:
            if time.time() - path.stat().st_mtime > _KEPT:
                path.unlink()
        except FileNotFoundError:
            # another pull has just taken it
            continue


def push(
    store: Store, image: Image, name: str, *, access: Access = Access(), told: Told = ignore, moved: Moved = unmoved
) -> str:
    """Put an image into a registry; the digest of its manifest there. Layers that are not compressed get so.

    Raises ImageError.
    """
    reference = parse(name)
    if reference.digest:
        raise ImageError(f"{name}: an image is pushed to a tag, not to a digest")
    registry = _registry(name, access)
    manifest = store.manifest(image)
    data, media_type = manifest.data, manifest.media_type
    try:
        with store.session() as session:
            blobs: list[tuple[Descriptor, Path]] = []
            for wanted, layer in zip(manifest.layers, image.layers, strict=True):
                told("making ready", layer.diff_id)
                blobs.append(compressed(wanted, store.blob(layer.digest), session, layer.diff_id))
            if [blob for blob, _ in blobs] != list(manifest.layers):
                config = Descriptor(OCI_CONFIG, manifest.config.digest, manifest.config.size)
                data, media_type = make_manifest(config, [blob for blob, _ in blobs]), OCI_MANIFEST
            todo = {blob.digest: (blob, path) for blob, path in blobs}
            todo[manifest.config.digest] = (manifest.config, store.blob(manifest.config.digest))
            with _workers(registry) as workers:
                told_too = _checked(moved, workers)
                for job in as_completed(workers.submit(registry.upload, *blob, told_too) for blob in todo.values()):
                    job.result()
            registry.put_manifest(reference.tag, data, media_type)
    finally:
        registry.close()
    return digest_of(data)

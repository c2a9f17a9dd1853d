"""Bringing an image into the store: what layers it lacks are unpacked all at once, and put in place in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

from overlayfs_py.images.archive import shown
from overlayfs_py.images.index import Record, add_record, image_of
from overlayfs_py.images.layout import Layout
from overlayfs_py.images.manifest import Manifest, parse_config
from overlayfs_py.images.model import Image, ImageError, chain_ids, digest_of
from overlayfs_py.images.settle import settle
from overlayfs_py.images.unpack import Extracted, extract
from overlayfs_py.images.workers import Workers
from overlayfs_py.sys import files

Told = Callable[[str, str], None]
"""Progress: what happens now, to the layer of which diff ID."""


@dataclass(slots=True)
class Incoming:
    """An image on its way in: its documents, and where its layers' blobs are until they are the store's.

    `blobs` and `unpacked` (by diff ID and chain ID) are in the session's directory; what the store has needs none.
    """

    manifest: Manifest
    config: bytes
    blobs: dict[str, Path] = field(default_factory=dict)
    unpacked: dict[str, Path] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.manifest.config.digest


def check(incoming: Incoming) -> list[str]:
    """The diff IDs of an image whose documents fit together; ImageError where they don't."""
    if digest_of(incoming.config) != incoming.id:
        raise ImageError(f"the image's configuration is not what its digest says: {incoming.id}")
    _, diff_ids = parse_config(incoming.config)
    if len(diff_ids) != len(incoming.manifest.layers):
        raise ImageError(f"the image names {len(diff_ids)} layers and has {len(incoming.manifest.layers)}")
    if not diff_ids:
        raise ImageError("the image has no layers")
    return diff_ids


def publish(
    layout: Layout, session: Path, incoming: Incoming, names: Sequence[str], told: Told
) -> tuple[Image, list[str]]:
    """Make the image the store's, under `names` (whole references, which are taken from other images).

    Returns it, and warnings of one line each. Raises ImageError, with the store as it was.
    """
    diff_ids = check(incoming)
    chain = list(chain_ids(diff_ids))
    warnings: list[str] = []
    extracted: dict[int, Extracted] = {}
    while True:
        missing = [at for at, chain_id in enumerate(chain) if not layout.layer(chain_id).is_dir()]
        todo = [at for at in missing if chain[at] not in incoming.unpacked and at not in extracted]
        extracted |= _extract_all(layout, session, incoming, diff_ids, todo, told)
        with layout.locked(exclusive=False):
            # What is looked at below must not go meanwhile.
            if not all(layout.layer(each).is_dir() or at in extracted for at, each in enumerate(chain)):
                continue
            warnings += _settle_all(layout, session, incoming, chain, extracted)
        if incoming.unpacked:
            # The index is on the disk before the kernel writes files by itself: it must not name layers without data.
            _sync(session)
        with layout.locked(exclusive=True):
            # Someone may have removed an image whose layers were to be shared.
            ready = all(layout.layer(chain_id).is_dir() or chain_id in incoming.unpacked for chain_id in chain)
            if ready:
                _check_blobs(layout, incoming)
                # What is told of it is read before anyone can remove it again.
                return image_of(layout, _put_in_place(layout, incoming, names)), warnings


def _extract_all(
    layout: Layout, session: Path, incoming: Incoming, diff_ids: Sequence[str], todo: Sequence[int], told: Told
) -> dict[int, Extracted]:
    """Extract the layers with these numbers, all at once, each to a directory of the session."""
    extracted: dict[int, Extracted] = {}
    with Workers(os.cpu_count()) as workers:
        jobs = {}
        for at in todo:
            target = _target(session, at)
            target.mkdir(mode=0o700)
            digest = incoming.manifest.layers[at].digest
            blob = incoming.blobs.get(digest, layout.blob(digest))
            jobs[workers.submit(_extract, workers, layout, blob, target, diff_ids[at], told)] = at
        for job in as_completed(jobs):
            extracted[jobs[job]] = job.result()
    return extracted


def _target(session: Path, at: int) -> Path:
    return session / f"layer-{at}"


def _settle_all(
    layout: Layout, session: Path, incoming: Incoming, chain: Sequence[str], extracted: dict[int, Extracted]
) -> list[str]:
    """Settle what was extracted and is not settled yet, bottom first; warnings. The store is locked."""
    todo = [at for at in sorted(extracted) if chain[at] not in incoming.unpacked]
    warnings = []
    disowned = sum(extracted[at].disowned for at in todo)
    if disowned:
        warnings.append(f"{disowned} files are root's that were another user's: that takes ranges in /etc/subuid")
    for at in todo:
        below = [incoming.unpacked.get(chain_id) or layout.layer(chain_id) for chain_id in chain[:at]]
        settle(_target(session, at), extracted[at], below[::-1], userxattr=layout.userxattr)
        incoming.unpacked[chain[at]] = _target(session, at)
        if extracted[at].skipped:
            warnings.append(f"{len(extracted[at].skipped)} devices left out, which only root can make")
        for path in extracted[at].covering:
            warnings.append(f"{shown(path)} is no directory in the layers below, and becomes one, as with Docker")
    return warnings


def _extract(workers: Workers, layout: Layout, blob: Path, target: Path, diff_id: str, told: Told) -> Extracted:
    told("unpacking", diff_id)
    try:
        with open(blob, "rb") as archive:
            extracted = extract(workers.input(archive), target, userxattr=layout.userxattr, one_owner=layout.one_owner)
    except FileNotFoundError as error:
        raise ImageError(f"the blob of a layer is missing: {blob.name}") from error
    if extracted.diff_id != diff_id:
        raise ImageError(f"a layer is not what the image says: it is {extracted.diff_id}, not {diff_id}")
    told("unpacked", diff_id)
    return extracted


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files.sync_filesystem(fd)
    finally:
        os.close(fd)


def _check_blobs(layout: Layout, incoming: Incoming) -> None:
    for layer in incoming.manifest.layers:
        if layer.digest not in incoming.blobs and not layout.blob(layer.digest).exists():
            raise ImageError(f"the blob of a layer has gone meanwhile: {layer.digest}; try again")


def _put_in_place(layout: Layout, incoming: Incoming, names: Sequence[str]) -> Record:
    """Move blobs and layers into the store, then write the index. The store is locked exclusively."""
    for digest, path in incoming.blobs.items():
        if not layout.blob(digest).exists():
            # Another image of the session may need it, too.
            os.link(path, layout.blob(digest))
    for data in (incoming.config, incoming.manifest.data):
        blob = layout.blob(digest_of(data))
        if not blob.exists():
            part = blob.with_name("part")
            part.write_bytes(data)
            os.rename(part, blob)
    for chain_id, path in incoming.unpacked.items():
        if not layout.layer(chain_id).is_dir():
            os.rename(path, layout.layer(chain_id))
    return add_record(layout, incoming.manifest, names)

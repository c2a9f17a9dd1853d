"""The index of the store: which images there are, and under what names.

It is the OCI layout's index.json: one descriptor for each name of an image, one without a name where it has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from overlayfs_py.images.layout import Layout
from overlayfs_py.images.manifest import REFERENCE, Manifest, parse_config, parse_manifest
from overlayfs_py.images.model import Image, ImageError, Layer, chain_ids, digest_of
from overlayfs_py.images.reference import parse

_DAMAGED: Final = "the store's index is damaged: it has an entry without a manifest's digest"


@dataclass(slots=True)
class Record:
    """One image of the index: its manifest's type, digest and size in bytes, and its whole names."""

    media_type: str
    digest: str
    size: int
    names: list[str] = field(default_factory=list)


def read_records(layout: Layout) -> list[Record]:
    """The images there are, in the order they came."""
    records: dict[str, Record] = {}
    for entry in layout.read_index():
        digest, media_type, size = entry.get("digest"), entry.get("mediaType"), entry.get("size")
        if not isinstance(digest, str) or not isinstance(media_type, str) or not isinstance(size, int):
            raise ImageError(_DAMAGED)
        record = records.setdefault(digest, Record(media_type, digest, size))
        name = (entry.get("annotations") or {}).get(REFERENCE)
        if isinstance(name, str):
            record.names.append(name)
    return list(records.values())


def write_records(layout: Layout, records: Iterable[Record]) -> None:
    """Replace the index; the store is locked exclusively."""
    entries: list[dict[str, Any]] = []
    for record in records:
        entry = {"mediaType": record.media_type, "digest": record.digest, "size": record.size}
        entries += [{**entry, "annotations": {REFERENCE: name}} for name in record.names] or [entry]
    layout.write_index(entries)


def manifest_of(layout: Layout, record: Record) -> Manifest:
    return parse_manifest(layout.read_blob(record.digest), record.media_type)


def image_of(layout: Layout, record: Record) -> Image:
    """What a record stands for, its documents read."""
    manifest = manifest_of(layout, record)
    config, diff_ids = parse_config(layout.read_blob(manifest.config.digest))
    layers = tuple(
        Layer(chain_id, diff_id, blob.digest, blob.size, layout.layer(chain_id))
        for chain_id, diff_id, blob in zip(chain_ids(diff_ids), diff_ids, manifest.layers, strict=True)
    )
    size = record.size + manifest.config.size + sum(layer.size for layer in layers)
    names = tuple(parse(name).short for name in record.names)
    return Image(manifest.config.digest, names, config, layers, size)


def add_record(layout: Layout, manifest: Manifest, names: Sequence[str]) -> Record:
    """Put an image into the index, and return it, under names that are taken from those that have them.

    It replaces another manifest of the same configuration, whose names it keeps. The store is locked exclusively.
    """
    digest = digest_of(manifest.data)
    new = Record(manifest.media_type, digest, len(manifest.data), list(names))
    kept = []
    for record in read_records(layout):
        record.names = [name for name in record.names if name not in names]
        if record.digest == digest or manifest_of(layout, record).config.digest == manifest.config.digest:
            new.names += record.names
        else:
            kept.append(record)
    write_records(layout, [*kept, new])
    return new


def in_use(layout: Layout) -> tuple[set[str], set[str]]:
    """The digests of all blobs, and the chain IDs of all layers, that images of the index have.

    Raises ImageError where one can't be read, as then nothing can be said of the others.
    """
    blobs: set[str] = set()
    chains: set[str] = set()
    for record in read_records(layout):
        manifest = manifest_of(layout, record)
        _, diff_ids = parse_config(layout.read_blob(manifest.config.digest))
        blobs |= {record.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)}
        chains.update(chain_ids(diff_ids))
    return blobs, chains

"""Images from archives and directories: docker-archive and OCI layout, found out by what they hold.

Source: the OCI image specification, image-layout.md; what `docker save` writes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol

from overlayfs_py.images.archive import entries, shown
from overlayfs_py.images.compress import SUFFIX
from overlayfs_py.images.manifest import (
    INDEXES,
    MANIFESTS,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    REFERENCE,
    Descriptor,
    check_platform,
    choose_platform,
    descriptor,
    load_json,
    make_manifest,
    parse_config,
    parse_manifest,
    this_platform,
)
from overlayfs_py.images.model import Image, ImageError, digest_of
from overlayfs_py.images.publish import Incoming, Told
from overlayfs_py.images.reference import parse
from overlayfs_py.images.store import Store, ignore
from overlayfs_py.images.streams import CHUNK, TarSource, compression_of
from overlayfs_py.sys import paths

_LARGEST_DOCUMENT: Final = 16 << 20
_CONTAINERD_NAME: Final = "io.containerd.image.name"


@dataclass(frozen=True, slots=True)
class _Blob:
    path: Path
    digest: str
    size: int


class _Files(Protocol):
    """The files of an archive or directory, by their paths in it."""

    def has(self, name: str) -> bool: ...

    def fetch(self, name: str) -> _Blob:
        """The file, in the session's directory; ImageError where there is none."""


def load(
    store: Store,
    source: Path | IO[bytes],
    *,
    name: str | None = None,
    platform: str | None = None,
    told: Told = ignore,
) -> Iterator[tuple[Image, list[str]]]:
    """Bring every image of a directory, tar file or stream into the store, each with warnings.

    `name` is given to the image, of which there must be one then. Raises ImageError; images before the bad one stay.
    """
    stem = "image"
    with store.session() as session:
        files: _Files
        if isinstance(source, Path) and source.is_dir():
            stem = source.resolve().name
            files = _Directory(source, session)
        elif isinstance(source, Path):
            stem = source.name.split(".")[0]
            try:
                with open(source, "rb") as archive:
                    files = _Archive(archive, session)
            except OSError as error:
                raise ImageError(f"cannot read {source}: {error.strerror}") from error
        else:
            files = _Archive(source, session)
        if files.has("index.json"):
            found = list(_from_layout(files, stem, platform or this_platform()))
        elif files.has("manifest.json"):
            found = list(_from_docker(files))
        else:
            raise ImageError("neither an OCI layout nor a docker-archive: no index.json and no manifest.json in it")
        if name is not None:
            if len(found) != 1:
                raise ImageError(f"a name can be given to one image, and there are {len(found)}")
            found = [(found[0][0], [name])]
        for incoming, names in found:
            check_platform(incoming.config, platform)
            yield store.add(session, incoming, names, told=told)


class _Archive:
    """The files of a tar, copied out of it as they come."""

    def __init__(self, archive: IO[bytes], session: Path) -> None:
        self.found: dict[str, _Blob] = {}
        self.links: dict[str, str] = {}
        with TarSource(archive) as source:
            for serial, entry in enumerate(entries(source)):
                name = os.fsdecode(entry.path)
                if entry.format == stat.S_IFREG:
                    pieces = (piece for _, length in entry.segments for piece in source.pieces(length))
                    self.found[name] = _write(session / f"in-{serial}", pieces, entry.size)
                elif entry.format == stat.S_IFLNK:
                    folder = os.path.dirname(name)
                    self.links[name] = os.path.normpath(os.path.join(folder, os.fsdecode(entry.target)))
                elif entry.format == 0:
                    self.links[name] = os.fsdecode(entry.target)

    def _resolved(self, name: str) -> str:
        # docker save has written layers that occur twice as links, one step long.
        name = os.path.normpath(name)
        return self.links.get(name, name)

    def has(self, name: str) -> bool:
        return self._resolved(name) in self.found

    def fetch(self, name: str) -> _Blob:
        try:
            return self.found[self._resolved(name)]
        except KeyError:
            raise ImageError(f"the archive has no {shown(os.fsencode(name))}") from None


class _Directory:
    """The files of a directory, copied from there when they are asked for."""

    def __init__(self, root: Path, session: Path) -> None:
        self.root = root
        self.session = session
        self.serial = 0
        self.known: dict[str, _Blob] = {}

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def fetch(self, name: str) -> _Blob:
        if name not in self.known:
            self.known[name] = self._copy(name)
        return self.known[name]

    def _copy(self, name: str) -> _Blob:
        self.serial += 1
        try:
            root = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fd = paths.open_beneath(root, os.fsencode(name), os.O_RDONLY | os.O_NONBLOCK)
            finally:
                os.close(root)
            with open(fd, "rb") as file:
                st = os.fstat(fd)
                if not stat.S_ISREG(st.st_mode):
                    raise ImageError(f"{self.root / name} is no file")
                chunks = iter(lambda: file.read(CHUNK), b"")
                return _write(self.session / f"in-{self.serial}", chunks, st.st_size)
        except OSError as error:
            raise ImageError(f"cannot read {self.root / name}: {error.strerror}") from error


def _write(path: Path, pieces: Iterator[bytes], size: int) -> _Blob:
    hashed = hashlib.sha256()
    written = 0
    try:
        with open(path, "xb") as file:
            for piece in pieces:
                hashed.update(piece)
                file.write(piece)
                written += len(piece)
    except OSError as error:
        raise ImageError(f"cannot write to the store: {error.strerror}") from error
    if written != size:
        raise ImageError(f"the archive ends too early: {written} of {size} bytes")
    return _Blob(path, f"sha256:{hashed.hexdigest()}", size)


def _document(files: _Files, name: str) -> bytes:
    blob = files.fetch(name)
    if blob.size > _LARGEST_DOCUMENT:
        raise ImageError(f"{name} is too large: {blob.size} bytes")
    return blob.path.read_bytes()


def _blob(files: _Files, wanted: Descriptor) -> _Blob:
    """A blob of an OCI layout, which is what its descriptor says."""
    blob = files.fetch(f"blobs/sha256/{wanted.digest.removeprefix('sha256:')}")
    if blob.digest != wanted.digest or blob.size != wanted.size:
        raise ImageError(f"a blob is not what its descriptor says: {wanted.digest}")
    return blob


def _blob_document(files: _Files, wanted: Descriptor) -> bytes:
    blob = _blob(files, wanted)
    if blob.size > _LARGEST_DOCUMENT:
        raise ImageError(f"{wanted.digest} is too large: {blob.size} bytes")
    return blob.path.read_bytes()


def _from_layout(files: _Files, stem: str, platform: str) -> Iterator[tuple[Incoming, list[str]]]:
    index = load_json(_document(files, "index.json"), "index.json")
    listed = index.get("manifests") if isinstance(index, Mapping) else None
    if not isinstance(listed, list) or not listed:
        raise ImageError("index.json lists no image")
    by_digest: dict[str, tuple[Incoming, list[str]]] = {}
    for value in listed:
        top = descriptor(value, "index.json")
        name = _layout_name(value.get("annotations"), stem)
        data = _blob_document(files, top)
        media_type = top.media_type
        for _ in range(4):
            if media_type not in INDEXES:
                break
            inner = load_json(data, "an index")
            manifests = inner.get("manifests") if isinstance(inner, Mapping) else None
            chosen = choose_platform(manifests if isinstance(manifests, list) else [], platform)
            media_type, data = chosen.media_type, _blob_document(files, chosen)
        if media_type not in MANIFESTS:
            continue
        found = by_digest.setdefault(digest_of(data), (_from_manifest(files, data, media_type), []))
        if name:
            found[1].append(name)
    if not by_digest:
        raise ImageError("index.json lists no image")
    yield from by_digest.values()


def _layout_name(annotations: object, stem: str) -> str:
    """The name an entry of index.json gives; one that is a tag alone gets the name of the file before it."""
    if not isinstance(annotations, Mapping):
        return ""
    for key in (_CONTAINERD_NAME, REFERENCE):
        name = annotations.get(key)
        if isinstance(name, str) and name:
            break
    else:
        return ""
    candidates = (name,) if set("/:") & set(name) else (f"{stem.lower()}:{name}", name)
    for candidate in candidates:
        try:
            return parse(candidate).full
        except ImageError:
            # A layout may hold any text there; what is no name leaves the image without one.
            continue
    return ""


def _from_manifest(files: _Files, data: bytes, media_type: str) -> Incoming:
    manifest = parse_manifest(data, media_type)
    blobs = {layer.digest: _blob(files, layer).path for layer in manifest.layers}
    return Incoming(manifest, _blob_document(files, manifest.config), blobs)


def _from_docker(files: _Files) -> Iterator[tuple[Incoming, list[str]]]:
    listed = load_json(_document(files, "manifest.json"), "manifest.json")
    if not isinstance(listed, list) or not listed or not all(isinstance(value, Mapping) for value in listed):
        raise ImageError("manifest.json lists no image")
    for value in listed:
        layers, tags = value.get("Layers"), value.get("RepoTags") or []
        if not isinstance(value.get("Config"), str) or not isinstance(layers, list) or not isinstance(tags, list):
            raise ImageError("manifest.json names no configuration or no layers")
        config = _document(files, value["Config"])
        parse_config(config)
        described = []
        blobs = {}
        for name in layers:
            blob = files.fetch(str(name))
            with open(blob.path, "rb") as file:
                suffix = SUFFIX[compression_of(file.read(4))]
            described.append(Descriptor(OCI_LAYER + suffix, blob.digest, blob.size))
            blobs[blob.digest] = blob.path
        manifest = make_manifest(Descriptor(OCI_CONFIG, digest_of(config), len(config)), described)
        names = [parse(str(tag)).full for tag in tags]
        yield Incoming(parse_manifest(manifest, OCI_MANIFEST), config, blobs), names

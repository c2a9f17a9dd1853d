"""Images to archives and directories that other engines read: docker-archive and OCI layout.

Equal images give equal bytes. Source: the OCI image specification, image-layout.md; what `docker save` writes.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

from overlayfs_py.images.compress import Output, recompress
from overlayfs_py.images.manifest import (
    OCI_CONFIG,
    OCI_MANIFEST,
    REFERENCE,
    Descriptor,
    dump_json,
    make_manifest,
)
from overlayfs_py.images.model import Image, ImageError, digest_of
from overlayfs_py.images.reference import parse
from overlayfs_py.images.store import Store
from overlayfs_py.images.streams import Compression, compression_of

Format = Literal["docker-archive", "oci"]
LayerForm = Literal["as-is", "plain", "gzip", "zstd"]

_KINDS: Final[dict[str, Compression]] = {"plain": "", "gzip": "gzip", "zstd": "zstd"}
_SUFFIXES: Final[dict[str, Compression]] = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}

Member = tuple[str, bytes | Path]
"""A file of what is written: its name, and its content or where that is."""


def save(
    store: Store,
    images: Sequence[tuple[Image, str]],
    target: Path | IO[bytes],
    *,
    form: Format = "docker-archive",
    layers: LayerForm = "as-is",
) -> None:
    """Write images, each with the name it is to have there or "", to a tar file, a stream or a new directory.

    A path that ends with a slash, or an empty directory, is a directory; an archive is compressed as its name ends.
    Layers in a docker-archive are never compressed. Raises ImageError; then there is no new file.
    """
    with store.session() as session:
        members = _docker(store, images, session) if form == "docker-archive" else _oci(store, images, session, layers)
        try:
            if not isinstance(target, Path):
                _write_archive(target, members, "")
            elif target.is_dir():
                _write_directory(target, members)
            else:
                part = target.with_name(f".{target.name}.part")
                with open(part, "wb") as file:
                    try:
                        _write_archive(file, members, _SUFFIXES.get(target.suffix, ""))
                        os.rename(part, target)
                    except BaseException:
                        part.unlink()
                        raise
        except OSError as error:
            where = target if isinstance(target, Path) else "the archive"
            raise ImageError(f"cannot write {where}: {error.strerror}") from error


def _write_archive(file: IO[bytes], members: Iterator[Member], kind: Compression) -> None:
    output = Output(file, kind)
    with tarfile.open(fileobj=cast(IO[bytes], output), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            if isinstance(content, Path):
                info.size = content.stat().st_size
                with open(content, "rb") as source:
                    tar.addfile(info, source)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    output.finish()


def _write_directory(target: Path, members: Iterator[Member]) -> None:
    if any(target.iterdir()):
        raise ImageError(f"{target} is not empty")
    try:
        for name, content in members:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)
    except BaseException:
        for path in target.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _docker(store: Store, images: Sequence[tuple[Image, str]], session: Path) -> Iterator[Member]:
    listed: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for image, name in images:
        hexadecimal = image.id.removeprefix("sha256:")
        known = listed.get(image.id)
        if known is None:
            layers = [f"{layer.diff_id.removeprefix('sha256:')}.tar" for layer in image.layers]
            known = listed[image.id] = {"Config": f"{hexadecimal}.json", "RepoTags": [], "Layers": layers}
            yield f"{hexadecimal}.json", store.blob(image.id).read_bytes()
        if name:
            known["RepoTags"].append(parse(name).short)
        for layer, file in zip(image.layers, known["Layers"], strict=True):
            if file not in written:
                written.add(file)
                yield file, _plain(store.blob(layer.digest), session / file, layer.diff_id)
    yield "manifest.json", dump_json(list(listed.values()))


def _plain(blob: Path, target: Path, diff_id: str) -> Path:
    """The uncompressed archive of a layer: the blob itself, or a new file."""
    with open(blob, "rb") as file:
        if not compression_of(file.read(4)):
            return blob
    found, _ = recompress(blob, target, "")
    if found != diff_id:
        raise ImageError(f"a blob of the store is damaged: {blob.name}")
    return target


def _oci(store: Store, images: Sequence[tuple[Image, str]], session: Path, form: LayerForm) -> Iterator[Member]:
    entries: list[dict[str, Any]] = []
    written: set[str] = set()
    made: dict[str, tuple[Descriptor, Path]] = {}
    yield "oci-layout", dump_json({"imageLayoutVersion": "1.0.0"})
    for image, name in images:
        manifest = store.manifest(image)
        blobs: list[tuple[Descriptor, Path]] = []
        for layer, wanted in zip(image.layers, manifest.layers, strict=True):
            if form == "as-is":
                blobs.append((wanted, store.blob(wanted.digest)))
                continue
            if layer.digest not in made:
                made[layer.digest] = _as(form, wanted, store.blob(layer.digest), session, layer.diff_id)
            blobs.append(made[layer.digest])
        data, media_type = manifest.data, manifest.media_type
        if form != "as-is":
            config = Descriptor(OCI_CONFIG, manifest.config.digest, manifest.config.size)
            data, media_type = make_manifest(config, [found for found, _ in blobs]), OCI_MANIFEST
        files: list[tuple[str, bytes | Path]] = [(found.digest, path) for found, path in blobs]
        files += [(image.id, store.blob(image.id)), (digest_of(data), data)]
        for digest, content in files:
            if digest not in written:
                written.add(digest)
                yield f"blobs/sha256/{digest.removeprefix('sha256:')}", content
        entry: dict[str, Any] = {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}
        if name:
            entry["annotations"] = {REFERENCE: parse(name).full}
        entries.append(entry)
    yield "index.json", dump_json({"schemaVersion": 2, "manifests": entries})


def _as(form: LayerForm, wanted: Descriptor, blob: Path, session: Path, diff_id: str) -> tuple[Descriptor, Path]:
    """A layer compressed as asked for: the blob itself where it is, or a new file."""
    kind = _KINDS[form]
    with open(blob, "rb") as file:
        if compression_of(file.read(4)) == kind and not wanted.media_type.startswith("application/vnd.docker."):
            return wanted, blob
    target = session / f"{form}-{blob.name}"
    found, described = recompress(blob, target, kind)
    if found != diff_id:
        raise ImageError(f"a blob of the store is damaged: {blob.name}")
    return described, target


def compressed(wanted: Descriptor, blob: Path, session: Path, diff_id: str) -> tuple[Descriptor, Path]:
    """A layer as registries want it: as it is where it is compressed, else by gzip, in a new file."""
    with open(blob, "rb") as file:
        if compression_of(file.read(4)):
            return wanted, blob
    return _as("gzip", wanted, blob, session, diff_id)

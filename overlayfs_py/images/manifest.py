"""Manifests and configurations: the two documents that make blobs an image.

Source: the OCI image specification (manifest.md, config.md, image-index.md) and Docker's schema 2, which has the same
members under other media types.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from overlayfs_py.images.model import ImageError, is_digest

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS: Final = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES: Final = (OCI_INDEX, DOCKER_INDEX)
REFERENCE: Final = "org.opencontainers.image.ref.name"

_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_MOST_LAYERS: Final = 500


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What refers to a blob; `size` in bytes."""

    media_type: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest, with the bytes it was parsed from; `layers` bottom first."""

    data: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


def load_json(data: bytes, what: str) -> Any:
    """Parse JSON that came from elsewhere; ImageError names `what` it should have been."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is no JSON: {error}") from error


def dump_json(value: object) -> bytes:
    """JSON that is the same for equal content."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def descriptor(value: object, what: str) -> Descriptor:
    """Check one descriptor of a document."""
    if isinstance(value, Mapping):
        digest, size = value.get("digest"), value.get("size")
        if is_digest(digest) and isinstance(size, int) and size >= 0:
            return Descriptor(str(value.get("mediaType", "")), str(digest), size)
    raise ImageError(f"{what} has a descriptor without a sha256 digest and a size")


def parse_manifest(data: bytes, media_type: str = "") -> Manifest:
    """Check a manifest; `media_type` is what it was found as, where that is known."""
    value = load_json(data, "the manifest")
    if not isinstance(value, Mapping) or value.get("schemaVersion") != 2 or not isinstance(value.get("layers"), list):
        raise ImageError("the manifest is none of an image (OCI, or Docker's schema 2)")
    media_type = str(value.get("mediaType") or media_type or OCI_MANIFEST)
    if media_type not in MANIFESTS:
        raise ImageError(f"a manifest of type {media_type} is none of an image")
    layers = tuple(descriptor(layer, "the manifest") for layer in value["layers"])
    if len(layers) > _MOST_LAYERS:
        raise ImageError(f"the image has {len(layers)} layers; an overlay can have {_MOST_LAYERS}")
    return Manifest(data, media_type, descriptor(value.get("config"), "the manifest"), layers)


def parse_config(data: bytes) -> tuple[dict[str, Any], list[str]]:
    """Check an image configuration; it and its diff IDs, bottom first."""
    value = load_json(data, "the image's configuration")
    if not isinstance(value, dict):
        raise ImageError("the image's configuration is no object")
    rootfs = value.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, Mapping) else None
    if diff_ids is None and isinstance(rootfs, Mapping):
        diff_ids = []
    if not isinstance(diff_ids, list) or not all(is_digest(diff_id) for diff_id in diff_ids):
        raise ImageError("the image's configuration has no list of diff IDs")
    inner = value.get("config")
    if inner is not None and not isinstance(inner, dict):
        raise ImageError("the image's configuration has settings that are no object")
    return value, diff_ids


def make_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """An OCI manifest."""
    return dump_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": as_json(config),
            "layers": [as_json(layer) for layer in layers],
        }
    )


def as_json(value: Descriptor) -> dict[str, object]:
    return {"mediaType": value.media_type, "digest": value.digest, "size": value.size}


def this_platform() -> str:
    """The machine's platform as images name it, like linux/amd64."""
    machine = platform.machine()
    return f"linux/{_MACHINES.get(machine, machine)}"


def check_platform(config: bytes, wanted: str | None) -> None:
    """Raises ImageError where an image's configuration says another platform than the one that was asked for.

    Many say no variant, where the index that they are of does.
    """
    value, _ = parse_config(config)
    said = "/".join(str(value[key]) for key in ("os", "architecture") if value.get(key))
    if wanted is not None and wanted.split("/")[:2] != said.split("/"):
        raise ImageError(f"the image is for {said or 'no platform that it names'}, not for {wanted}")


def choose_platform(manifests: Sequence[object], wanted: str) -> Descriptor:
    """The descriptor in an index for the platform `wanted` (os/architecture[/variant])."""
    offered = []
    for value in manifests:
        found = descriptor(value, "the index")
        assert isinstance(value, Mapping)
        about = value.get("platform")
        if not isinstance(about, Mapping):
            if len(manifests) == 1:
                return found
            continue
        name = "/".join(str(about[key]) for key in ("os", "architecture", "variant") if about.get(key))
        if name == wanted or name.startswith(f"{wanted}/"):
            return found
        offered.append(name)
    there = ", ".join(name for name in offered if not name.startswith("unknown"))
    raise ImageError(f"there is no image for {wanted}; there are: {there or 'none'}")

"""Images made by hand for tests, unpacked by umoci and by us, and mounted by the kernel."""

import hashlib
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlayfs_py.images import Image, Store
from overlayfs_py.images.load import load
from tests.support.mounts import kernel_mount
from tests.support.trees import Tree, read_tree

EPOCH = 1_600_000_000


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of an archive; `kind` is tarfile's type, `pax` its extended headers."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = EPOCH
    target: str = ""
    device: tuple[int, int] = (0, 0)
    pax: tuple[tuple[str, str], ...] = ()


def folder(name: str, mode: int = 0o755, **more: Any) -> Item:
    return Item(name, kind=tarfile.DIRTYPE, mode=mode, **more)


def link(name: str, target: str) -> Item:
    return Item(name, kind=tarfile.LNKTYPE, target=target)


def symlink(name: str, target: str) -> Item:
    return Item(name, kind=tarfile.SYMTYPE, target=target, mode=0o777)


def archive(items: Sequence[Item], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A layer's archive, uncompressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for item in items:
            info = tarfile.TarInfo(item.name)
            info.type, info.mode, info.uid, info.gid = item.kind, item.mode, item.uid, item.gid
            info.mtime, info.linkname, info.size = item.mtime, item.target, len(item.data)
            info.devmajor, info.devminor = item.device
            info.pax_headers = dict(item.pax)
            tar.addfile(info, io.BytesIO(item.data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def write_layout(
    target: Path,
    layers: Sequence[bytes],
    *,
    name: str = "latest",
    diff_ids: Sequence[str] = (),
    machine: str = "amd64",
    **config: Any,
) -> None:
    """An OCI layout of one image; `layers` are archives, bottom first, uncompressed unless `diff_ids` are given."""
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        (blobs / digest(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": digest(data), "size": len(data)}

    described = [put(layer, layer_type(layer)) for layer in layers]
    settings = {
        "architecture": machine,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids) or [digest(layer) for layer in layers]},
    }
    settings_blob = put(json.dumps(settings).encode(), "config.v1+json")
    manifest = {"schemaVersion": 2, "config": settings_blob, "layers": described}
    top = put(json.dumps(manifest).encode(), "manifest.v1+json")
    top["annotations"] = {"org.opencontainers.image.ref.name": name}
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def layer_type(data: bytes) -> str:
    if data.startswith(b"\x1f\x8b"):
        return "layer.v1.tar+gzip"
    return "layer.v1.tar+zstd" if data.startswith(b"\x28\xb5\x2f\xfd") else "layer.v1.tar"


def load_one(store: Store, source: Path) -> Image:
    ((image, warnings),) = load(store, source)
    assert warnings == []
    return image


def umoci_tree(layout: Path, bundle: Path, name: str = "latest") -> Tree:
    """What umoci unpacks from a layout."""
    command = ["umoci", "unpack", "--image", f"{layout}:{name}", str(bundle)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return read_tree(bytes(bundle / "rootfs"), since())


@contextmanager
def mounted(image: Image, where: Path) -> Iterator[Path]:
    """The image's layers, mounted read-only by the kernel's overlayfs."""
    where.mkdir(exist_ok=True)
    empty = where.with_name(f"{where.name}-empty")
    empty.mkdir(exist_ok=True)
    # The kernel wants two lower layers where there is no upper one.
    with kernel_mount(where, [*(layer.path for layer in reversed(image.layers)), empty], None, None):
        yield where


def our_tree(image: Image, where: Path) -> Tree:
    """What the kernel's overlayfs shows of the image's unpacked layers."""
    with mounted(image, where) as root:
        return read_tree(bytes(root), since())


def since() -> int:
    """A moment no time of a layer lies after, so that all are compared as they are."""
    return time.time_ns() + 10**15

"""An upper layer as the archive of an OCI layer: its marks as whiteouts, everything that is no whole file resolved.

Equal content gives equal bytes: names are sorted, times are those of the files, nothing else goes in. Source: the OCI
image specification, layer.md.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final, cast

from overlayfs_py.core import attrs, lookup, objects
from overlayfs_py.core.marks import DOT_OPAQUE, DOT_WHITEOUT
from overlayfs_py.core.nodes import Node
from overlayfs_py.images.archive import Attributes, shown
from overlayfs_py.images.compress import Output
from overlayfs_py.images.model import ImageError
from overlayfs_py.images.walk import Visit, Walk
from overlayfs_py.sys.paths import fd_path

_NANOSECONDS: Final = 1_000_000_000
_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
_SKIPPED_XATTRS: Final = frozenset((b"security.selinux",))


def pack(upper: Path, lowers: Sequence[Path], output: Output, *, userxattr: bool) -> None:
    """Write what `upper` holds, on `lowers` (topmost first), as an archive.

    Sockets are left out, as no archive can hold one. Raises ImageError.
    """
    path = b""
    try:
        with (
            Walk(upper, lowers, userxattr=userxattr) as walk,
            tarfile.open(
                fileobj=cast(IO[bytes], output),
                mode="w|",
                format=tarfile.PAX_FORMAT,
                encoding="utf-8",
                errors="surrogateescape",
            ) as tar,
        ):
            packer = _Packer(walk, tar)
            for visit in walk.visits():
                path = visit.path
                packer.add(visit)
            packer.add_far_links()
    except OSError as error:
        raise ImageError(f"cannot make a layer of {upper}, at {shown(path) or 'its root'}: {error.strerror}") from error


class _Packer:
    __slots__ = ("far", "links", "tar", "walk")

    def __init__(self, walk: Walk, tar: tarfile.TarFile) -> None:
        self.walk = walk
        self.tar = tar
        # The first name of each file that may have more.
        self.links: dict[tuple[int, int], bytes] = {}
        # The same for files that were copied up into the index of the mount: by the number of what they were copied of.
        self.far: dict[int, tuple[bytes, tarfile.TarInfo]] = {}

    def add(self, visit: Visit) -> None:
        node = visit.node
        if node is None or node.kind not in _TYPES:
            # What is below is hidden, be it by a socket.
            if visit.below is not None and not visit.fresh:
                self._mark(os.path.dirname(visit.path), DOT_WHITEOUT + os.path.basename(visit.path))
            return
        attributes = self.walk.merged.attributes(node)
        if not visit.path and visit.below is not None and self._same(attributes, visit.below):
            return
        name = os.path.basename(visit.path)
        if name.startswith(DOT_WHITEOUT):
            raise ImageError(f"{shown(visit.path)} can't be in a layer: there its name is that of a whiteout")
        self._object(visit, node, attributes)

    def _same(self, attributes: Attributes, below: Node) -> bool:
        assert self.walk.below is not None
        other = self.walk.below.attributes(below)
        other.atime_ns = attributes.atime_ns
        return other == attributes

    def _mark(self, parent: bytes, name: bytes) -> None:
        self.tar.addfile(tarfile.TarInfo(_text(parent + b"/" + name if parent else name)))

    def _object(self, visit: Visit, node: Node, attributes: Attributes) -> None:
        headers: dict[str, str] = {}
        info = tarfile.TarInfo(_text(visit.path) or "./")
        info.pax_headers = headers
        info.type = _TYPES[node.kind]
        info.mode, info.uid, info.gid = attributes.mode, attributes.uid, attributes.gid
        info.mtime, fraction = divmod(attributes.mtime_ns, _NANOSECONDS)
        if fraction:
            headers["mtime"] = _seconds(attributes.mtime_ns)
        for key, value in attributes.xattrs:
            if key not in _SKIPPED_XATTRS:
                headers[f"SCHILY.xattr.{_text(key)}"] = _text(value)
        fs = self.walk.merged.fs
        if node.kind == stat.S_IFDIR:
            self.tar.addfile(info)
            if visit.replaced and not visit.fresh and visit.below is not None and visit.below.kind == stat.S_IFDIR:
                self._mark(visit.path, DOT_OPAQUE)
            return
        if self._is_link(visit.path, node, info):
            return
        if node.kind == stat.S_IFLNK:
            info.linkname = _text(attrs.readlink(fs, node))
        elif node.kind in (stat.S_IFCHR, stat.S_IFBLK):
            rdev = attrs.getattr(fs, node).rdev
            info.devmajor, info.devminor = os.major(rdev), os.minor(rdev)
        elif node.kind == stat.S_IFREG:
            # Opened anew, so that its position is ours alone.
            with open(os.open(fd_path(fs.files.fd(node, write=False)), os.O_RDONLY | os.O_CLOEXEC), "rb") as data:
                info.size = os.fstat(data.fileno()).st_size
                self.tar.addfile(info, data)
            return
        self.tar.addfile(info)

    def _is_link(self, path: bytes, node: Node, info: tarfile.TarInfo) -> bool:
        """Whether another name of the same file is in the archive already; then it is linked to."""
        fs = self.walk.merged.fs
        real = node.lowers[0]
        assert real.parent is not None
        dir_fd = fs.dirs.fd(real.parent)
        st = objects.stat_real(fs, real)
        if st.st_nlink < 2:
            return False
        first = self.links.setdefault((st.st_dev, st.st_ino), path)
        if first == path:
            own = fs.marks.read_file(dir_fd, real.name)
            if own.nlink is not None:
                self.far[lookup.origin_number(fs, own.origin)] = path, info
            return False
        self._link(info.name, info, first)
        return True

    def add_far_links(self) -> None:
        """Link the names that only the lower layers have to the files that the index had shown there.

        Nothing but the whole tree tells where these are; it is read where there was such a file.
        """
        self.far.pop(0, None)
        if not self.far:
            return
        stack = self.walk.merged
        pending = [(b"", stack.root)]
        while pending:
            path, node = pending.pop()
            for name in reversed(stack.names(node)):
                child = stack.child(node, name)
                below = path + b"/" + name if path else name
                if child is None:
                    continue
                if child.kind == stat.S_IFDIR:
                    pending.append((below, child))
                elif child.lowers[0].layer.index > 1:
                    st = objects.stat_real(stack.fs, child.lowers[0])
                    first = self.far.get(stack.fs.numbers.number(st.st_dev, st.st_ino))
                    if first is not None:
                        self._link(_text(below), first[1], first[0])

    def _link(self, name: str, info: tarfile.TarInfo, first: bytes) -> None:
        link = tarfile.TarInfo(name)
        link.type = tarfile.LNKTYPE
        link.linkname = _text(first)
        # Docker and podman give the file what the entry of its last name says.
        link.mode, link.uid, link.gid, link.mtime = info.mode, info.uid, info.gid, info.mtime
        link.pax_headers = {key: value for key, value in info.pax_headers.items() if key == "mtime"}
        self.tar.addfile(link)


def _text(data: bytes) -> str:
    """Bytes as tarfile wants them, to be encoded again as they were."""
    return data.decode("utf-8", "surrogateescape")


def _seconds(nanoseconds: int) -> str:
    """A time in decimal seconds, exact and without zeros at the end."""
    sign = "-" if nanoseconds < 0 else ""
    seconds, fraction = divmod(abs(nanoseconds), _NANOSECONDS)
    return f"{sign}{seconds}.{fraction:09d}".rstrip("0")

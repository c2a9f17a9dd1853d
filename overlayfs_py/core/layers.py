"""The layers of a mount: opening them, telling their filesystems apart, numbering their inodes."""

from __future__ import annotations

import errno
import os
import struct

from overlayfs_py.core.ids import layer_override_key
from overlayfs_py.core.marks import Marks
from overlayfs_py.core.nodes import Real
from overlayfs_py.errors import LayerError
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import handles, mounts, paths, xattrs

if TYPE_CHECKING:
    from collections.abc import Callable

    Decoder = Callable[[bytes], int]

_NULL_UUID = bytes(16)


class Layer:
    """One directory of the stack, held open by its root; `index` 0 is the upper layer, 1 the topmost lower.

    A layer on a filesystem without a UUID has the null UUID, as the kernel's overlayfs writes it.
    """

    __slots__ = ("data_only", "dev", "fd", "index", "inode_of", "override", "path", "root", "uuid", "xattr_whiteouts")

    def __init__(self, path: bytes, fd: int, index: int, *, data_only: bool = False) -> None:
        """Take over `fd`, the root of the layer at `path`; raises LayerError where it can't be read."""
        self.fd = fd
        try:
            st = os.fstat(self.fd)
            self.path = path
            self.index = index
            self.data_only = data_only
            self.dev = st.st_dev
            self.root = Real(self, None, b"")
            self.uuid = handles.filesystem_uuid(self.fd) or _NULL_UUID
            self.inode_of = _handle_decoder(self.fd, st.st_ino)
            self.xattr_whiteouts = False
            self.override: bytes | None = None
        except OSError as error:
            os.close(self.fd)
            raise LayerError(f"cannot read the layer {os.fsdecode(path)}: {error.strerror}") from error

    def read_marks(self, marks: Marks) -> None:
        """Learn from the root's xattrs whether the layer may hold xattr whiteouts, and where it keeps its owners."""
        try:
            keys = xattrs.flist(self.fd)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # a filesystem without xattrs: neither
            return
        self.xattr_whiteouts = marks.read_dir(self.fd).xattr_whiteouts
        self.override = layer_override_key(keys)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_root(path: bytes) -> int:
    """Open a directory the user named, links and all; from here on nothing resolves through one. LayerError if there is
    none."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise LayerError(f"cannot open the layer {os.fsdecode(path)}: {error.strerror}") from error


def open_lower(path: bytes, *, mount_flags: int) -> int:
    """The root of a lower layer, on a read-only mount of its own where that can be had."""
    fd = open_root(path)
    clone = _clone(fd, read_only=True, mount_flags=mount_flags)
    if clone < 0:
        return fd
    os.close(fd)
    return clone


def open_upper(upper: bytes, work: bytes, *, mount_flags: int) -> tuple[int, int]:
    """The roots of the upper layer and its work directory.

    Objects are renamed from one to the other, so they have to be on one mount: LayerError if they are not. It is a
    private copy where that can be had, of the directory both are in.
    """
    upper, work = os.path.realpath(upper), os.path.realpath(work)
    common = os.path.commonpath((upper, work))
    upper_fd, work_fd, common_fd = open_root(upper), open_root(work), open_root(common)
    clone = -1
    try:
        if mounts.mount_id(upper_fd) != mounts.mount_id(work_fd):
            raise LayerError("upperdir and workdir must be on the same mount")
        if mounts.mount_id(common_fd) == mounts.mount_id(upper_fd):
            clone = _clone(common_fd, read_only=False, mount_flags=mount_flags)
        if clone < 0:
            result = upper_fd, work_fd
            upper_fd = work_fd = -1
            return result
        flags = os.O_PATH | os.O_DIRECTORY
        below_upper = paths.open_beneath(clone, os.path.relpath(upper, common), flags)
        try:
            return below_upper, paths.open_beneath(clone, os.path.relpath(work, common), flags)
        except OSError:
            os.close(below_upper)
            raise
    finally:
        for fd in (upper_fd, work_fd, common_fd, clone):
            if fd >= 0:
                os.close(fd)


def _clone(fd: int, *, read_only: bool, mount_flags: int) -> int:
    """A private copy of the mount at `fd`, or -1 where this process may not have one."""
    try:
        return mounts.clone_mount(fd, read_only=read_only, flags=mount_flags)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            raise
        # not privileged, or an older kernel: the layer is used where it is, and looking at it may set its access times
        return -1


def leave_out_fuse(layers: list[Layer], uuid: bytes) -> None:
    """Have the files of FUSE layers with this UUID told by no handle, for the sake of other layers that share it.

    FUSE filesystems have no UUID, as squashfs has none, and how long their handles last is up to their daemons.
    """
    for layer in layers:
        if layer.uuid == uuid and layer.inode_of is _halves_swapped:
            layer.inode_of = None


def _handle_decoder(fd: int, inode: int) -> Decoder | None:
    """How to read the inode number out of a file handle of this filesystem, tried on the handle of `fd`.

    The layouts are those of fs/exportfs and of xfs, btrfs, tmpfs and FUSE; None where none of them fits.
    """
    try:
        _, handle = handles.file_handle(fd, b"")
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            raise
        # a filesystem that gives no handles has no origins either
        return None
    for decoder in (_ino64_first, _ino32_first, _halves_swapped, _ino32_second):
        try:
            if decoder(handle) == inode:
                return decoder
        except struct.error:
            continue
    return None


def _ino32_first(handle: bytes) -> int:
    return int(struct.unpack_from("=I", handle)[0])


def _ino64_first(handle: bytes) -> int:
    return int(struct.unpack_from("=Q", handle)[0])


def _halves_swapped(handle: bytes) -> int:
    """FUSE: the node id, its upper half first, then the generation."""
    high, low = struct.unpack_from("=II", handle)
    return int(high) << 32 | int(low)


def _ino32_second(handle: bytes) -> int:
    """tmpfs: the generation comes first."""
    low, high = struct.unpack_from("=II", handle, 4)
    return int(high) << 32 | int(low)


class Numbers:
    """Inode numbers that are one number space for all filesystems of the stack, and the same in every mount of it.

    A number is the real inode number with the filesystem's place in the stack in its uppermost bits, as with the
    kernel's xino; where the real number needs those bits, both are mixed. With `bits` 32 they are always folded.
    """

    __slots__ = ("bits", "filesystems", "last_base", "last_dev", "low", "shift")

    def __init__(self, layers: list[Layer], *, bits: int) -> None:
        self.filesystems: dict[int, int] = {}
        for layer in layers:
            self.filesystems.setdefault(layer.dev, len(self.filesystems))
        self.bits = bits
        # One bit more than these need, as a layer may hold further filesystems.
        shift = bits - (len(self.filesystems) * 2 - 1).bit_length() if len(self.filesystems) > 1 else bits - 1
        self.shift = shift
        # The bits of a number that are the inode's.
        self.low = (1 << shift) - 1
        # The filesystem asked for last, and its place where that stands in numbers; nobody has the device 0.
        self.last_dev = 0
        self.last_base = 0

    def number(self, dev: int, inode: int) -> int:
        if dev == self.last_dev and inode >> self.shift == 0:
            return self.last_base | inode
        place = self.filesystems.setdefault(dev, len(self.filesystems))
        if place >> (self.bits - self.shift):
            return self._mix(place, inode)
        self.last_dev, self.last_base = dev, place << self.shift
        if inode >> self.shift:
            return self._mix(place, inode)
        return self.last_base | inode

    def split(self, number: int) -> tuple[int, int] | None:
        """The device and the inode number that a number stands for, unless it is a mixed one; None for no device."""
        place = number >> self.shift
        for dev, known in self.filesystems.items():
            if known == place:
                return dev, number & self.low
        return None

    def _mix(self, place: int, inode: int) -> int:
        mixed = (inode ^ place << 56) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        return mixed >> (64 - self.bits)


class DirCache:
    """Descriptors of directories in layers, at most `limit` of them, least recently used ones closed first.

    They are O_PATH and stay good while their directory moves. The descriptor returned may be closed by the next call
    for another directory but one: use two at most, at once.
    """

    __slots__ = ("fds", "holders", "last", "last_fd", "late", "limit")

    def __init__(self, limit: int) -> None:
        # The least recently used ones come first.
        self.fds: dict[Real, int] = {}
        self.limit = max(limit, 4)
        # The last of them once more: who works in a directory asks for it again and again.
        self.last: Real | None = None
        self.last_fd = -1
        # Those who use a descriptor while others go on, and what is to be closed when they are done.
        self.holders = 0
        self.late: list[int] = []

    def fd(self, real: Real) -> int:
        """A descriptor of the directory `real`; raises OSError where it is gone or no directory any more."""
        if real is self.last:
            return self.last_fd
        if real.parent is None:
            return real.layer.fd
        fd = self.fds.pop(real, -1)
        if fd < 0:
            fd = self._open(real)
        self.fds[real] = fd
        self.last, self.last_fd = real, fd
        if len(self.fds) > self.limit:
            oldest = next(iter(self.fds))
            self._close(self.fds.pop(oldest))
        return fd

    def _open(self, real: Real) -> int:
        names = [real.name]
        ancestor = real.parent
        assert ancestor is not None
        start = -1
        while ancestor.parent is not None:
            start = self.fds.get(ancestor, -1)
            if start >= 0:
                break
            names.append(ancestor.name)
            ancestor = ancestor.parent
        if start < 0:
            start = ancestor.layer.fd
        if len(names) == 1:
            return paths.open_dir_at(start, names[0])
        names.reverse()
        return paths.open_beneath(start, b"/".join(names), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)

    def hold(self) -> None:
        """Until let_go, close no descriptor: whoever got one uses it while others ask for more."""
        self.holders += 1

    def let_go(self) -> None:
        self.holders -= 1
        while self.late and not self.holders:
            os.close(self.late.pop())

    def _close(self, fd: int) -> None:
        if self.holders:
            self.late.append(fd)
        else:
            os.close(fd)

    def drop(self, real: Real) -> None:
        """Close the descriptor of a directory that is about to go."""
        if real is self.last:
            self.last = None
        fd = self.fds.pop(real, -1)
        if fd >= 0:
            self._close(fd)

    def close(self) -> None:
        self.last = None
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

"""A mount as an object: its stack, its nodes, its descriptors."""

from __future__ import annotations

import errno
import os
import resource
import stat

from overlayfs_py.config import MountConfig
from overlayfs_py.core import ids, index, nameless
from overlayfs_py.core.drafts import MOST_OPEN, Drafts
from overlayfs_py.core.export import Reopened
from overlayfs_py.core.files import FileCache
from overlayfs_py.core.ids import IdMap
from overlayfs_py.core.layers import DirCache, Layer, Numbers, leave_out_fuse, open_lower, open_upper
from overlayfs_py.core.marks import Marks
from overlayfs_py.core.merged import MergedNames
from overlayfs_py.core.nodes import ROOT_ID, Node, NodeTable, Real
from overlayfs_py.core.requests import Job
from overlayfs_py.core.work import Work, read_index
from overlayfs_py.errors import LayerError
from overlayfs_py.journal import Journal
from overlayfs_py.records import TYPE_CHECKING
from overlayfs_py.sys import credentials, descriptors, paths, xattrs

if TYPE_CHECKING:
    from collections.abc import Callable

log = Journal(__name__)

_LEAST_SHARE = 16
_REOPENED = 4096


class Overlay:
    """The merged tree of one stack of layers. Synchronous, without locks: one caller at a time.

    `upper` and `work` are None in a mount without an upper layer, which changes nothing.
    """

    __slots__ = (
        "acts_as_others",
        "close_later",
        "config",
        "copying",
        "data_layers",
        "dirs",
        "drafts",
        "files",
        "flagless",
        "follow_redirects",
        "ids",
        "impure",
        "index",
        "layers",
        "lower_roots",
        "marks",
        "merged",
        "metacopy",
        "most_pins",
        "nameless",
        "nodes",
        "numbers",
        "origins",
        "pins",
        "reopened",
        "root",
        "sync",
        "unshared",
        "upper",
        "work",
        "write_redirects",
    )

    def __init__(self, config: MountConfig) -> None:
        """Open every layer and make the work directory ready.

        Raises LayerError, with one line that says what is wrong, before anything is changed but the work directory.
        """
        self.config = config
        self.acts_as_others = credentials.may_act_as_others()
        self.layers: list[Layer] = []
        self.work: Work | None = None
        self.index: Layer | None = None
        self.copying: dict[Node, Job] = {}
        # Directories of the upper layer that are known to be marked as holding copies; not all that are.
        self.impure: set[Real] = set()
        # Layers whose files the upper one could not share blocks with when that was tried.
        self.unshared: set[Layer] = set()
        # Layers whose filesystem says of files that they are immutable, and has no such flags.
        self.flagless: set[Layer] = set()
        self.dirs = DirCache(0)
        self.files = FileCache(self, 0)
        # Nodes kept by a descriptor, and where the others are that have no name.
        self.pins = self.most_pins = 0
        # An engine with threads has one of them close what may be the last of a removed file, which takes long.
        self.close_later: Callable[[int], None] = os.close
        self.share_descriptors()
        self.nameless: Layer | None = None
        self.merged = MergedNames(self)
        self.drafts = Drafts(self)
        self.reopened = Reopened(_REOPENED)
        try:
            self._open_layers()
            lowers = [layer for layer in self.layers if layer is not self.upper]
            for uuid in ambiguous_uuids(lowers):
                leave_out_fuse(lowers, uuid)
            self._choose_features()
        except OSError as error:
            self.close()
            where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, (bytes, str)) else ""
            raise LayerError(f"cannot make the layers ready: {error.strerror}{where}") from error
        except LayerError:
            self.close()
            raise
        self.ids = IdMap(
            config.uidmapping, config.gidmapping, squash_uid=config.squash_uid, squash_gid=config.squash_gid
        )
        self.numbers = Numbers(self.layers, bits=32 if config.ino32 else 64)
        # An origin names its filesystem by UUID, for which one layer on it speaks.
        lower_layers = [layer for layer in self.layers if layer is not self.upper]
        self.origins = {layer.uuid: layer for layer in lower_layers if layer.inode_of is not None}
        for uuid in ambiguous_uuids(lower_layers):
            del self.origins[uuid]
        self.nodes = NodeTable(bits=32 if config.ino32 else 64)
        upper_root = self.upper.root if self.upper else None
        self.root = Node(stat.S_IFDIR, None, b"", upper_root, self.lower_roots)
        self.root.id = ROOT_ID
        self.root.lookups = 1
        self.nodes.by_id[ROOT_ID] = self.root

    @classmethod
    def open(cls, config: MountConfig) -> Overlay:
        """Open the stack that `config` names; see __init__ for what it raises."""
        return cls(config)

    def share_descriptors(self, engine: int = 0) -> None:
        """Divide the descriptors there may be among what is kept, before that is used.

        `engine` is how many the engine has open for as long as it serves.
        """
        config = self.config
        most = min(descriptors.MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # An eighth is left for what requests use for themselves.
        others = engine + MOST_OPEN + len(config.lowerdirs) + len(config.datadirs)
        eighth = max(0, most - others) // 8
        self.dirs.limit = max(_LEAST_SHARE, 3 * eighth)
        self.files.limit = self.most_pins = max(_LEAST_SHARE, 2 * eighth)

    def _open_layers(self) -> None:
        config = self.config
        flags = config.mount_flags
        self.upper: Layer | None = None
        if config.upperdir is not None:
            assert config.workdir is not None
            if config.read_only:
                self.upper = Layer(config.upperdir, open_lower(config.upperdir, mount_flags=flags), 0)
                self.layers.append(self.upper)
            else:
                upper_fd, work_fd = open_upper(config.upperdir, config.workdir, mount_flags=flags)
                try:
                    self.upper = Layer(config.upperdir, upper_fd, 0)
                    self.layers.append(self.upper)
                    self.work = Work(config.workdir, work_fd)
                finally:
                    os.close(work_fd)
        lowers: list[Layer] = []
        for path in config.lowerdirs:
            lowers.append(Layer(path, open_lower(path, mount_flags=flags), len(lowers) + 1))
            self.layers.append(lowers[-1])
        self.data_layers: list[Layer] = []
        for path in config.datadirs:
            place = len(lowers) + len(self.data_layers) + 1
            self.data_layers.append(Layer(path, open_lower(path, mount_flags=flags), place, data_only=True))
            self.layers.append(self.data_layers[-1])
        self.lower_roots = tuple(layer.root for layer in lowers)

    def _choose_features(self) -> None:
        config = self.config
        user = config.userxattr or not (
            credentials.has_capability(credentials.CAP_SYS_ADMIN) and credentials.in_initial_user_namespace()
        )
        self.marks = Marks(user=user)
        if self.work is not None:
            self._open_work(self.work)
        if self.upper is not None and config.index is not False:
            self._open_index()
        redirects = config.redirect_dir or ("nofollow" if user else "on")
        self.follow_redirects = redirects != "nofollow"
        self.write_redirects = redirects == "on"
        if config.metacopy and user:
            raise LayerError("metacopy=on needs privilege: anyone may set the user.* xattrs that would be its marks")
        self.metacopy = bool(config.metacopy)
        self.sync = not config.volatile and config.fsync
        for layer in self.layers:
            layer.read_marks(self.marks)
        if self.upper is not None and self.work is not None and config.xattr_permissions:
            self._keep_owners_in_xattrs(self.upper, ids.override_key(config.xattr_permissions))
        if self.upper is not None and self.index is not None:
            # What is there belongs to the upper layer.
            self.index.override = self.upper.override

    @staticmethod
    def _keep_owners_in_xattrs(upper: Layer, key: bytes) -> None:
        """From now on the upper layer keeps owners and modes in xattrs, its root's own to begin with."""
        if upper.override is None:
            st = os.fstat(upper.fd)
            override = ids.Override(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode), stat.S_IFDIR)
            xattrs.fset(upper.fd, key, ids.format_override(override))
            upper.override = key

    def _open_work(self, work: Work) -> None:
        assert self.upper is not None
        if not work.exclusive:
            log.warning("another mount holds the work directory: it is not cleared, and changes may collide")
        work.probe(self.marks)

    def _open_index(self) -> None:
        """Hard links of lowers are kept through the index where every lower can tell its files by handle.

        A read-only mount reads the index that there is, since the names in the upper layer are links into it.
        """
        lowers = [real.layer for real in self.lower_roots]
        ambiguous = ambiguous_uuids(lowers)
        nameless = [layer for layer in lowers if layer.inode_of is None or layer.uuid in ambiguous]
        if nameless:
            where = os.fsdecode(nameless[0].path)
            log.warning("files of %s can't be told by handle: hard links break on copy-up", where)
            return
        if self.work is not None:
            self.index = self.work.open_index()
            if self.work.exclusive:
                index.clean(self)
            return
        assert self.config.workdir is not None
        self.index = read_index(self.config.workdir, mount_flags=self.config.mount_flags)

    def close(self) -> None:
        """Close every descriptor and release the work directory."""
        self.drafts.close()
        self.files.close()
        self.dirs.close()
        if hasattr(self, "nodes"):
            for node in self.nodes.by_id.values():
                nameless.let_go(self, node)
                nameless.let_go_of_name(self, node.upper)
        if self.nameless is not None:
            self.nameless.close()
            self.nameless = None
        if self.work is not None:
            self.work.close()
            self.work = None
        if self.index is not None:
            self.index.close()
            self.index = None
        for layer in self.layers:
            layer.close()
        self.layers = []

    def writable(self) -> Work:
        """The work directory, for an operation that changes something; EROFS in a mount without an upper layer."""
        if self.work is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self.work

    def node(self, node_id: int) -> Node:
        """The node the kernel names by this id; ESTALE where there is none, as the kernel was wrong or a handle old."""
        try:
            return self.nodes.by_id[node_id]
        except KeyError:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    def set_mark(self, node: Node, key: bytes, value: bytes) -> None:
        """Set one of our xattrs on a directory of the upper layer."""
        assert node.upper is not None
        xattrs.fset(self.dirs.fd(node.upper), key, value)

    def dir_fd(self, node: Node) -> int:
        """A descriptor of a directory's upper part, which must be there."""
        assert node.upper is not None
        if node.pinned >= 0:
            return node.pinned
        return self.dirs.fd(node.upper)

    def open_for_reading(self, node: Node) -> int:
        """A new O_RDONLY descriptor of a directory's topmost part."""
        if node.pinned >= 0:
            return paths.open_dir_read(node.pinned)
        return paths.open_dir_read(self.dirs.fd(node.upper or node.lowers[0]))


def ambiguous_uuids(layers: list[Layer]) -> set[bytes]:
    """The UUIDs that layers on different filesystems share, as those without one do."""
    devices: dict[bytes, set[int]] = {}
    for layer in layers:
        if layer.inode_of is not None:
            devices.setdefault(layer.uuid, set()).add(layer.dev)
    return {uuid for uuid, found in devices.items() if len(found) > 1}

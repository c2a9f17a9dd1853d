"""Mount options: parsed, checked, frozen.

`parse_options` is pure. `check_paths` is the only part that looks at the disk. The grammar is that of the kernel's
overlayfs (Documentation/filesystems/overlayfs.rst, fs/overlayfs/params.c), with the options of fuse-overlayfs and
mount(8) beside its own.
"""

from __future__ import annotations

import math
import os
import stat

from overlayfs_py.errors import ConfigError
from overlayfs_py.records import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Literal

    _Take = Callable[["_Draft", bytes], None]

MAX_LOWERDIRS = 500
"""Lower and data-only layers together; the kernel's OVL_MAX_STACK."""

# The flags of mount(2).
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25
_ATIME_FLAGS = MS_NOATIME | MS_RELATIME | MS_STRICTATIME

_MAX_ID = 2**32 - 2  # 2**32 - 1 is "no id" for chown(2)


class IdRange(NamedTuple):
    """`count` ids that are `disk`, `disk + 1`, ... in the layers and `shown`, `shown + 1`, ... in the mount."""

    disk: int
    shown: int
    count: int  # type: ignore[assignment]  # in place of the method of tuples


class MountConfig(NamedTuple):
    """Everything a mount needs to know. Paths are absolute."""

    lowerdirs: tuple[bytes, ...]
    """The topmost first."""
    mountpoint: bytes
    datadirs: tuple[bytes, ...] = ()
    """Data-only layers, reached only through the redirect of a metacopy file."""
    upperdir: bytes | None = None
    workdir: bytes | None = None
    fsname: str = "overlayfs-py"
    redirect_dir: Literal["on", "follow", "nofollow"] | None = None
    """None: the default for the privilege found at mount."""
    metacopy: bool | None = None
    index: bool | None = None  # type: ignore[assignment]  # as above
    xino: Literal["on", "off", "auto"] = "auto"
    userxattr: bool = False
    volatile: bool = False
    fsync: bool = True
    uidmapping: tuple[IdRange, ...] = ()
    gidmapping: tuple[IdRange, ...] = ()
    squash_uid: int | None = None
    squash_gid: int | None = None
    xattr_permissions: Literal[0, 1, 2] = 0
    static_nlink: bool = False
    noacl: bool = False
    noxattrs: bool = False
    timeout: float = math.inf
    """Seconds that the kernel may keep names and attributes."""
    writeback: bool = False
    context: str | None = None
    ino32: bool = False
    read_only: bool = False
    mount_flags: int = 0
    """MS_* of mount(2)."""
    allow_other: bool = False
    allow_root: bool = False
    default_permissions: bool = False
    max_write: int | None = None
    """Bytes."""
    request_timeout: int = 0
    """Seconds after which the kernel gives up a connection that leaves a request unanswered; 0: never."""
    engine: Literal["auto", "native", "portable"] = "auto"
    """What carries the requests; auto: the native engine where it can be had."""
    uring: Literal["auto", "on", "off"] = "auto"
    """FUSE over io_uring in the native engine; on: turn the kernel's switch on, too, and mount only with it."""
    io: Literal["cached", "passthrough"] = "cached"
    """What serves file data; passthrough: the kernel, from the layers' own files, where their data stays what it is."""
    cpu_latency: Literal["auto", "on", "off"] = "auto"
    """Whether processors are kept from halting while requests follow one another; the native engine."""
    readdirplus: Literal["on", "auto"] = "on"
    """Whether listings carry attributes always, or where the kernel expects them to be asked for; the native engine."""
    max_nodes: int = 0
    """Objects that the daemon keeps in memory, beyond which the kernel is asked to forget some; 0: no bound."""
    security_label: bool = False
    """Whether the kernel's security module labels what is made; else the upper layer's filesystem does."""
    nfs_export: bool | None = None
    """Whether file handles can be opened whatever the kernel has forgotten; None: where the engine can."""
    unknown: tuple[str, ...] = ()
    """Options to warn about, as they were written."""


class _Draft:
    """A MountConfig in the making: its fields as far as options have set them, and the layers gathered so far."""

    __slots__ = ("cwd", "datadirs", "fields", "flags", "lowerdirs", "squash_root", "unknown")

    def __init__(self, cwd: bytes, *, privileged: bool) -> None:
        self.cwd = cwd
        self.lowerdirs: list[bytes] = []
        self.datadirs: list[bytes] = []
        self.flags = MS_NOATIME if privileged else MS_NOATIME | MS_NOSUID | MS_NODEV
        self.squash_root = False
        self.unknown: list[str] = []
        self.fields: dict[str, Any] = {"default_permissions": True}

    def absolute(self, name: str, path: bytes) -> bytes:
        """The path that option `name` gives, its escapes removed, absolute from the caller's current directory."""
        path = _unescape(path)
        if not path or b"\0" in path:
            raise ConfigError(f"option {name} needs the path of a directory")
        return os.path.join(self.cwd, path)


class Option(NamedTuple):
    """One mount option: how its value is written, what it does, and what takes it.

    `bare` is the value meant when none is written; None if one must be written. An option with an empty `value` takes
    none.
    """

    value: str
    help: str
    take: _Take
    bare: bytes | None = None


def parse_options(
    options: Iterable[bytes], *, mountpoint: bytes, source: bytes | None = None, cwd: bytes, euid: int
) -> MountConfig:
    """Turn the arguments of `-o`, in their order, into a MountConfig.

    Relative paths start at `cwd`. `euid` chooses the defaults: root gets allow_other and keeps dev and suid. Nothing is
    looked up on disk. Raises ConfigError for a bad value or options that exclude each other.
    """
    draft = _Draft(cwd, privileged=euid == 0)
    if source is not None:
        draft.fields["fsname"] = os.fsdecode(source)
    for text in options:
        for segment in split_options(text):
            _take(draft, segment)
    return _freeze(draft, os.path.join(cwd, mountpoint), privileged=euid == 0)


def split_options(text: bytes) -> list[bytes]:
    """The segments between commas, empty ones left out.

    A comma does not count after a backslash, nor inside the quotes of a security context. Raises ConfigError for a
    quote that is never closed.
    """
    segments = []
    start = position = 0
    while position < len(text):
        char = text[position : position + 1]
        if char == b"\\":
            position += 1
        elif char == b'"' and text[start:position] in _QUOTED:
            position = text.find(b'"', position + 1)
            if position < 0:
                raise ConfigError(f"option {_show(text[start:])} has no closing quote")
        elif char == b",":
            segments.append(text[start:position])
            start = position + 1
        position += 1
    segments.append(text[start:])
    return [segment for segment in segments if segment]


def _take(draft: _Draft, segment: bytes) -> None:
    raw_name, equals, value = segment.partition(b"=")
    name = os.fsdecode(raw_name)
    option = OPTIONS.get(name)
    if option is None:
        if name not in IGNORED and not name.startswith(("x-", "X-")):
            draft.unknown.append(os.fsdecode(segment))
        return
    if not equals:
        if option.value and option.bare is None:
            raise ConfigError(f"option {name} needs a value: {name}{option.value}")
        value = option.bare or b""
    elif not option.value:
        raise ConfigError(f"option {name} takes no value; got {_show(segment)}")
    option.take(draft, value)


def _freeze(draft: _Draft, mountpoint: bytes, *, privileged: bool) -> MountConfig:
    fields = draft.fields
    if privileged and not fields.get("allow_root"):
        fields["allow_other"] = True
    elif fields.get("allow_root") and fields.get("allow_other"):
        raise ConfigError("allow_other and allow_root exclude each other; drop one")
    if fields.get("allow_root"):
        # What the kernel has cached for one user it gives to all.
        fields["timeout"] = 0.0
    if draft.squash_root:
        fields.setdefault("squash_uid", 0)
        fields.setdefault("squash_gid", 0)
    _check_layer_options(draft)
    _check_conflicts(fields)
    if draft.flags & MS_RDONLY:
        fields["read_only"] = True
    return MountConfig(
        lowerdirs=tuple(draft.lowerdirs),
        datadirs=tuple(draft.datadirs),
        mountpoint=mountpoint,
        mount_flags=draft.flags,
        unknown=tuple(draft.unknown),
        **fields,
    )


def _check_layer_options(draft: _Draft) -> None:
    fields = draft.fields
    if not draft.lowerdirs:
        raise ConfigError("no lower layer; give lowerdir=DIR[:DIR...], the topmost first")
    if len(draft.lowerdirs) + len(draft.datadirs) > MAX_LOWERDIRS:
        count = len(draft.lowerdirs) + len(draft.datadirs)
        raise ConfigError(f"{count} lower layers are too many; the limit is {MAX_LOWERDIRS}")
    if "upperdir" not in fields:
        # As in the kernel: of no use without an upper, and no error.
        for name in ("workdir", "index", "volatile"):
            fields.pop(name, None)
        draft.flags |= MS_RDONLY
    elif "workdir" not in fields:
        raise ConfigError("upperdir needs a workdir; give workdir=DIR, an empty directory on its filesystem")


def _check_conflicts(fields: dict[str, Any]) -> None:
    """Beside our own, the rules of ovl_fs_params_verify, less one: redirect_dir=on with userxattr is allowed here.

    metacopy=on with userxattr is not, as in the kernel: whoever owns a file in a lower layer may write its user.*
    xattrs, and a made-up metacopy mark would show him the data of a file that he may not read.
    """
    if fields.get("engine") == "portable" and fields.get("uring") == "on":
        raise ConfigError("uring=on takes the native engine; drop it or engine=portable")
    if fields.get("engine") == "portable" and fields.get("nfs_export"):
        raise ConfigError("nfs_export=on takes the native engine; drop it or engine=portable")
    if fields.get("security_label") and fields.get("noxattrs"):
        raise ConfigError("security_label and noxattrs exclude each other, as labels are xattrs; drop one")
    if fields.get("io") == "passthrough":
        if fields.get("writeback"):
            raise ConfigError("io=passthrough and writeback exclude each other in the kernel; drop one")
        if fields.get("engine") == "portable":
            raise ConfigError("io=passthrough takes the native engine; drop it or engine=portable")
    if not fields.get("metacopy"):
        return
    if fields.get("userxattr"):
        raise ConfigError("metacopy=on and userxattr exclude each other, since users can write user.* xattrs; drop one")
    redirect = fields.setdefault("redirect_dir", "on")
    if redirect == "on" or (redirect == "follow" and "upperdir" not in fields):
        return
    raise ConfigError("metacopy=on needs redirect_dir=on; change one of the two")


def check_paths(config: MountConfig) -> MountConfig:
    """Look at what the paths name, and return the config with every path resolved, free of symbolic links.

    Raises ConfigError for a path that is missing or no directory, an upper and work directory that are not on one
    filesystem or not separate, layers that overlap, or a mountpoint inside a layer. A mountpoint that is itself a layer
    is fine, as for the kernel, since the layer is opened before it is covered.
    """
    lowers = [_resolve("lowerdir", path) for path in config.lowerdirs]
    datas = [_resolve("datadir", path) for path in config.datadirs]
    mountpoint = _resolve("mountpoint", config.mountpoint)
    upper = None if config.upperdir is None else _resolve("upperdir", config.upperdir)
    work = None if config.workdir is None else _resolve("workdir", config.workdir)
    layers = [("lowerdir", path) for path in lowers] + [("datadir", path) for path in datas]
    if upper is not None and work is not None:
        if os.stat(upper).st_dev != os.stat(work).st_dev:
            raise ConfigError(
                f"workdir {_show(work)} and upperdir {_show(upper)} are on different filesystems; put them on one"
            )
        layers += [("upperdir", upper), ("workdir", work)]
    _check_overlap(layers)
    _check_mountpoint(mountpoint, layers)
    return config._replace(
        lowerdirs=tuple(lowers), datadirs=tuple(datas), upperdir=upper, workdir=work, mountpoint=mountpoint
    )


def _resolve(name: str, path: bytes) -> bytes:
    try:
        real = os.path.realpath(path, strict=True)
        mode = os.stat(real).st_mode
    except OSError as error:
        raise ConfigError(f"{name} {_show(path)}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{name} {_show(path)} is not a directory")
    return real


def _check_overlap(layers: list[tuple[str, bytes]]) -> None:
    """Compare by device and inode number, so that bind mounts of one directory are seen to be one."""
    seen: dict[tuple[int, int], tuple[str, bytes]] = {}
    for name, path in layers:
        other = seen.setdefault(_identity(path), (name, path))
        if other[1] is not path:
            raise ConfigError(f"{other[0]} {_show(other[1])} and {name} {_show(path)} are one directory; name it once")
    for name, path in layers:
        for parent in _parents(path):
            other_layer = seen.get(_identity(parent))
            if other_layer is not None:
                raise ConfigError(
                    f"{name} {_show(path)} is inside {other_layer[0]} {_show(other_layer[1])}; layers must not overlap"
                )


def _check_mountpoint(mountpoint: bytes, layers: list[tuple[str, bytes]]) -> None:
    by_identity = {_identity(path): (name, path) for name, path in layers}
    for parent in _parents(mountpoint):
        layer = by_identity.get(_identity(parent))
        if layer is not None:
            raise ConfigError(
                f"mountpoint {_show(mountpoint)} is inside {layer[0]} {_show(layer[1])}; choose one outside the layers"
            )


def _identity(path: bytes) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _parents(path: bytes) -> list[bytes]:
    """Every directory above an absolute path that is free of symbolic links, the nearest first."""
    parents = []
    while path != b"/":
        path = os.path.dirname(path)
        parents.append(path)
    return parents


def _show(text: bytes) -> str:
    """Bytes as they can stand inside one line of a message."""
    return "'" + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in os.fsdecode(text)) + "'"


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    # Each backslash goes, and what follows it stays, be it another one.
    first, *pieces = text.split(b"\\")
    plain = [first]
    while pieces:
        piece = pieces.pop(0)
        plain.append(piece if piece or not pieces else b"\\" + pieces.pop(0))
    return b"".join(plain)


def _split_layers(value: bytes) -> tuple[list[bytes], list[bytes]]:
    """The lower and the data-only layers of `A:B::D1::D2`, still escaped."""
    lowers: list[bytes] = []
    datas: list[bytes] = []
    pieces = _pieces(value)
    if pieces[:1] == [b":"] or pieces[-1:] == [b":"]:
        raise ConfigError("lowerdir begins or ends with a colon; write '\\:' for one in a name")
    colons = 0
    for piece in pieces:
        if piece == b":":
            colons += 1
        elif colons > 2:
            raise ConfigError("lowerdir has three colons in a row; layers are split by ':' or '::'")
        elif colons == 2:
            datas.append(piece)
            colons = 0
        elif datas:
            raise ConfigError(f"lowerdir {_show(piece)} follows a data-only layer; write '::' before each of those")
        else:
            lowers.append(piece)
            colons = 0
    return lowers, datas


def _pieces(value: bytes) -> list[bytes]:
    """The names between colons, still escaped, none of them empty, and each colon as a piece of its own."""
    pieces: list[bytes] = []
    name = b""
    for number, part in enumerate(value.split(b":")):
        if number:
            # An odd number of backslashes before a colon makes it part of the name.
            if (len(name) - len(name.rstrip(b"\\"))) % 2:
                name += b":" + part
                continue
            pieces += [name, b":"] if name else [b":"]
        name = part
    return [*pieces, name] if name else pieces


def _lowerdir(draft: _Draft, value: bytes) -> None:
    lowers, datas = _split_layers(value)
    # The kernel lets a second lowerdir= replace all the layers before it.
    draft.lowerdirs = [draft.absolute("lowerdir", path) for path in lowers]
    draft.datadirs = [draft.absolute("lowerdir", path) for path in datas]


def _lowerdir_add(draft: _Draft, value: bytes) -> None:
    if draft.datadirs:
        raise ConfigError(f"lowerdir+ {_show(value)} follows a data-only layer; name the data-only layers last")
    draft.lowerdirs.append(draft.absolute("lowerdir+", value))


def _datadir_add(draft: _Draft, value: bytes) -> None:
    draft.datadirs.append(draft.absolute("datadir+", value))


def _directory(field: str) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        draft.fields[field] = draft.absolute(field, value)

    return take


def _constant(field: str, constant: object) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        draft.fields[field] = constant

    return take


def _choice(name: str, field: str, choices: Mapping[bytes, object]) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        if value not in choices:
            known = ", ".join(choice.decode() for choice in choices)
            raise ConfigError(f"option {name} cannot be {_show(value)}; use one of {known}")
        draft.fields[field] = choices[value]

    return take


def _number(name: str, field: str, least: int, most: int) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        draft.fields[field] = _integer(name, value, least, most)

    return take


def _integer(name: str, value: bytes, least: int, most: int) -> int:
    if not value.isdigit() or not least <= int(value) <= most:
        raise ConfigError(f"option {name} needs a whole number from {least} to {most}, not {_show(value)}")
    return int(value)


def _flags(*, add: int = 0, drop: int = 0) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        draft.flags = draft.flags & ~drop | add

    return take


def _refuse(name: str, why: str, *allowed: bytes) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        if value not in allowed:
            raise ConfigError(f"{name}{'=' if value else ''}{os.fsdecode(value)} is not supported: {why}")

    return take


def _mapping(name: str) -> _Take:
    def take(draft: _Draft, value: bytes) -> None:
        # fuse-overlayfs skips empty numbers, and container engines write a leading colon.
        numbers = [_integer(name, number, 0, 2**32 - 1) for number in value.split(b":") if number]
        if len(numbers) % 3:
            raise ConfigError(f"option {name} needs triplets DISK:SHOWN:COUNT, not {_show(value)}")
        ranges = [IdRange(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
        for starts in ([(r.disk, r.count) for r in ranges], [(r.shown, r.count) for r in ranges]):
            end = 0
            for start, count in sorted(starts):
                if start < end:
                    raise ConfigError(f"option {name} maps id {start} twice; make its ranges separate")
                end = start + count
        draft.fields[name] = tuple(ranges)

    return take


def _squash_root(draft: _Draft, value: bytes) -> None:
    draft.squash_root = True


def _timeout(draft: _Draft, value: bytes) -> None:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ConfigError(f"option timeout needs seconds, 0 or more, not {_show(value)}")
    draft.fields["timeout"] = seconds


def _context(draft: _Draft, value: bytes) -> None:
    if value[:1] == b'"':
        value = value[1:-1]
    draft.fields["context"] = os.fsdecode(_unescape(value))


def _fsname(draft: _Draft, value: bytes) -> None:
    draft.fields["fsname"] = os.fsdecode(_unescape(value))


_ON_OFF = {b"on": True, b"off": False}
_ZERO_ONE = {b"1": True, b"0": False}
_REDIRECT = {b"on": "on", b"follow": "follow", b"nofollow": "nofollow", b"off": "follow"}

OPTIONS: dict[str, Option] = {
    "lowerdir": Option("=DIR[:DIR...][::DATA...]", "the lower layers, topmost first, then data-only layers", _lowerdir),
    "lowerdir+": Option("=DIR", "append one lower layer", _lowerdir_add),
    "datadir+": Option("=DIR", "append one data-only layer", _datadir_add),
    "upperdir": Option("=DIR", "the writable layer; without one the mount is read-only", _directory("upperdir")),
    "workdir": Option("=DIR", "an empty directory on the filesystem of the upper", _directory("workdir")),
    "redirect_dir": Option(
        "=on|follow|nofollow|off",
        "how directories that have lower parts are renamed",
        _choice("redirect_dir", "redirect_dir", _REDIRECT),
    ),
    "metacopy": Option("=on|off", "copy up metadata first, data later", _choice("metacopy", "metacopy", _ON_OFF)),
    "index": Option("=on|off", "keep hard links together across copy-up", _choice("index", "index", _ON_OFF)),
    "xino": Option(
        "[=on|off|auto]",
        "make inode numbers unique across filesystems",
        _choice("xino", "xino", {b"on": "on", b"off": "off", b"auto": "auto"}),
        bare=b"on",
    ),
    "userxattr": Option("", "keep marks in user.overlay.* xattrs", _constant("userxattr", True)),
    "volatile": Option("", "never sync; a crash may lose the upper", _constant("volatile", True)),
    "fsync": Option("=0|1", "whether fsync reaches the disk (default 1)", _choice("fsync", "fsync", _ZERO_ONE)),
    "uidmapping": Option("=DISK:SHOWN:COUNT[:...]", "user ids in the layers and in the mount", _mapping("uidmapping")),
    "gidmapping": Option("=DISK:SHOWN:COUNT[:...]", "group ids in the layers and in the mount", _mapping("gidmapping")),
    "squash_to_root": Option("", "show every owner as 0:0", _squash_root),
    "squash_to_uid": Option("=UID", "show every user as UID", _number("squash_to_uid", "squash_uid", 0, _MAX_ID)),
    "squash_to_gid": Option("=GID", "show every group as GID", _number("squash_to_gid", "squash_gid", 0, _MAX_ID)),
    "xattr_permissions": Option(
        "=0|1|2",
        "keep owner and mode in an xattr (1 privileged, 2 user)",
        _choice("xattr_permissions", "xattr_permissions", {b"0": 0, b"1": 1, b"2": 2}),
    ),
    "static_nlink": Option("", "show 1 as the link count of every directory", _constant("static_nlink", True)),
    "noacl": Option("", "no POSIX ACLs", _constant("noacl", True)),
    "noxattrs": Option("[=0|1]", "no extended attributes", _choice("noxattrs", "noxattrs", _ZERO_ONE), bare=b"1"),
    "ino32_t": Option("", "inode numbers that fit 32 bits", _constant("ino32", True)),
    "timeout": Option("=SECONDS", "how long the kernel may cache (default: for ever)", _timeout),
    "writeback": Option(
        "[=0|1]", "let the kernel gather writes", _choice("writeback", "writeback", _ZERO_ONE), bare=b"1"
    ),
    "context": Option('="CONTEXT"', "the SELinux label of every file", _context),
    "security_label": Option(
        "", "store the label that SELinux gives to what is made", _constant("security_label", True)
    ),
    "nfs_export": Option(
        "=on|off",
        "open forgotten files by handle (native engine: default on)",
        _choice("nfs_export", "nfs_export", _ON_OFF),
    ),
    "verity": Option("=off", "no fs-verity", _refuse("verity", "no digest is checked; use verity=off", b"off")),
    "max_write": Option("=BYTES", "the largest write request", _number("max_write", "max_write", 4096, 2**32 - 1)),
    "max_nodes": Option(
        "=N",
        "have the kernel forget files beyond so many (default 0: never)",
        _number("max_nodes", "max_nodes", 0, 2**31 - 1),
    ),
    "request_timeout": Option(
        "=SECONDS",
        "give up a daemon that answers no more (default 0: never)",
        _number("request_timeout", "request_timeout", 0, 2**16 - 1),
    ),
    "engine": Option(
        "=auto|native|portable",
        "what carries the requests (default auto: native where it can)",
        _choice("engine", "engine", {b"auto": "auto", b"native": "native", b"portable": "portable"}),
    ),
    "uring": Option(
        "=auto|on|off",
        "FUSE over io_uring (default auto: where it is switched on)",
        _choice("uring", "uring", {b"auto": "auto", b"on": "on", b"off": "off"}),
    ),
    "io": Option(
        "=cached|passthrough",
        "the page cache of file data: the mount's (default) or the layers'",
        _choice("io", "io", {b"cached": "cached", b"passthrough": "passthrough"}),
    ),
    "cpu_latency": Option(
        "=auto|on|off",
        "keep processors awake while busy (default auto: in small VMs)",
        _choice("cpu_latency", "cpu_latency", {b"auto": "auto", b"on": "on", b"off": "off"}),
    ),
    "readdirplus": Option(
        "=on|auto",
        "attributes with all listings (default), or at times",
        _choice("readdirplus", "readdirplus", {b"on": "on", b"auto": "auto"}),
    ),
    "fsname": Option("=NAME", "the source shown in the table of mounts", _fsname),
    "allow_other": Option("", "let all users in (default for root)", _constant("allow_other", True)),
    "allow_root": Option("", "let the mounting user and root in", _constant("allow_root", True)),
    "default_permissions": Option("", "the kernel checks access (default)", _constant("default_permissions", True)),
    "ro": Option("", "read-only", _flags(add=MS_RDONLY)),
    "rw": Option("", "read-write (default, given an upper)", _flags(drop=MS_RDONLY)),
    "dev": Option("", "allow device files (default for root)", _flags(drop=MS_NODEV)),
    "nodev": Option("", "no device files", _flags(add=MS_NODEV)),
    "suid": Option("", "allow set-user-ID programs (default for root)", _flags(drop=MS_NOSUID)),
    "nosuid": Option("", "no set-user-ID programs", _flags(add=MS_NOSUID)),
    "exec": Option("", "allow programs to run (default)", _flags(drop=MS_NOEXEC)),
    "noexec": Option("", "no programs", _flags(add=MS_NOEXEC)),
    "atime": Option("", "access times as the kernel's default has them", _flags(drop=_ATIME_FLAGS)),
    "noatime": Option("", "no access times (default)", _flags(add=MS_NOATIME, drop=_ATIME_FLAGS)),
    "relatime": Option("", "access times now and then", _flags(add=MS_RELATIME, drop=_ATIME_FLAGS)),
    "strictatime": Option("", "access times always", _flags(add=MS_STRICTATIME, drop=_ATIME_FLAGS)),
    "diratime": Option("", "access times of directories (default)", _flags(drop=MS_NODIRATIME)),
    "nodiratime": Option("", "no access times of directories", _flags(add=MS_NODIRATIME)),
    "lazytime": Option("", "keep changed times in memory", _flags(add=MS_LAZYTIME)),
    "nolazytime": Option("", "write changed times (default)", _flags(drop=MS_LAZYTIME)),
    "sync": Option("", "write synchronously", _flags(add=MS_SYNCHRONOUS)),
    "async": Option("", "write asynchronously (default)", _flags(drop=MS_SYNCHRONOUS)),
    "dirsync": Option("", "change directories synchronously", _flags(add=MS_DIRSYNC)),
    "symfollow": Option("", "follow symbolic links (default)", _flags(drop=MS_NOSYMFOLLOW)),
    "nosymfollow": Option("", "follow no symbolic links", _flags(add=MS_NOSYMFOLLOW)),
    "remount": Option("", "not supported", _refuse("remount", "unmount and mount again")),
}

IGNORED = frozenset(
    "private slave shared unbindable rprivate rslave rshared runbindable "
    "_netdev nofail user nouser users owner group auto noauto defaults comment silent loud nomand "
    "norelatime nostrictatime".split()
)
"""Options that mean something to mount(8), fstab readers or container engines, and nothing to a filesystem."""

_QUOTED = frozenset((b"context=", b"fscontext=", b"defcontext=", b"rootcontext="))

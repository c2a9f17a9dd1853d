"""Images of several layers made here, of busybox and of Debian, as OCI layouts, and changes to make in containers."""

import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.support.mounts import REPOSITORY

BUSYBOX: Final = Path("/usr/bin/busybox")
TAG: Final = "start"
_MTIME: Final = 1_600_000_000  # seconds

# What containers and builds do to directories that came with the image; ends with status 0 or at the first failure.
CHANGES: Final = """set -e
echo new >/etc/motd
echo more >>/data/keep/a
rm /data/keep/b
mv /data/keep/c /data/keep/moved
rm -rf /data/tree
mkdir -p /data/tree/deep
echo again >/data/tree/deep/file
mv /data/dir /data/renamed
echo inside >/data/renamed/sub/new
rm -rf /data/gone
ln /data/keep/one /data/keep/three
chmod 700 /data/keep/mode
chown 12:34 /data/keep/owner
ln -sf elsewhere /data/keep/link
mkfifo /data/fifo
rm -r /data/becomes-file
echo x >/data/becomes-file
rm /data/becomes-dir
mkdir /data/becomes-dir
echo y >/data/becomes-dir/z
"""

DEBIAN_CHANGES: Final = """set -e
export DEBIAN_FRONTEND=noninteractive
dpkg --purge --force-depends make tzdata >/dev/null
test ! -e /usr/bin/make
mv /usr/share/doc /usr/share/papers
mkdir /usr/share/doc
cp -a /usr/share/papers/bash /usr/share/doc/again
rm -rf /usr/share/papers/dpkg /usr/share/man
mv /usr/share/perl5 /usr/share/aside
cp -a /usr/share/aside /usr/share/perl5
rm -r /usr/share/aside
useradd --create-home someone
chown -R someone /usr/share/common-licenses
chmod -R o-r /etc/pam.d
perl -MTime::Local -pi -e 's/PRETTY/SHORT/' /etc/os-release
gzip -9 </bin/bash >/var/tmp/archive
dpkg --configure --pending
dpkg --audit
rm -f /var/log/*.log /var/cache/ldconfig/aux-cache /etc/*-
touch /var/log/own /var/lib/dpkg/updates/own
"""
"""What the container of a Debian image does, with packages and without.

Where podman compares trees, it misses the new time of a directory whose names are the old ones, and the new content of
a file whose size and time are: in the end there are none of either.
"""

CONTAINERFILE: Final = f"""FROM {{base}}
RUN rm -rf /data/tree && mkdir /data/tree && echo 1 >/data/tree/first
RUN test ! -e /data/tree/deep && rm -rf /data/tree && mkdir -p /data/tree/deep && echo 2 >/data/tree/deep/file
RUN rm /etc/motd && mv /data/dir /data/moved
RUN echo back >/etc/motd && mkdir /data/dir && echo other >/data/dir/file && rm -rf /data/moved/sub
COPY extra /data/extra
RUN rm -r /data/extra/old && chmod 4755 /data/extra/tool && chown -R 7:8 /data/keep
RUN test "$(cat /data/tree/deep/file)" = 2 && test ! -e /data/tree/first && test ! -e /data/moved/sub
ENV MADE=here
LABEL from={TAG}
"""


def make_context(directory: Path) -> None:
    """The files that CONTAINERFILE copies, the same each time."""
    (directory / "extra" / "old").mkdir(parents=True)
    (directory / "extra" / "old" / "file").write_bytes(b"old")
    (directory / "extra" / "tool").write_bytes(b"#!/bin/sh\n")


def make_image(layout: Path) -> None:
    """An image `TAG` of three layers in a new OCI layout; raises CalledProcessError when umoci does."""
    where = f"{layout}:{TAG}"
    _run("umoci", "init", "--layout", str(layout))
    _run("umoci", "new", "--image", where)
    for serial, members in enumerate((_first(), _second(), _third())):
        archive = layout.parent / f"layer-{serial}.tar"
        _write(archive, members)
        _run("umoci", "raw", "add-layer", "--image", where, str(archive))
        archive.unlink()
    _run("umoci", "config", "--image", where, "--config.cmd", "/bin/sh", "--config.env", "PATH=/bin")


_LEFT_OUT: Final = re.compile(
    r"usr/(lib/(gcc|git-core|python3|x86_64-linux-gnu/(perl/[^/]+/(CORE|auto/(Encode|Unicode))|gprofng))|include"
    r"|share/(locale|man/.+/|zoneinfo/.+/|doc/(?!bash|dpkg|gcc-12-base|make|tzdata)|perl/[^/]+/(CPAN|pod|Unicode/))"
    r"|bin/(git|python3|scalar|x86_64-linux-gnu-))|.*(\.a|san\.so.*)$|dev/."
)
"""Most of the Debian root, which no test needs."""


def make_debian(layout: Path) -> None:
    """An image `TAG` in a new OCI layout: a Debian root in two layers, and a third that hides parts of them."""
    where = f"{layout}:{TAG}"
    _run("umoci", "init", "--layout", str(layout))
    _run("umoci", "new", "--image", where)
    tree = subprocess.run([REPOSITORY / "tools/debian-tree"], capture_output=True, text=True, check=True).stdout.strip()
    archives = [layout.parent / f"debian-{serial}.tar" for serial in range(3)]
    with ExitStack() as stack:
        whole = stack.enter_context(tarfile.open(tree))
        parts = [stack.enter_context(tarfile.open(path, "w", format=tarfile.PAX_FORMAT)) for path in archives[:2]]
        for member in whole:
            member.name = member.name.removeprefix("./")
            member.linkname = member.linkname.removeprefix("./") if member.islnk() else member.linkname
            if not _LEFT_OUT.match(member.name) and not (member.islnk() and _LEFT_OUT.match(member.linkname)):
                upper = member.name.startswith(("usr/share/", "etc/"))
                parts[upper].addfile(member, whole.extractfile(member) if member.isreg() else None)
    _write(
        archives[2],
        (_file("usr/share/doc/.wh.gcc-12-base"), _dir("usr/share/man"), _file("usr/share/man/.wh..wh..opq")),
    )
    for archive in archives:
        _run("umoci", "raw", "add-layer", "--image", where, str(archive))
        archive.unlink()
    _run(
        "umoci",
        "config",
        "--image",
        where,
        "--config.cmd",
        "/bin/sh",
        "--config.env",
        f"PATH={os.defpath}:/usr/sbin:/sbin",
    )


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


Member = tuple[tarfile.TarInfo, bytes]


def _dir(name: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Member:
    return _member(name, tarfile.DIRTYPE, b"", mode, owner)


def _file(name: str, data: bytes = b"", mode: int = 0o644, owner: tuple[int, int] = (0, 0), **xattrs: str) -> Member:
    info, _ = member = _member(name, tarfile.REGTYPE, data, mode, owner)
    info.pax_headers = {f"SCHILY.xattr.user.{key}": value for key, value in xattrs.items()}
    return member


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    info, _ = member = _member(name, kind, b"", 0o777, (0, 0))
    info.linkname = target
    return member


def _member(name: str, kind: bytes, data: bytes, mode: int, owner: tuple[int, int]) -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.mode = mode
    info.uid, info.gid = owner
    info.mtime = _MTIME + sum(name.encode())
    return info, data


def _first() -> Iterable[Member]:
    yield _dir("bin")
    yield _file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    yield from (_link(f"bin/{name}", "busybox") for name in applets if name != "busybox")
    for name in ("etc", "proc", "sys", "dev", "tmp", "run", "data", "data/keep"):
        yield _dir(name)
    yield _file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n")
    yield _file("etc/group", b"root:x:0:\nuser:x:1000:\n")
    yield _file("etc/motd", b"welcome\n")
    for name in ("a", "b", "c", "mode", "owner", "one"):
        yield _file(f"data/keep/{name}", name.encode() * 5000)
    yield _link("data/keep/two", "data/keep/one", tarfile.LNKTYPE)
    yield _link("data/keep/link", "nowhere")
    for top in ("tree", "dir", "gone", "opaque", "becomes-file", "becomes-link"):
        yield _dir(f"data/{top}", 0o750, (3, 4))
        yield _dir(f"data/{top}/sub")
        yield from (_file(f"data/{top}/sub/{serial}", b"%d" % serial) for serial in range(10))


def _second() -> Iterable[Member]:
    yield _dir("data")
    yield _file("data/.wh.gone-file")
    yield _file("data/becomes-dir", b"a file")
    yield _dir("data/keep")
    yield _file("data/keep/a", b"newer", 0o640, (1000, 1000), colour="blue")
    yield _file("data/keep/setuid", b"s", 0o4755)
    yield _file("data/keep/.wh.mode")
    yield _file("data/keep/mode", b"made again")
    yield _dir("data/opaque", 0o700)
    yield _file("data/opaque/.wh..wh..opq")
    yield _file("data/opaque/only", b"this is all")
    yield _dir("data/dir")
    yield _dir("data/dir/sub")
    yield _file("data/dir/sub/.wh.3")
    yield _file("data/dir/sub/4", b"newer")


def _third() -> Iterable[Member]:
    yield _dir("data")
    yield _file("data/.wh.becomes-link")
    yield _link("data/becomes-link", "keep")
    yield _dir("data/tree")
    yield _file("data/tree/.wh.sub")
    yield _dir("data/tree/deep", 0o2775, (5, 6))
    yield _file("data/tree/deep/file", b"deep")


def _write(archive: Path, members: Iterable[Member]) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))

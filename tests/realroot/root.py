"""A Debian root on a mount of the filesystem under test, and commands run in it.

`OVERLAYFS_PY_REALROOT_ON` chooses another filesystem than ours, to check the tests themselves: `kernel` or
`fuse-overlayfs`; or another engine of ours: `native`.
"""

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from tests.support.mounts import REPOSITORY, fuse_overlayfs_mount, kernel_mount, our_mount

Layout = Literal["whole", "split"]

FILESYSTEM: Final = os.environ.get("OVERLAYFS_PY_REALROOT_ON", "ours")
FILES: Final = Path(__file__).parent / "files"

# Everything in a mount and process namespace of its own, so that nothing mounted or started here outlives the command.
# The machine's own way to the packages is used: its resolver, apt settings and certificates.
_ENTER: Final = """
root=$1
shift
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/run"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
apt-config dump Acquire >"$root/run/apt.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/run/certificates.crt"
exec chroot "$root" "$@"
"""

_PASSED_ON: Final = (
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"),
)


class Root:
    """Layers below `base`, mounted at `mnt` from the start to `close`."""

    def __init__(self, base: Path, layout: Layout) -> None:
        self.base = base
        self.upper = base / "upper"
        self.work = base / "work"
        self.mnt = base / "mnt"
        for path in (self.upper, self.work, self.mnt):
            path.mkdir(parents=True)
        self.lowers = [_files_layer(base / "files"), *_debian_layers(base, layout)]
        self._mounted = contextlib.ExitStack()
        self.open()

    def open(self) -> None:
        stack = (self.mnt, self.lowers, self.upper, self.work)
        if FILESYSTEM == "kernel":
            self._mounted.enter_context(kernel_mount(*stack, "redirect_dir=on"))
        elif FILESYSTEM == "fuse-overlayfs":
            self._mounted.enter_context(fuse_overlayfs_mount(*stack))
        else:
            options = "engine=portable" if FILESYSTEM == "portable" else ""
            self._mounted.enter_context(our_mount(*stack, options))

    def close(self) -> None:
        self._mounted.close()

    @contextlib.contextmanager
    def on_the_kernel(self) -> Iterator[None]:
        """Our mount makes room for the kernel's over the same layers."""
        self.close()
        try:
            with kernel_mount(self.mnt, self.lowers, self.upper, self.work, "redirect_dir=on"):
                yield
        finally:
            self.open()

    def run(self, *command: str, cwd: str = "/root", limit: float = 100.0) -> str:
        """The standard output of a command run in the root; an AssertionError with all output unless it exits with 0.

        `limit` is in seconds.
        """
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {
            "APT_CONFIG": "/run/apt.conf",
            "DEBIAN_FRONTEND": "noninteractive",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PIP_CERT": "/run/certificates.crt",
        }
        enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh", str(self.mnt)]
        done = subprocess.run(
            [*enter, "env", "--chdir", cwd, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def verify(self) -> str:
        """What dpkg finds changed in the files of all installed packages."""
        return self.run("dpkg", "--verify") + self.run("dpkg", "--audit")


def _debian_layers(base: Path, layout: Layout) -> list[Path]:
    tar = subprocess.run([REPOSITORY / "tools/debian-tree"], capture_output=True, text=True, check=True).stdout.strip()
    tree = base / "debian"
    tree.mkdir()
    extract = ["tar", "--extract", "--xattrs", "--xattrs-include=*", "--file", tar, "--directory", str(tree)]
    subprocess.run(extract, check=True)
    if layout == "whole":
        return [tree]
    layers = [base / f"debian-{number}" for number in range(4)]
    for layer in layers:
        layer.mkdir()
    _split(os.fsencode(tree), [os.fsencode(layer) for layer in layers])
    return layers


def _split(tree: bytes, layers: Sequence[bytes]) -> None:
    """Move each file into one of the layers, topmost first; directories are made in each layer that needs them.

    Below some of the files a stale one lies in a lower layer, below a whiteout and an opaque directory too.
    """
    times: dict[bytes, tuple[int, int]] = {}
    names = {directory: [*folders, *files] for directory, folders, files in os.walk(tree)}
    for directory, contents in names.items():
        relative = os.path.relpath(directory, tree)
        inode = os.lstat(directory).st_ino
        _same_directory(tree, layers[inode % len(layers)], relative, times)
        for name in contents:
            source = os.path.join(directory, name)
            status = os.lstat(source)
            if stat.S_ISDIR(status.st_mode):
                continue
            # Hard links have to stay together.
            number = status.st_ino % len(layers)
            _same_directory(tree, layers[number], relative, times)
            os.rename(source, os.path.join(layers[number], relative, name))
            if status.st_ino % 5 == 0 and number < len(layers) - 1:
                _same_directory(tree, layers[-1], relative, times)
                Path(os.fsdecode(os.path.join(layers[-1], relative, name))).write_text("stale\n")
    bottom, top = Path(os.fsdecode(layers[-1])), Path(os.fsdecode(layers[0]))
    for layer, file in ((bottom, "stale"), (top, "fresh")):
        (layer / "opt/opaque").mkdir(parents=True)
        (layer / "opt/opaque" / file).touch()
    (bottom / "opt/removed").mkdir()
    (bottom / "opt/removed/stale").touch()
    os.mknod(top / "opt/removed", stat.S_IFCHR, 0)
    os.setxattr(top / "opt/opaque", "trusted.overlay.opaque", b"y")
    for path, ns in times.items():
        os.utime(path, ns=ns)


def _same_directory(tree: bytes, layer: bytes, relative: bytes, times: dict[bytes, tuple[int, int]]) -> None:
    """Make a directory of the tree, and those above it, in a layer; note its times for when it is filled."""
    target = os.path.normpath(os.path.join(layer, relative))
    if target in times:
        return
    if target != layer:
        _same_directory(tree, layer, os.path.dirname(relative) or b".", times)
        os.mkdir(target)
    status = os.stat(os.path.join(tree, relative))
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, stat.S_IMODE(status.st_mode))
    times[target] = (status.st_atime_ns, status.st_mtime_ns)


def _files_layer(layer: Path) -> Path:
    """A layer with a git repository, a C project and a database, all of which the tests change."""
    layer.mkdir()
    srv = layer / "srv"
    shutil.copytree(FILES, srv)
    repository = srv / "source.git"
    git = ["git", "-c", "fastimport.unpackLimit=100000", f"--git-dir={repository}"]
    subprocess.run([*git, "init", "--quiet", "--bare", "--initial-branch=main"], check=True)
    subprocess.run([*git, "fast-import", "--quiet"], input=_history(commits=20, files=40), check=True)
    with contextlib.closing(sqlite3.connect(srv / "accounts.db")) as database, database:
        database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, note BLOB)")
        rows = ((number, 1000, bytes(1000)) for number in range(4000))
        database.executemany("INSERT INTO account VALUES (?, ?, ?)", rows)
    return layer


def _history(commits: int, files: int) -> bytes:
    """A stream for git fast-import: each commit changes a tenth of the files."""
    stream = []
    for commit in range(commits):
        stream.append(f"commit refs/heads/main\ncommitter Tester <tester@example.org> {1600000000 + commit} +0000")
        message = f"Change {commit}"
        stream.append(f"data {len(message)}\n{message}")
        for number in range(files):
            if commit == 0 or number % 10 == commit % 10:
                text = f"file {number} of commit {commit}\n" * 50
                stream.append(f"M 100644 inline dir{number % 4}/file{number}\ndata {len(text)}\n{text}")
    return "\n".join([*stream, "done", ""]).encode()

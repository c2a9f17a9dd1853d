"""Runs each test of the corpus on a plain ext4 directory, the kernel's overlayfs, and ours with either engine.

Everything lies on an ext4 image in memory. The lower files of all tests of a module are built before its stack is
mounted; each test then works in a directory of its own, which is removed afterwards, and leaves its lower files as they
were.
"""

import contextlib
import errno
import inspect
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.posix.rig import KINDS, OURS, Flavour, Kind, Place, Root, umask
from tests.support.mounts import MountFailed, kernel_mount, our_mount, unmount
from tests.support.syscalls import MS_BIND, MS_RDONLY, MS_REMOUNT, mount

MS_NOATIME: Final = 1024
MS_RELATIME: Final = 1 << 21

_LIMIT: Final = 300.0  # seconds one of our mounts may last: a request that hangs ends with it
_SMALL: Final = 4 << 20  # bytes of the filesystem that gets full
_OUR_OPTIONS: Final[dict[Flavour, str]] = {"relatime": "atime", "user-marks": "userxattr"}
_KERNEL_OPTIONS: Final[dict[Flavour, str]] = {"read-only": "", "user-marks": "userxattr,index=off"}


class Placement(NamedTuple):
    """On which kind of root a test runs, and where the files it finds there were made."""

    kind: Kind
    place: Place


class Stack:
    """A root of one kind and flavour, mounted once; each test has a numbered directory in it."""

    def __init__(self, kind: Kind, flavour: Flavour, base: Path, upper_base: Path) -> None:
        self.kind = kind
        self.flavour = flavour
        self.mnt = base / "mnt"
        self.upper = upper_base / "upper"
        self.work = upper_base / "work"
        self.lower = self.upper if kind == "ext4" else base / "lower"
        self.top = base / "top"
        for path in (self.mnt, self.upper, self.work, self.lower, self.top):
            path.mkdir(parents=True, exist_ok=True)
        self._built: dict[str, list[dict[str, object]]] = {}
        self._mounted = contextlib.ExitStack()

    def build_lower(self, name: str, build: Callable[[], None] | None) -> None:
        """Make a test's directory with its files in the lower layer, which is not mounted yet."""
        directory = self.lower / name
        directory.mkdir()
        with contextlib.chdir(directory), umask(0o022):
            if build is not None:
                build()
        if self.kind != "ext4":
            spread(directory, self.top / name)
            self._built[name] = self._layers_of(name)

    def up(self) -> None:
        lowers = [self.top, self.lower]
        upper, work = (None, None) if self.flavour == "read-only" else (self.upper, self.work)
        atime = MS_RELATIME if self.flavour == "relatime" else MS_NOATIME
        if self.kind in OURS:
            options = f"{_OUR_OPTIONS.get(self.flavour, '')},{OURS[self.kind]}"
            self._mounted.enter_context(our_mount(self.mnt, lowers, upper, work, options, limit=_LIMIT))
            return
        if self.kind == "ext4":
            mount(os.fsencode(self.upper), os.fsencode(self.mnt), None, MS_BIND)
            self._mounted.callback(unmount, self.mnt)
        else:
            options = _KERNEL_OPTIONS.get(self.flavour, "redirect_dir=on,index=on")
            self._mounted.enter_context(kernel_mount(self.mnt, lowers, upper, work, options))
        flags = MS_REMOUNT | MS_BIND | atime | (MS_RDONLY if self.flavour == "read-only" else 0)
        mount(b"none", os.fsencode(self.mnt), None, flags)

    def down(self) -> None:
        self._mounted.close()
        # The kernel leaves a whiteout there, to link others from.
        if self.kind in OURS and self.flavour != "read-only":
            left = sorted(os.listdir(self.work / "work"))
            assert not left, f"left in the workdir of {self.kind}: {left}"

    def check_alive(self) -> None:
        """Fail if the daemon is gone, after mounting again for the tests that follow."""
        try:
            os.stat(self.mnt)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
            try:
                self._mounted.close()
            except MountFailed as failure:
                raise AssertionError(f"the daemon died\n{failure}") from error
            finally:
                self.up()

    def check_lower(self, name: str) -> None:
        if name in self._built:
            assert self._layers_of(name) == self._built[name], "a lower layer was changed"

    def _layers_of(self, name: str) -> list[dict[str, object]]:
        return [snapshot(layer / name) for layer in (self.top, self.lower)]


class Images:
    """Filesystems in memory, all unmounted at the end."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._mounted = contextlib.ExitStack()
        mount(b"tmpfs", os.fsencode(base), b"tmpfs", 0, b"mode=755,size=90%")
        self._mounted.callback(unmount, base)
        self.main = self.add("main", 4 << 30, "ea_inode")

    def add(self, name: str, size: int, features: str, *options: str) -> Path:
        """An ext4 filesystem of this many bytes, mounted."""
        image, where = self._base / f"{name}.ext4", self._base / name
        with image.open("xb") as stream:
            stream.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", features, *options, image], check=True)
        where.mkdir()
        subprocess.run(["mount", "-o", "loop", image, where], check=True)
        self._mounted.callback(unmount, where)
        return where

    def close(self) -> None:
        self._mounted.close()


class Stacks:
    """The stacks for the tests of one module; each is mounted when the first test asks for it."""

    def __init__(self, images: Images, name: str, items: list[pytest.Function]) -> None:
        self._images = images
        self._name = name
        self._items = items
        self._names = {item.nodeid: f"{serial:03}" for serial, item in enumerate(items)}
        self._stacks: dict[tuple[Kind, Flavour], Stack] = {}
        self._mounted = contextlib.ExitStack()

    def get(self, kind: Kind, flavour: Flavour) -> Stack:
        if (kind, flavour) not in self._stacks:
            name = f"{self._name}-{kind}-{flavour}"
            base = upper_base = self._images.main / name
            if flavour == "full":
                upper_base = self._images.add(name, _SMALL, "^has_journal,^resize_inode", "-N", "64")
            stack = Stack(kind, flavour, base, upper_base)
            for item in self._items:
                if _flavour(item) == flavour and item.callspec.params["root"] == Placement(kind, "lower"):
                    stack.build_lower(self._names[item.nodeid], _builder(item))
            stack.up()
            self._mounted.callback(stack.down)
            self._stacks[kind, flavour] = stack
        return self._stacks[kind, flavour]

    def name_of(self, item: pytest.Function) -> str:
        return self._names[item.nodeid]

    def close(self) -> None:
        self._mounted.close()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "prepared(build): a function that makes the test's files")
    config.addinivalue_line("markers", "in_lower(build): a function that makes the test's files in a lower layer")
    config.addinivalue_line(
        "markers", "flavour(name): the mount is read-only, small enough to fill, or has other options"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "root" not in metafunc.fixturenames:
        return
    placements = []
    for kind in KINDS:
        if metafunc.definition.get_closest_marker("in_lower"):
            places: tuple[Place, ...] = () if kind == "ext4" else ("lower",)
        elif _flavour(metafunc.definition) == "read-only":
            places = ("lower",)
        elif kind != "ext4" and metafunc.definition.get_closest_marker("prepared"):
            places = ("fresh", "lower")
        else:
            places = ("fresh",)
        placements += [Placement(kind, place) for place in places]
    metafunc.parametrize("root", placements, indirect=True, ids=["-".join(placement) for placement in placements])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of a module on ext4 before any on the kernel's overlayfs, and those before any on ours."""
    modules = list(dict.fromkeys(item.module for item in _corpus(items)))
    ordered = iter(sorted(_corpus(items), key=lambda item: (modules.index(item.module), KINDS.index(_kind(item)))))
    items[:] = [next(ordered) if _in_corpus(item) else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if isinstance(item, pytest.Function) and report.when == "call" and report.failed:
        root = item.funcargs.get("root")
        if isinstance(root, Root):
            for title, path in (("mount", root.path), ("lower", root.lower), ("upper", root.upper)):
                if path is not None:
                    report.sections.append((f"tree in the {title}", _tree(path)))
    return report


@pytest.fixture(scope="package")
def images(scratch: Path) -> Iterator[Images]:
    base = scratch / "posix"
    base.mkdir()
    made = Images(base)
    try:
        yield made
    finally:
        made.close()
        base.rmdir()


@pytest.fixture(scope="module")
def stacks(images: Images, request: pytest.FixtureRequest) -> Iterator[Stacks]:
    items = [item for item in _corpus(request.session.items) if item.module is request.module]
    made = Stacks(images, request.module.__name__.rpartition(".")[2], items)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def root(request: pytest.FixtureRequest, stacks: Stacks) -> Iterator[Root]:
    """A directory of its own for a test, which is the current directory, with what the test has prepared."""
    item = request.node
    assert isinstance(item, pytest.Function)
    placement: Placement = request.param
    stack = stacks.get(placement.kind, _flavour(item))
    name = stacks.name_of(item)
    path = stack.mnt / name
    overlay = placement.kind != "ext4"
    made = Root(
        placement.kind,
        placement.place,
        str(stack.mnt),
        str(path),
        str(stack.lower / name) if overlay else None,
        str(stack.upper / name) if overlay else None,
    )
    stack.check_alive()
    if placement.place == "fresh":
        path.mkdir()
    with umask(0o022):
        try:
            os.chdir(path)
            build = _builder(item)
            if build is not None and placement.place == "fresh":
                build()
            yield made
        finally:
            os.chdir("/")
            stack.check_alive()
    if stack.flavour != "read-only" and not made.kept:
        shutil.rmtree(path)
    stack.check_lower(name)


def spread(bottom: Path, top: Path, depth: int = 3) -> None:
    """Spread a tree over two layers: every other file goes to the top one, and every other directory is in both."""
    st = os.stat(bottom)
    top.mkdir()
    for entry in sorted(os.scandir(bottom), key=lambda entry: entry.name)[::2]:
        if entry.is_dir(follow_symlinks=False):
            if depth:
                spread(bottom / entry.name, top / entry.name, depth - 1)
        elif entry.stat(follow_symlinks=False).st_nlink == 1:
            os.rename(entry.path, top / entry.name)
    os.chown(top, st.st_uid, st.st_gid)
    shutil.copystat(bottom, top)
    for directory in (bottom, top):
        os.utime(directory, ns=(st.st_atime_ns, st.st_mtime_ns))


def snapshot(directory: Path) -> dict[str, object]:
    """Everything a layer says about the files below a directory, which may be deeper than PATH_MAX."""
    found: dict[str, object] = {}
    for where, directories, files, descriptor in os.fwalk(directory):
        for name in [".", *directories, *files]:
            path = f"/proc/self/fd/{descriptor}/{name}"
            st = os.lstat(path)
            names = sorted(os.listxattr(path, follow_symlinks=False))
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in names}
            content: object = None
            if stat.S_ISREG(st.st_mode):
                content = Path(path).read_bytes() if st.st_size < 1 << 20 else st.st_blocks
            elif stat.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            links = st.st_nlink if not stat.S_ISDIR(st.st_mode) else 0
            facts = (st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_rdev, st.st_mtime_ns, links)
            found[os.path.join(where, name)] = (facts, xattrs, content)
    return found


def _tree(path: str) -> str:
    shown = subprocess.run(
        ["find", path, "-maxdepth", "4", "-printf", r"./%P %M links %n owner %U:%G size %s %T+ %l\n"],
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=30,
    )
    return "\n".join(sorted(shown.stdout.splitlines())[:60]) + shown.stderr


def _corpus(items: list[pytest.Item]) -> list[pytest.Function]:
    return [item for item in items if isinstance(item, pytest.Function) and _in_corpus(item)]


def _in_corpus(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "root" in item.fixturenames and "stacks" in item.fixturenames


def _kind(item: pytest.Function) -> Kind:
    placement = item.callspec.params["root"]
    assert isinstance(placement, Placement)
    return placement.kind


def _flavour(item: pytest.Item | pytest.Function) -> Flavour:
    marker = item.get_closest_marker("flavour")
    flavour: Flavour = marker.args[0] if marker else "usual"
    return flavour


def _builder(item: pytest.Function) -> Callable[[], None] | None:
    """The function that makes a test's files, bound to the parameters of the test that it names."""
    marker = item.get_closest_marker("prepared") or item.get_closest_marker("in_lower")
    if marker is None:
        return None
    build: Callable[..., None] = marker.args[0]
    wanted = inspect.signature(build).parameters
    arguments = {name: item.callspec.params[name] for name in wanted if name in item.callspec.params}
    return lambda: build(**arguments)

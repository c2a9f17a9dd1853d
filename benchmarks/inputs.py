"""Inputs: the layers and archives that workloads work on.

Each is made by one function, once, and kept in a cache directory under a name that changes with this file. Layers are
directories; nothing may change them, which `fingerprint` finds out. Only `debian`, `debs` and `wheels` need
the network, and only when they are made.
"""

import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
MIB: Final = 1 << 20

Recipe = Callable[[Path, "Inputs"], None]
RECIPES: Final[dict[str, Recipe]] = {}

DEBS: Final = ("vim", "vim-common", "vim-runtime", "libgpm2", "libsodium23")
WHEEL: Final = "pygments"

# Of the tree of small files: directories, files in each, and the most bytes a file has.
TREE_DIRECTORIES: Final = 100
TREE_FILES: Final = 40
TREE_BYTES: Final = 16_000


class Inputs:
    """The inputs in one cache directory; `small` ones are for tests of the benchmarks."""

    def __init__(self, cache: Path, *, small: bool = False) -> None:
        self.cache = cache
        self.small = small
        self._warm: set[str] = set()

    def count(self, number: int) -> int:
        """A number of things: a hundredth for small inputs, but at least 2."""
        return max(2, number // 100) if self.small else number

    def path(self, name: str) -> Path:
        """Where an input is; it has been made."""
        made = self._target(name)
        if not made.exists():
            raise FileNotFoundError(f"the input {name} has not been made")
        return made

    def make(self, name: str) -> None:
        """Make an input if the cache does not have it, in place of an older version."""
        target = self._target(name)
        if target.exists():
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        for old in self.cache.glob(f"{name}@*"):
            remove(old)
        print(f"making the input {name}", flush=True)
        part = self.cache / f"{name}@part"
        recipe, argument = _recipe(name)
        if argument:
            SIZED[recipe](part, self, int(argument))
        else:
            RECIPES[recipe](part, self)
        part.rename(target)

    def copy(self, name: str, source: "Inputs") -> None:
        """Have an input that another cache has."""
        self.cache.mkdir(parents=True, exist_ok=True)
        _run("cp", "--archive", source.path(name), self._target(name))

    def warm(self, name: str) -> None:
        """Read an input, so that the page cache has it; nothing when it was read since `cooled`."""
        if name not in self._warm:
            read_all(self.path(name))
            self._warm.add(name)

    def cooled(self) -> None:
        """The caches were dropped."""
        self._warm.clear()

    def _target(self, name: str) -> Path:
        version = hashlib.sha256(Path(__file__).read_bytes() + bytes([self.small])).hexdigest()[:10]
        return self.cache / f"{name}@{version}"


def _recipe(name: str) -> tuple[str, str]:
    """`layers-10` is the recipe `layers` at the size 10; other names have no size."""
    if name in RECIPES:
        return name, ""
    recipe, _, argument = name.rpartition("-")
    return recipe, argument


def recipe(function: Recipe) -> Recipe:
    """Register the recipe of the input that is called as the function is, with dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def read_all(path: Path) -> tuple[int, int]:
    """Read all there is below a path; returns how many files and bytes that was."""
    buffer = bytearray(MIB)
    files = total = 0
    for directory, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            file = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(file).st_mode):
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    while got := os.readv(descriptor, [buffer]):
                        total += got
                finally:
                    os.close(descriptor)
                files += 1
    return files, total


def fingerprint(path: Path) -> str:
    """Tells whether anything below a path changed: names, types, owners, modes, sizes, times."""
    found = hashlib.sha256()
    for directory, folders, names in os.walk(path):
        folders.sort()
        for name in sorted([*folders, *names]):
            status = os.lstat(os.path.join(directory, name))
            facts = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns, status.st_nlink)
            found.update(f"{directory}/{name} {facts}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def remove(path: Path) -> None:
    """rm, unlike shutil.rmtree, goes deeper than PATH_MAX."""
    subprocess.run(["rm", "-rf", "--one-file-system", path], check=True)


def _run(*command: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, input=stdin, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def small_tree(target: Path, inputs: Inputs) -> int:
    """A tree like source code: many small files of text in a hundred directories. Returns how many files."""
    chance = random.Random(1)
    words = [bytes(chance.choices(b"abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(500)]
    text = b" ".join(chance.choices(words, k=4 * TREE_BYTES // 6))
    count = 0
    for directory in range(inputs.count(TREE_DIRECTORIES)):
        folder = target / f"part{directory % 10}/directory{directory}"
        folder.mkdir(parents=True)
        for number in range(TREE_FILES):
            size = min(TREE_BYTES, int(chance.lognormvariate(7.5, 1.2)))
            start = chance.randrange(len(text) - TREE_BYTES)
            (folder / f"file{number}.txt").write_bytes(text[start : start + size])
            count += 1
    return count


def tree_files(inputs: Inputs) -> int:
    """How many files `small_tree` has."""
    return inputs.count(TREE_DIRECTORIES) * TREE_FILES


@recipe
def empty(target: Path, inputs: Inputs) -> None:
    target.mkdir()


@recipe
def debian(target: Path, inputs: Inputs) -> None:
    """A Debian root with a compiler, git and Python; for tests, busybox and some files."""
    target.mkdir()
    if inputs.small:
        for directory in ("bin", "dev", "proc", "run", "sys", "tmp", "root", "etc"):
            (target / directory).mkdir()
        shutil.copy2("/bin/busybox", target / "bin/busybox")
        for name in ("sh", "true"):
            (target / "bin" / name).symlink_to("busybox")
        small_tree(target / "usr", inputs)
        return
    tar = _run(ROOT / "tools/debian-tree")
    _run("tar", "--extract", "--xattrs", "--xattrs-include=*", "--file", tar, "--directory", target)


@recipe
def tree(target: Path, inputs: Inputs) -> None:
    small_tree(target / "tree", inputs)


@recipe
def tree_tar(target: Path, inputs: Inputs) -> None:
    """The same tree, packed."""
    folder = target.with_name("unpacked@part")
    small_tree(folder / "tree", inputs)
    _run("tar", "--create", "--file", target, "--owner=0", "--group=0", "--directory", folder, "tree")
    remove(folder)


def _history(inputs: Inputs) -> bytes:
    """A stream for git fast-import: each commit changes a twentieth of the files."""
    chance = random.Random(2)
    lines = [b"%032x %032x" % (chance.getrandbits(128), chance.getrandbits(128)) for _ in range(400)]
    files, stream = inputs.count(2000), []
    for commit in range(inputs.count(100)):
        stream.append(b"commit refs/heads/main\ncommitter Tester <tester@example.org> %d +0000" % (1600000000 + commit))
        message = b"Change %d" % commit
        stream.append(b"data %d\n%s" % (len(message), message))
        for number in range(files):
            if commit == 0 or number % 20 == commit % 20:
                text = b"\n".join([b"file %d commit %d" % (number, commit), *chance.choices(lines, k=30)])
                stream.append(b"M 100644 inline dir%d/sub%d/file%d" % (number % 8, number % 40, number))
                stream.append(b"data %d\n%s" % (len(text), text))
    return b"\n".join([*stream, b"done", b""])


@recipe
def repository(target: Path, inputs: Inputs) -> None:
    """A bare git repository, packed."""
    bare = target / "source.git"
    _run("git", "init", "--quiet", "--bare", "--initial-branch=main", bare)
    limit = "fastimport.unpackLimit=1"
    _run("git", "-c", limit, f"--git-dir={bare}", "fast-import", "--quiet", stdin=_history(inputs))


@recipe
def checkout(target: Path, inputs: Inputs) -> None:
    """A clone with a work tree, as an image with source code holds it."""
    target.mkdir()
    bare = target / "source.git"
    _run("git", "init", "--quiet", "--bare", "--initial-branch=main", bare)
    _run("git", f"--git-dir={bare}", "fast-import", "--quiet", stdin=_history(inputs))
    _run("git", "clone", "--quiet", "--no-hardlinks", bare, target / "clone")
    remove(bare)


@recipe
def project(target: Path, inputs: Inputs) -> None:
    """A C program of many small files, with a Makefile."""
    folder = target / "srv/project"
    folder.mkdir(parents=True)
    count = inputs.count(24)
    headers = "\n".join(f"#include <{name}.h>" for name in ("errno", "signal", "stdio", "stdlib", "string", "unistd"))
    for number in range(count):
        (folder / f"part{number}.h").write_text(f"int part{number}(int);\n")
        functions = "\n".join(f"static int f{i}(int x) {{ return x * {i} + {number}; }}" for i in range(20))
        calls = " + ".join(f"f{i}(x)" for i in range(20))
        includes = "\n".join(f'#include "part{i}.h"' for i in range(count))
        body = f"{headers}\n{includes}\n{functions}\nint part{number}(int x) {{ return {calls}; }}\n"
        (folder / f"part{number}.c").write_text(body)
    calls = " + ".join(f"part{i}(1)" for i in range(count))
    includes = "\n".join(f'#include "part{i}.h"' for i in range(count))
    main = f'#include <stdio.h>\n{includes}\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    (folder / "main.c").write_text(main)
    rules = "OBJECTS := $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: $(OBJECTS)\n\tgcc -o $@ $^\n"
    (folder / "Makefile").write_text(rules + "%.o: %.c\n\tgcc -c -o $@ $<\n")


@recipe
def debs(target: Path, inputs: Inputs) -> None:
    """Packages that the Debian root lacks, with all that they need."""
    folder = target / "srv/debs"
    folder.mkdir(parents=True)
    # apt drops its privileges for downloads, and its user can't write here.
    _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *DEBS, cwd=folder)
    for file in folder.iterdir():
        # apt mistakes the escapes in the names that it gives files itself.
        file.rename(folder / f"{file.name.partition('_')[0]}.deb")


@recipe
def wheels(target: Path, inputs: Inputs) -> None:
    folder = target / "srv/wheels"
    folder.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "download", "--only-binary=:all:", "--dest", folder, WHEEL)


@recipe
def blocks(target: Path, inputs: Inputs) -> None:
    """One file of 128 MiB."""
    target.mkdir()
    _random_file(target / "blocks", inputs.count(128) * MIB)


@recipe
def parts(target: Path, inputs: Inputs) -> None:
    """For each of eight clients 500 small files and one of 16 MiB."""
    for client in range(8):
        folder = target / f"client{client}/files"
        folder.mkdir(parents=True)
        for number in range(inputs.count(500)):
            (folder / f"file{number}").write_bytes(b"%d" % number * 100)
        _random_file(folder.parent / "blocks", inputs.count(16) * MIB)


@recipe
def programs(target: Path, inputs: Inputs) -> None:
    """What many containers of one image read alike: 32 files of 1 MiB."""
    target.mkdir()
    for number in range(inputs.count(32)):
        _random_file(target / f"library{number}", MIB)


def big_file(target: Path, inputs: Inputs) -> None:
    """A file of 1 GiB; sites put it on the filesystem it is for."""
    _random_file(target, inputs.count(1024) * MIB)


def _random_file(path: Path, size: int) -> None:
    chance = random.Random(size)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(chance.randbytes(min(MIB, size - start)))


def image(target: Path, inputs: Inputs, filesystem: str) -> None:
    """A filesystem of 3 GiB with a layer in it that holds `big_file`."""
    mountpoint = target.with_name(f"{target.name}-mnt")
    mountpoint.mkdir()
    with target.open("wb") as file:
        file.truncate(max(400, inputs.count(3072)) * MIB)
    make = ["mkfs.ext4", "-q", "-F"] if filesystem == "ext4" else ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"]
    _run(*make, target)
    _run("mount", "-o", "loop", target, mountpoint)
    try:
        (mountpoint / "layer").mkdir()
        big_file(mountpoint / "layer/big", inputs)
    finally:
        _run("umount", mountpoint)
        mountpoint.rmdir()


@recipe
def image_ext4(target: Path, inputs: Inputs) -> None:
    image(target, inputs, "ext4")


@recipe
def image_xfs(target: Path, inputs: Inputs) -> None:
    image(target, inputs, "xfs")


def layers(target: Path, inputs: Inputs, count: int) -> None:
    """A tree of 3,000 files and 30 directories, spread over `count` layers; every directory is in each layer."""
    for number in range(inputs.count(3000)):
        folder = target / str(number % count) / f"directory{number % 30}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").touch()
    for layer in range(count):
        for directory in range(30):
            (target / str(layer) / f"directory{directory}").mkdir(parents=True, exist_ok=True)


def files(target: Path, inputs: Inputs, count: int) -> None:
    """Empty files, a thousand in a directory."""
    target.mkdir()
    for start in range(0, inputs.count(count), 1000):
        folder = f"{target}/directory{start // 1000}"
        os.mkdir(folder)
        for number in range(start, min(start + 1000, inputs.count(count))):
            os.close(os.open(f"{folder}/file{number}", os.O_WRONLY | os.O_CREAT, 0o644))


def entries(target: Path, inputs: Inputs, count: int) -> None:
    """One directory of empty files."""
    folder = target / "directory"
    folder.mkdir(parents=True)
    for number in range(inputs.count(count)):
        os.close(os.open(f"{folder}/file{number}", os.O_WRONLY | os.O_CREAT, 0o644))


SIZED: Final[dict[str, Callable[[Path, Inputs, int], None]]] = {
    "layers": layers,
    "files": files,
    "entries": entries,
}
"""Recipes that come in sizes: the input `files-1000` is `files` at the size 1,000."""

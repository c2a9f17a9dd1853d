"""A tree in memory beside the one on disk: what the disk has to show after each operation."""

import contextlib
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support.syscalls import RENAME_EXCHANGE, renameat2


@dataclass(frozen=True, slots=True)
class Object:
    """An inode: its type, permissions, and content, which is the target of a symbolic link."""

    kind: int
    mode: int
    data: bytes = b""


@dataclass(slots=True)
class Model:
    """Names, relative to a directory, and the objects they lead to."""

    names: dict[str, int] = field(default_factory=dict)
    objects: dict[int, Object] = field(default_factory=dict)

    def copy(self) -> "Model":
        return Model(dict(self.names), dict(self.objects))

    def add(self, path: str, made: Object) -> None:
        self.names[path] = number = len(self.objects)
        self.objects[number] = made

    def change(self, path: str, **fields: object) -> None:
        number = self.names[path]
        self.objects[number] = replace(self.objects[number], **fields)  # type: ignore[arg-type]

    def move(self, old: str, new: str) -> None:
        """A directory with all below it."""
        for path in [path for path in self.names if path == old or path.startswith(old + "/")]:
            self.names[new + path[len(old) :]] = self.names.pop(path)

    def of_kind(self, kind: int) -> list[str]:
        return [path for path, number in self.names.items() if self.objects[number].kind == kind]

    def seen(self) -> dict[str, tuple[Object, str]]:
        """Each path with its object and the first path that is the same object."""
        first: dict[int, str] = {}
        return {
            path: (self.objects[number], first.setdefault(number, path)) for path, number in sorted(self.names.items())
        }


def read_model(root: Path) -> Model:
    """What is on disk."""
    model = Model()
    numbers: dict[tuple[int, int], int] = {}
    for folder, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(folder, name)
            st = path.lstat()
            data = b""
            if stat.S_ISREG(st.st_mode):
                data = path.read_bytes()
            elif stat.S_ISLNK(st.st_mode):
                data = os.fsencode(os.readlink(path))
            number = numbers.setdefault((st.st_dev, st.st_ino), len(numbers))
            model.names[str(path.relative_to(root))] = number
            model.objects[number] = Object(stat.S_IFMT(st.st_mode), stat.S_IMODE(st.st_mode), data)
    return model


Operation = tuple[str, Callable[[], object], Model]


class Walk:
    """A random walk of operations through one directory, its model kept beside it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.dice = random.Random(seed)
        self.done = read_model(root)
        self.pending: Model | None = None
        self.last = "nothing"
        self.count = 0
        self.error: OSError | None = None
        self.serial = 0

    def run(self) -> None:
        """Go on until the filesystem is lost; then `pending` is what the operation under way would have made."""
        try:
            while True:
                self.step()
        except OSError as error:
            self.error = error

    def step(self) -> None:
        """One operation; if it fails, `done` stays as it was."""
        self.last, act, self.pending = self._choose()
        act()
        self.done, self.pending = self.pending, None
        self.count += 1

    def _choose(self) -> Operation:
        while True:
            name, make = self.dice.choice(_OPERATIONS)
            with contextlib.suppress(IndexError, KeyError):
                model = self.done.copy()
                return name, make(self, model), model

    def path(self, relative: str) -> str:
        return os.path.join(self.root, relative)

    def pick(self, *kinds: int) -> str:
        return self.dice.choice([path for kind in kinds for path in self.done.of_kind(kind)])

    def fresh(self) -> str:
        """A free name in some directory."""
        self.serial += 1
        folder = self.dice.choice([*self.done.of_kind(stat.S_IFDIR), ""])
        return os.path.join(folder, f"n{self.serial}")

    def bytes(self, most: int) -> bytes:
        return self.dice.randbytes(self.dice.randrange(1, most))


def _overwrite(walk: Walk, model: Model) -> Callable[[], object]:
    path, data = walk.pick(stat.S_IFREG), walk.bytes(4000)
    old = model.objects[model.names[path]].data
    model.change(path, data=data + old[len(data) :])

    def act() -> None:
        descriptor = os.open(walk.path(path), os.O_WRONLY)
        try:
            written = os.pwrite(descriptor, data, 0)
            model.change(path, data=data[:written] + old[written:])
        finally:
            os.close(descriptor)

    return act


def _truncate(walk: Walk, model: Model) -> Callable[[], object]:
    path, size = walk.pick(stat.S_IFREG), walk.dice.randrange(3000)
    data = model.objects[model.names[path]].data
    model.change(path, data=data[:size].ljust(size, b"\0"))
    return lambda: os.truncate(walk.path(path), size)


def _create(walk: Walk, model: Model) -> Callable[[], object]:
    path = walk.fresh()
    model.add(path, Object(stat.S_IFREG, 0o600))
    return lambda: os.close(os.open(walk.path(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _mkdir(walk: Walk, model: Model) -> Callable[[], object]:
    path = walk.fresh()
    model.add(path, Object(stat.S_IFDIR, 0o700))
    return lambda: os.mkdir(walk.path(path), 0o700)


def _symlink(walk: Walk, model: Model) -> Callable[[], object]:
    path = walk.fresh()
    model.add(path, Object(stat.S_IFLNK, 0o777, b"target"))
    return lambda: os.symlink("target", walk.path(path))


def _unlink(walk: Walk, model: Model) -> Callable[[], object]:
    path = walk.pick(stat.S_IFREG, stat.S_IFLNK)
    if len(model.names) < 12:
        raise KeyError
    del model.names[path]
    return lambda: os.unlink(walk.path(path))


def _rmdir(walk: Walk, model: Model) -> Callable[[], object]:
    path = walk.pick(stat.S_IFDIR)
    if any(other.startswith(path + "/") for other in model.names):
        raise KeyError
    del model.names[path]
    return lambda: os.rmdir(walk.path(path))


def _rename(walk: Walk, model: Model) -> Callable[[], object]:
    old, new = walk.pick(stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK), walk.fresh()
    if new.startswith(old + "/"):
        raise KeyError
    model.move(old, new)
    return lambda: os.rename(walk.path(old), walk.path(new))


def _replace(walk: Walk, model: Model) -> Callable[[], object]:
    old, new = walk.pick(stat.S_IFREG), walk.pick(stat.S_IFREG)
    if model.names[old] != model.names[new]:
        model.names[new] = model.names.pop(old)
    return lambda: os.rename(walk.path(old), walk.path(new))


def _exchange(walk: Walk, model: Model) -> Callable[[], object]:
    one, other = walk.pick(stat.S_IFREG), walk.pick(stat.S_IFREG)
    model.names[one], model.names[other] = model.names[other], model.names[one]
    return lambda: renameat2(os.fsencode(walk.path(one)), os.fsencode(walk.path(other)), RENAME_EXCHANGE)


def _link(walk: Walk, model: Model) -> Callable[[], object]:
    old, new = walk.pick(stat.S_IFREG), walk.fresh()
    model.names[new] = model.names[old]
    return lambda: os.link(walk.path(old), walk.path(new))


def _chmod(walk: Walk, model: Model) -> Callable[[], object]:
    path, mode = walk.pick(stat.S_IFREG, stat.S_IFDIR), walk.dice.choice((0o700, 0o711, 0o755))
    model.change(path, mode=mode)
    return lambda: os.chmod(walk.path(path), mode)


_OPERATIONS: list[tuple[str, Callable[[Walk, Model], Callable[[], object]]]] = [
    ("overwrite", _overwrite),
    ("truncate", _truncate),
    ("create", _create),
    ("mkdir", _mkdir),
    ("symlink", _symlink),
    ("unlink", _unlink),
    ("rmdir", _rmdir),
    ("rename", _rename),
    ("replace", _replace),
    ("exchange", _exchange),
    ("link", _link),
    ("chmod", _chmod),
]

"""Fuzz the wire reader: sequences of requests, near to valid ones, against a session on layers of its own.

    python -m tests.native.fuzz --seconds 600 [--seed 7]    guided by coverage, until an input fails
    python -m tests.native.fuzz --inputs 300 [--seed 7]     the same inputs each time
    python -m tests.native.fuzz FILE...                     inputs that were kept

With --ring, requests come as through a ring instead of over /dev/fuse.

An input is a string of bytes; every choice (which request, which field, which value) is read from it, so an input that
fails is a file to keep. Inputs come from atheris, which is guided by the Python code of the core: how far a request
came shows in the lines it ran there. The compiled reader itself has no counters, as the build would need clang for
them; it is watched under `tools/sanitized` instead. Fixed inputs, as the test suite has them, come from a seeded
generator, as atheris gives no two runs the same; and so do all inputs under `tools/sanitized`, as the sanitizer's
library takes the calls that the counters are to be told by.

An input fails where an answer is missing, doubled or of the wrong form or size, where the session logs a traceback,
doesn't end or leaves a descriptor open, and where a lower layer was changed. What is served can reach no file but those
in a tmpfs of its own: all other mounts are read-only for this process.
"""

import argparse
import gc
import itertools
import logging
import os
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from overlayfs_py.config import MS_NOATIME
from tests.native import messages, wire
from tests.native.messages import Message
from tests.native.wire import Wire, WrongAnswer, served
from tests.support.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    umount,
    unshare,
)

INPUT_SIZE: Final = 4096
_BURST: Final = 4
_MOST_REQUESTS: Final = 100
_NUMBERS: Final = (
    *(0, 1, 2, 3, 7, 8, 16, 18, 39, 40, 255, 256, 4095, 4096, 65535, 65536, 65537, 0o100644, 0o020000, 1 << 20),
    *(
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        (1 << 62),
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 4096,
        (1 << 64) - 1,
    ),
)
_NAMES: Final = (
    *(b"f", b"u", b"d", b"l", b"p", b"c", b"n", b"m", b"s", b"r", b"h", b"above", b"below", b"new", b"", b".", b".."),
    *(
        b".wh.f",
        b".wh..wh..opq",
        b"user.key",
        b"security.capability",
        b"trusted.overlay.opaque",
        b"\xff\xfe",
        b"n" * 255,
    ),
    *(b"n" * 256, b"system.posix_acl_access", b"user." + b"k" * 251),
)
_MAKERS: Final = (wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.TMPFILE)
_SURVIVED: Final = ()


class Choices:
    """Decisions read from an input; nought when it is used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def left(self) -> bool:
        return self.at < len(self.data)

    def number(self, below: int) -> int:
        """From 0 up to, without, `below`, which is at most 65536."""
        size = 1 if below <= 256 else 2
        value = int.from_bytes(self.data[self.at : self.at + size], "little")
        self.at += size
        return value % below

    def pick(self, values: Sequence[Any]) -> Any:
        return values[self.number(len(values))]

    def bytes(self, length: int) -> bytes:
        taken = self.data[self.at : self.at + length]
        self.at += length
        return taken


class _Tracebacks(logging.Handler):
    """What the engine logged with a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not isinstance(record.exc_info[1], _SURVIVED):
            self.found.append(self.format(record))


class Fuzzer:
    """Plays one input after the other, each on a new stack of layers in `scratch`."""

    def __init__(self, scratch: Path, *, ring: bool) -> None:
        self.scratch = scratch
        self.ring = ring
        self.tracebacks = _Tracebacks()
        engine = logging.getLogger("overlayfs_py")
        engine.addHandler(self.tracebacks)
        engine.propagate = False

    def play(self, data: bytes) -> None:
        """Play one input; raises WrongAnswer where it fails."""
        choices = Choices(data)
        opened = _descriptors()
        base = self.scratch / "layers"
        base.mkdir()
        # What an input leaves, be it immutable, goes with the filesystem.
        mount(b"tmpfs", bytes(base), b"tmpfs", 0, b"size=8m")
        try:
            messages.lay_out(base)
            before = _tree(base / "lower")
            flags2 = choices.pick((1, 0xFFFFFFFF))
            with served(base, ring=self.ring, flags2=flags2, **mount_options(choices)) as client:
                seeds = messages.valid(client)
                nodes = sorted({message.node for message in seeds})
                for _ in range(_MOST_REQUESTS):
                    if not choices.left():
                        break
                    self._burst(client, choices, seeds, nodes)
                client.serves()
            if _tree(base / "lower") != before:
                raise WrongAnswer("a lower layer was changed")
        finally:
            umount(bytes(base), MNT_DETACH)
            base.rmdir()
        if _descriptors() > opened:
            # What only a cycle holds is closed with it; a descriptor that was lost is not.
            gc.collect()
        if _descriptors() > opened:
            raise WrongAnswer(f"descriptors left open: {_descriptors() - opened}")
        if self.tracebacks.found:
            raise WrongAnswer("\n".join(self.tracebacks.found))

    def _burst(self, client: Wire, choices: Choices, seeds: list[Message], nodes: list[int]) -> None:
        """Send a few requests at once, then take what answers there have to be."""
        expected: dict[int, Message] = {}
        for _ in range(1 + choices.number(_BURST)):
            message = mutated(choices, choices.pick(seeds), nodes)
            header = lies(choices, message)
            packed = client.pack(message.opcode, message.node, message.body, **header)
            cut = choices.number(40) if choices.number(64) == 0 else len(packed)
            if self.ring:
                # A place in a ring is never cut.
                cut = len(packed)
            if cut == 0:
                # An empty message is the end of the connection.
                continue
            client.send(packed[:cut])
            if message.opcode not in client.unanswered and cut == len(packed):
                expected[client.unique] = message
        while expected:
            raw = client.receive()
            (unique,) = struct.unpack_from("=Q", raw, 8)
            if unique not in expected:
                raise WrongAnswer(f"an answer to request {unique}, which nobody waits for")
            message = expected.pop(unique)
            answer = wire.parse(raw, unique)
            wire.check_size(message.opcode, message.body, answer)
            if message.opcode in (wire.READDIR, wire.READDIRPLUS):
                wire.entries(answer.body, plus=message.opcode == wire.READDIRPLUS)
            elif wire.SIZES.get(message.opcode) in (128, 144) and answer.error == 0:
                nodes.append(struct.unpack_from("=Q", answer.body)[0])


def mount_options(choices: Choices) -> dict[str, Any]:
    """Those of MountConfig that choose how requests are served."""
    options: dict[str, Any] = {
        "max_write": choices.pick((4096, 65536, None)),
        "security_label": choices.number(2) == 0,
        # What mounts have by default, and what every second input is served with.
        "mount_flags": choices.pick((MS_NOATIME, 0)),
        "io": choices.pick(("cached", "cached", "passthrough")),
    }
    for name, value in (
        *(("timeout", 1.5), ("noxattrs", True), ("noacl", True), ("allow_root", True), ("default_permissions", True)),
        *(("metacopy", True), ("squash_uid", 5), ("xattr_permissions", 2), ("static_nlink", True)),
        *(("nfs_export", True), ("request_timeout", 9), ("readdirplus", "auto")),
    ):
        if choices.number(8) == 0:
            options[name] = value
    return options


def mutated(choices: Choices, message: Message, nodes: list[int]) -> Message:
    """A request made from a valid one: the same, or other in its node, numbers, names or bytes."""
    opcode, node, body = message.opcode, message.node, bytearray(message.body)
    kind = choices.number(8)
    if kind & 1:
        node = choices.pick(nodes) if choices.number(8) else choices.pick(_NUMBERS)
    if kind & 2:
        for _ in range(1 + choices.number(3)):
            layout = choices.pick(("=I", "=Q"))
            size = struct.calcsize(layout)
            if len(body) >= size:
                value = choices.pick(nodes) if choices.number(4) == 0 else choices.pick(_NUMBERS)
                at = 4 * choices.number(max(1, min(len(body), 96) // 4))
                if at + size <= len(body):
                    struct.pack_into(layout, body, at, value & (1 << 8 * size) - 1)
    if kind & 4:
        change = choices.number(6)
        at = choices.number(len(body) + 1)
        if change == 0:
            del body[at:]
        elif change == 1:
            body[at:at] = choices.bytes(choices.number(32))
        elif change == 2:
            body += choices.pick(_NAMES) + b"\0"
        elif change == 3 and body.endswith(b"\0"):
            start = body.rstrip(b"\0").rfind(b"\0") + 1
            body[start:] = choices.pick(_NAMES) + b"\0"
        elif change == 4:
            opcode = choices.number(64)
        elif at < len(body):
            body[at] ^= 1 << choices.number(8)
    return Message(opcode, node, bytes(body))


def lies(choices: Choices, message: Message) -> dict[str, Any]:
    """What the header says that is not so, and who asks."""
    header: dict[str, Any] = {"uid": choices.pick((0, 0, 0, 1000, (1 << 32) - 1))}
    if choices.number(16) == 0:
        header["length"] = choices.pick(_NUMBERS) & 0xFFFFFFFF
    if choices.number(16) == 0:
        header["units"] = choices.pick(_NUMBERS) & 0xFFFF
    elif choices.number(16) == 0:
        header["extensions"] = bytes(8 * choices.number(8))
    elif message.opcode in _MAKERS and choices.number(2) == 0:
        header["extensions"] = extensions(choices)
    return header


def extensions(choices: Choices) -> bytes:
    """Labels and other extensions, most of them with something wrong."""
    keys = (
        b"security.selinux",
        b"security.other",
        b"user.key",
        b"trusted.overlay.opaque",
        b"",
        b"security." + b"k" * 250,
    )
    packed = bytearray()
    for _ in range(1 + choices.number(2)):
        inner = [
            messages.label(choices.pick(keys), choices.bytes(choices.number(40))) for _ in range(choices.number(3))
        ]
        packed += messages.labels(*inner) if choices.number(3) else struct.pack("=IIII", 16, 32, 1, 7)
    if choices.number(2):
        struct.pack_into("=I", packed, 4 * choices.number(len(packed) // 4), choices.pick(_NUMBERS) & 0xFFFFFFFF)
    return bytes(packed)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _tree(top: Path) -> list[tuple[str, int, int, bytes]]:
    found = []
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((str(path), st.st_mode, st.st_mtime_ns, data))
    return found


def confine(scratch: Path) -> None:
    """Have this process find every mount read-only, but for a tmpfs on `scratch`, and where a sanitizer reports to."""
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    targets = [line.split(b" ")[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]
    reports = re.search(rb"log_path=([^:]*)/", os.environb.get(b"ASAN_OPTIONS", b""))
    if reports is not None:
        mount(reports[1], reports[1], None, MS_BIND)
    for target in targets:
        plain = target.replace(b"\\040", b" ")
        if plain.startswith((b"/proc/", b"/sys/")) or not os.path.isdir(plain):
            continue
        mount(b"none", plain, None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    mount(b"tmpfs", bytes(scratch), b"tmpfs", 0, b"size=1m")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.native.fuzz", description="Fuzz the wire reader.")
    parser.add_argument("--seconds", type=int, help="how long to fuzz, guided by coverage")
    parser.add_argument("--inputs", type=int, default=0, help="how many fixed inputs to play")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ring", action="store_true", help="have requests come as through a ring")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="inputs to play")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="overlayfs-py-fuzz-") as directory:
        scratch, failed = Path(directory, "scratch"), Path(directory, "failed")
        scratch.mkdir()
        failed.touch()
        # The mounts are read-only for good in a process that has made them so, which could then remove nothing.
        child = os.fork()
        if child == 0:
            _fuzz(asked, scratch, failed)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if failed.stat().st_size:
            kept = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}.input")
            shutil.copyfile(failed, kept)
            print(f"the input that failed: {kept}", file=sys.stderr)
    return status


def _fuzz(asked: argparse.Namespace, scratch: Path, failed: Path) -> NoReturn:
    """Play what is asked for, and end the process with 1 where an input fails."""
    inputs = [file.read_bytes() for file in asked.files]
    inputs += itertools.islice(generated(asked.seed), asked.inputs)
    # Opened while it still can be.
    with failed.open("r+b", buffering=0) as sink:
        confine(scratch)
        fuzzer = Fuzzer(scratch, ring=asked.ring)

        def play(data: bytes) -> None:
            # Written first: an input may end the process.
            sink.seek(0)
            sink.truncate()
            sink.write(data)
            fuzzer.play(data)
            sink.truncate(0)

        status = 1
        try:
            for data in inputs:
                play(data)
            if asked.seconds and "libasan" in os.environ.get("LD_PRELOAD", ""):
                deadline = time.monotonic() + asked.seconds
                for data in itertools.takewhile(lambda _: time.monotonic() < deadline, generated(asked.seed)):
                    play(data)
            elif asked.seconds:
                guided(play, asked.seconds, asked.seed)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            # Never back into what the parent was doing.
            os._exit(status)


def generated(seed: int) -> Iterator[bytes]:
    """Inputs without end, the same for a seed each time."""
    generator = random.Random(seed)
    while True:
        yield generator.randbytes(generator.randrange(INPUT_SIZE))


def guided(play: Callable[[bytes], None], seconds: int, seed: int) -> None:
    """Have atheris choose the inputs; doesn't return."""
    import atheris

    for name, module in sorted(sys.modules.items()):
        if name.startswith("overlayfs_py.core") and getattr(module, "__file__", "").endswith(".py"):
            for function in vars(module).values():
                if getattr(function, "__module__", None) == name and hasattr(function, "__code__"):
                    atheris.instrument_func(function)
    settings = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={INPUT_SIZE}",
        "-len_control=0",
        "-timeout=60",
    ]
    atheris.Setup(["fuzz", *settings], play)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the native engine does while one request comes right after the other, and that it ends."""

import contextlib
import fcntl
import os
import resource
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs_py.cli.doctor import examine
from overlayfs_py.engines import machine
from tests.conftest import Layers
from tests.native.messages import lay_out
from tests.native.wire import Wire, served
from tests.support.mounts import layer_options, our_mount
from tests.support.syscalls import umount
from tests.support.waiting import wait_until

NO_LIMIT = -1
_LIMIT = 60.0
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of /dev/cpu_dma_latency: what the kernel would be told, one number after another."""
    file = tmp_path / "cpu_dma_latency"
    file.touch()
    monkeypatch.setattr(machine, "CPU_LATENCY", os.fspath(file))
    return file


def numbers(told: Path) -> list[int]:
    return [value for (value,) in struct.iter_unpack("=i", told.read_bytes())]


@pytest.fixture
def client(tmp_path: Path, told: Path) -> Iterator[Wire]:
    lay_out(tmp_path)
    with served(tmp_path, cpu_latency="on") as connected:
        yield connected


def ask_until_told(client: Wire, told: Path, count: int) -> None:
    """One request after the other until the kernel has been told so often; the machine may be busy with others."""

    def asked() -> bool:
        for _ in range(200):
            client.serves()
        return len(numbers(told)) >= count

    wait_until(asked, _LIMIT)


def test_the_kernel_is_told_when_requests_follow_one_another_and_when_they_no_longer_do(
    client: Wire, told: Path
) -> None:
    for round_ in range(1, 4):
        ask_until_told(client, told, 2 * round_ - 1)
        wait_until(lambda: numbers(told)[-1] == NO_LIMIT, _LIMIT)
    # More often where the machine was busy with others, but by turns in any case.
    found = numbers(told)
    assert found == [0, NO_LIMIT] * (len(found) // 2) and len(found) >= 6


def test_requests_that_come_slowly_change_nothing(client: Wire, told: Path) -> None:
    for _ in range(40):
        client.serves()
        time.sleep(0.005)
    assert numbers(told) == []


def test_the_end_takes_it_back(tmp_path: Path, told: Path) -> None:
    lay_out(tmp_path)
    with served(tmp_path, cpu_latency="on") as client:
        ask_until_told(client, told, 1)
    assert numbers(told)[-1] == NO_LIMIT


@pytest.mark.parametrize(
    ("driver", "processors", "wanted", "opened"),
    [
        ("haltpoll\n", 2, "auto", True),
        ("haltpoll\n", 16, "auto", True),
        ("haltpoll\n", 17, "auto", False),
        ("intel_idle\n", 2, "auto", False),
        ("none\n", 2, "auto", False),
        (None, 2, "auto", False),
        ("haltpoll\n", 2, "off", False),
        ("intel_idle\n", 64, "on", True),
    ],
)
def test_the_device_is_opened_where_processors_halt_and_are_few(
    tmp_path: Path,
    told: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str | None,
    processors: int,
    wanted: str,
    opened: bool,
) -> None:
    named = tmp_path / "current_driver"
    if driver is not None:
        named.write_text(driver)
    monkeypatch.setattr(machine, "IDLE_DRIVER", os.fspath(named))
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    fd = machine.open_latency(wanted)
    assert (fd >= 0) == opened
    if opened:
        os.close(fd)


def test_without_the_device_auto_does_without_and_on_says_so(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "current_driver"
    named.write_text("haltpoll\n")
    monkeypatch.setattr(machine, "IDLE_DRIVER", os.fspath(named))
    told.unlink()
    assert machine.open_latency("auto") == -1
    with pytest.raises(FileNotFoundError):
        machine.open_latency("on")
    told.mkdir()
    assert machine.open_latency("auto") == -1
    with pytest.raises(IsADirectoryError):
        machine.open_latency("on")


def test_a_mount_that_must_keep_processors_awake_is_refused_in_one_line_where_it_can_not(layers: Layers) -> None:
    options = layer_options([layers.lower], layers.upper, layers.work, "cpu_latency=on")
    command = [sys.executable, "-m", "overlayfs_py", "-o", os.fsdecode(options), os.fspath(layers.mnt)]
    hidden = layers.base / "nothing"
    os.mknod(hidden, 0o600)
    script = f'mount --bind {hidden} {machine.CPU_LATENCY} && chattr +i {hidden} && exec "$@"'
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *command], capture_output=True, text=True, timeout=_LIMIT
        )
    finally:
        subprocess.run(["chattr", "-i", hidden], check=True, timeout=_LIMIT)
    assert done.returncode == 32
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(
        f"cpu_latency=on: {machine.CPU_LATENCY}: Operation not permitted; use cpu_latency=auto\n"
    )


def open_files(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # one that it has just closed
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry))
    return found


@pytest.mark.parametrize(("option", "held"), [("cpu_latency=on", True), ("cpu_latency=off", False)])
def test_a_mount_holds_the_device_itself(layers: Layers, option: str, held: bool) -> None:
    with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, option) as live:
        assert (machine.CPU_LATENCY in open_files(live.pid)) == held
        (layers.mnt / "f").write_text("served")
        assert (layers.upper / "f").read_text() == "served"


def test_the_doctor_tells_that_busy_mounts_keep_processors_awake(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("IDLE_DRIVER", "haltpoll\n"), ("HALT_POLLING", "0\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(machine, name, os.fspath(tmp_path / name))
    report = examine()[0]
    assert "halt at once, but stay awake while a mount is busy (cpu_latency)\n" in report
    assert os.fspath(tmp_path / "HALT_POLLING") not in report
    told.unlink()
    report = examine()[0]
    assert "halt at once\n" in report
    assert f"-> echo 200000 > {tmp_path / 'HALT_POLLING'}\n" in report


@contextlib.contextmanager
def hammer(mnt: Path) -> Iterator[Callable[[], int]]:
    """One look-up of a missing name after the other; the function yielded tells how many there were."""
    count = 0
    ended = threading.Event()

    def look_up() -> None:
        nonlocal count
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError):
                os.stat(mnt / f"missing{count}")
            count += 1

    looking = threading.Thread(target=look_up)
    looking.start()
    try:
        yield lambda: count
    finally:
        ended.set()
        looking.join(_LIMIT)
    assert not looking.is_alive()


def goes_on(looked_up: Callable[[], int]) -> None:
    wanted = looked_up() + 500
    wait_until(lambda: looked_up() >= wanted, _LIMIT)


@contextlib.contextmanager
def own_disk(layers: Layers) -> Iterator[Path]:
    """A directory on a disk of its own, which can be frozen: whoever writes to it then waits."""
    image, disk = layers.base / "image", layers.add("disk")
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=_LIMIT)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True, timeout=_LIMIT)
    try:
        yield disk
    finally:
        umount(os.fsencode(disk))


@contextlib.contextmanager
def frozen(disk: Path) -> Iterator[None]:
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("cpu_latency", ["on", "off"])
@pytest.mark.parametrize("writers", [1, 6])
def test_those_that_wait_for_their_disk_keep_nobody_else_waiting(
    layers: Layers, writers: int, cpu_latency: str, processors: int
) -> None:
    """While requests come right after one another one thread fetches them all, and each may be one that has to wait."""
    cpus = os.sched_getaffinity(0)
    with own_disk(layers) as disk, contextlib.ExitStack() as stack:
        upper, work = disk / "upper", disk / "work"
        upper.mkdir()
        work.mkdir()
        names = [f"f{number}" for number in range(writers)]
        for name in names:
            (upper / name).write_bytes(b"before")
        os.sched_setaffinity(0, sorted(cpus)[:processors])
        try:
            options = f"cpu_latency={cpu_latency},uring=off"
            stack.enter_context(our_mount(layers.mnt, [layers.lower], upper, work, options))
        finally:
            os.sched_setaffinity(0, cpus)
        files = [stack.enter_context((layers.mnt / name).open("r+b", buffering=0)) for name in names]
        threads = [threading.Thread(target=file.write, args=(b"behind",)) for file in files]
        # Twice, as those that helped are to help again.
        for _ in range(2):
            with hammer(layers.mnt) as looked_up:
                with frozen(disk):
                    goes_on(looked_up)
                    for thread in threads:
                        thread.start()
                    time.sleep(0.1)
                    goes_on(looked_up)
                    assert all(thread.is_alive() for thread in threads)
                for thread in threads:
                    thread.join(_LIMIT)
                    assert not thread.is_alive()
            assert {(upper / name).read_bytes() for name in names} == {b"behind"}
            for file in files:
                file.seek(0)
            threads = [threading.Thread(target=file.write, args=(b"behind",)) for file in files]


def test_a_helper_that_can_not_be_begun_is_begun_later(layers: Layers) -> None:
    with own_disk(layers) as disk, contextlib.ExitStack() as stack:
        upper, work = disk / "upper", disk / "work"
        upper.mkdir()
        work.mkdir()
        names = [f"f{number}" for number in range(4)]
        for name in names:
            (upper / name).write_bytes(b"before")
        options = "cpu_latency=off,uring=off"
        live = stack.enter_context(our_mount(layers.mnt, [layers.lower], upper, work, options))
        assert live.log is not None
        log = live.log
        files = [stack.enter_context((layers.mnt / name).open("r+b", buffering=0)) for name in names]
        for file in files:
            # so that it is held open
            file.write(b"before")
        threads = [threading.Thread(target=file.write, args=(b"behind",)) for file in files]
        with hammer(layers.mnt) as looked_up:
            with frozen(disk):
                goes_on(looked_up)
                # 0 would keep poll(2) from working, too.
                resource.prlimit(live.pid, resource.RLIMIT_NOFILE, (1, 4096))
                for thread in threads:
                    thread.start()
                wait_until(lambda: "there is no further one" in log.read_text(), _LIMIT)
                time.sleep(0.1)
                assert log.read_text().count("there is no further one") == 1
                resource.prlimit(live.pid, resource.RLIMIT_NOFILE, (1024, 4096))
                goes_on(looked_up)
            for thread in threads:
                thread.join(_LIMIT)
                assert not thread.is_alive()
        assert [(upper / name).read_bytes() for name in names] == [b"beforebehind"] * len(names)


def test_a_busy_mount_ends_when_it_is_unmounted(layers: Layers) -> None:
    """Also those threads that stand by while another one fetches all requests."""
    for _ in range(5):
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, "cpu_latency=on"):
            with hammer(layers.mnt) as looked_up:
                wait_until(lambda: looked_up() > 300, _LIMIT)

"""Many at once, and monitors, daemons and commands that are killed at any moment."""

import contextlib
import os
import random
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from overlayfs_py.runtime.state import removing
from tests.runtime.conftest import Ovl, left_of, within
from tests.support.syscalls import MNT_DETACH, MS_BIND, mount, umount

RUN = ("run", "--network", "none", "-u", "root")
MANY = 20


def descendants(pid: int) -> set[int]:
    """All processes below one, but its zombies."""
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found |= {int(name)} | descendants(int(name))
    return found


def test_many_containers_at_once(ovl: Ovl) -> None:
    before = {path.name for path in (ovl.root / "layers").rglob("*")}
    script = "echo $0 > /file; cat /file; sleep 0.3; cat /file"
    processes = [
        ovl.start(*RUN, "--name", f"many-{number}", "busy", "sh", "-c", script, str(number), stdout=subprocess.PIPE)
        for number in range(MANY)
    ]
    for number, process in enumerate(processes):
        out = process.communicate(timeout=90)[0]
        assert (process.returncode, out) == (0, f"{number}\n{number}\n".encode())
    assert {row["Name"] for row in ovl.rows()} == {f"many-{number}" for number in range(MANY)}
    assert {path.name for path in (ovl.root / "layers").rglob("*")} == before
    ovl.run("rm", *(f"many-{number}" for number in range(MANY)))
    assert left_of(ovl.root) == []


def test_a_container_that_is_being_removed_is_left_to_who_does_it(ovl: Ovl) -> None:
    grave = ovl.root / "containers.tmp" / "grave"
    (grave / "upper").mkdir(parents=True)
    with removing(grave):
        ovl.run("create", "--name", "made", "busy")
        assert os.listdir(grave) == ["upper"]
    ovl.run("create", "busy")
    assert not grave.exists()


def test_one_name_is_taken_once(ovl: Ovl) -> None:
    processes = [ovl.start("create", "--name", "wanted", "busy", stderr=subprocess.DEVNULL) for _ in range(5)]
    assert sorted(process.wait(60) for process in processes) == [0, 125, 125, 125, 125]
    assert [row["Name"] for row in ovl.rows()] == ["wanted"]


@pytest.mark.parametrize("seed", range(5))
def test_a_monitor_killed_at_any_moment_leaves_nothing_running(ovl: Ovl, seed: int) -> None:
    delay = random.Random(seed).uniform(0, 0.25)
    words = ("--network", "none", "--name", "victim", "-u", "root", "busy", "sh", "-c", "echo a > /new; sleep 60")
    ovl.run("create", *words)
    process = ovl.start("start", "victim", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    home = ovl.home("victim")
    assert within(20, lambda: (home / "status.json").exists())
    time.sleep(delay)
    monitor = ovl.status("victim")["monitor"]
    if monitor is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(monitor["pid"], signal.SIGKILL)
    process.wait(30)
    assert ovl.row("victim")["State"] == "exited"
    table = Path("/proc/self/mountinfo").read_text()
    assert f"{home}/" not in table
    assert not list(Path("/sys/fs/cgroup").glob(f"*/ovl-{home.name}"))
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and cgroup_of(pid).endswith(f"ovl-{home.name}")]
    ovl.run("start", "victim")
    assert ovl.out("exec", "victim", "cat", "/new") == "a\n"


def cgroup_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cgroup").read_text().splitlines()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_monitor_that_is_killed_takes_one_to_be_removed_with_it(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--rm", "--name", "brief", "busy", "sleep", "60")
    client = ovl.start("attach", "brief", stderr=subprocess.PIPE)
    assert within(
        20, lambda: any(os.path.realpath(fd).count("socket:") for fd in Path(f"/proc/{client.pid}/fd").iterdir())
    )
    os.kill(ovl.status("brief")["monitor"]["pid"], signal.SIGKILL)
    assert client.communicate(timeout=20)[1].startswith(b"ovl: the monitor of the container was killed")
    assert client.returncode == 137
    assert ovl.rows() == []
    assert left_of(ovl.root) == []


def test_a_mount_daemon_that_is_killed_ends_with_its_container(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--name", "headless", "busy", "sleep", "60")
    os.kill(ovl.status("headless")["daemon"]["pid"], signal.SIGKILL)
    assert ovl.out("wait", "headless") == "137\n"
    assert ovl.row("headless")["State"] == "exited"
    assert ovl.out("inspect", "-f", "{{.State.Error}}", "headless") == "the process that serves its root has ended\n"
    ovl.run("start", "headless")
    assert ovl.out("exec", "headless", "cat", "/file") == "of the image\n"


@pytest.mark.parametrize("seed", range(3))
def test_a_command_killed_at_any_moment_leaves_a_container_or_none(ovl: Ovl, seed: int) -> None:
    process = ovl.start(*RUN, "-d", "--name", "cut", "busy", "sleep", "60", stdout=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.1, 0.5))
    process.kill()
    process.wait()
    for row in ovl.rows():
        assert within(10, lambda: ovl.row("cut")["State"] != "starting"), row
    ovl.run("rm", "-f", "cut", status=None)
    ovl.run(*RUN, "--rm", "--name", "cut", "busy", "true")
    assert left_of(ovl.root) == []


def test_a_machine_without_fuse_is_one_line(ovl: Ovl) -> None:
    ovl.run("create", "--name", "made", "busy")
    device = ovl.base / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 254))
    mount(bytes(device), b"/dev/fuse", None, MS_BIND)
    try:
        for words, status in (((*RUN, "busy"), 125), (("start", "made"), 1), (("cp", "made:/file", "."), 1)):
            assert "the kernel offers no /dev/fuse" in ovl.error(*words, status=status), words
        assert [row["Name"] for row in ovl.rows()] == ["made"]
    finally:
        umount(b"/dev/fuse", MNT_DETACH)
    ovl.run("cp", "made:/file", ".")
    assert (ovl.base / "file").read_text() == "of the image\n"


def test_layers_are_on_disk_once_whatever_the_number_of_containers(ovl: Ovl) -> None:
    def taken() -> int:
        done = subprocess.run(["du", "-skx", ovl.root], check=True, capture_output=True, text=True)
        return int(done.stdout.split()[0])

    before = taken()
    layers = int(subprocess.run(["du", "-skx", ovl.root / "layers"], capture_output=True, text=True).stdout.split()[0])
    assert layers > 1500
    for number in range(4):
        ovl.run(*RUN, "-d", "--name", f"one-{number}", "busy", "sh", "-c", "echo a > /new; sleep 60")
    assert all(within(10, (ovl.home(f"one-{number}") / "upper/new").exists) for number in range(4))
    ovl.run("tag", "busy", "again")
    assert taken() - before < layers / 4
    ovl.run("rm", "-f", *(f"one-{number}" for number in range(4)))
    assert taken() - before < 100


def test_a_missing_runtime_is_one_line(ovl: Ovl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVL_RUNTIME", "nosuch")
    assert "there is no OCI runtime nosuch on PATH" in ovl.error(*RUN, "busy", status=125)
    assert ovl.rows() == []

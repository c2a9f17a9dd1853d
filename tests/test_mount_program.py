"""The program `overlayfs-py`: how it is called, what it says, and that a failure leaves nothing behind."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from overlayfs_py import __version__
from overlayfs_py.cli.mount_program import SWITCHES, help_text, parse_command_line
from overlayfs_py.config import IGNORED, OPTIONS
from overlayfs_py.errors import ConfigError
from tests.conftest import Checkout, Layers
from tests.support.mounts import REPOSITORY, AnyPath, kernel_mount, layer_options, mounted_at, unmount
from tests.support.syscalls import MS_BIND, mount, umount
from tests.support.waiting import wait_until

_LIMIT: Final = 30  # seconds for anything the program does
_PROGRAM: Final = (sys.executable, "-m", "overlayfs_py")
_NOBODY: Final = 65534
_MANUAL: Final = REPOSITORY / "docs" / "overlayfs-py.8"

# A program in which the core and the engine are replaced by the two functions that a test defines.
_WITH_FAKE_ENGINE: Final = """
import os, sys, time
from overlayfs_py import mounting
from overlayfs_py.cli import mount_program
from overlayfs_py.errors import LayerError

class Fake:
    def close(self):
        pass

def open_overlay(config):
    return Fake()

{definitions}

mounting.ANSWER_LIMIT = {answer_limit}
mounting._load = lambda config: mounting._Engine(open_overlay, lambda config: {root_name!r}, serve)
sys.exit(mount_program.main())
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), **more}


def call(
    arguments: Sequence[AnyPath],
    *,
    program: Sequence[str] = _PROGRAM,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, and on until nobody holds its standard output or error any more."""
    return subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        env=env or environment(),
        pass_fds=pass_fds,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=_LIMIT,
        check=False,
    )


def stack(layers: Layers, options: str | bytes = "") -> list[AnyPath]:
    """Arguments that mount the usual layers on the usual mountpoint."""
    return ["-o", layer_options([layers.lower], layers.upper, layers.work, options), layers.mnt]


def holders(word: AnyPath) -> list[int]:
    """Processes that have the word among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(word) in (entry / "cmdline").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def daemon_of(mountpoint: AnyPath) -> int:
    [pid] = holders(mountpoint)
    return pid


def reap(pid: int) -> int:
    """The exit status of a daemon, which this process adopted."""
    deadline = time.monotonic() + _LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError(f"process {pid} does not end")


@contextlib.contextmanager
def mounted(
    arguments: Sequence[AnyPath], mountpoint: Path, *, program: Sequence[str] = _PROGRAM, cwd: Path | None = None,
    env: dict[str, str] | None = None, status: int = 0,
) -> Iterator[int]:  # fmt: skip
    """The program's mount in the background and its daemon's pid; unmounted at the end, when the daemon ends too."""
    before = _children()
    done = call(arguments, program=program, cwd=cwd, env=env)
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        [pid] = _children() - before
        yield pid
    finally:
        if mounted_at(mountpoint) is not None:
            unmount(mountpoint)
    assert reap(pid) == status


def _children() -> set[int]:
    """Processes that this one started or adopted, except those that have ended."""
    pids = {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    return {pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"}


def mount_line(mountpoint: Path) -> str:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split(" ")[1] == os.fspath(mountpoint):
            return line
    raise AssertionError("not mounted")


@pytest.fixture
def nothing_left(layers: Layers) -> Iterator[None]:
    """After the test there is no mount, no process, and no change in a layer."""
    before, running = sorted(os.walk(layers.base)), _children()
    yield
    assert mounted_at(layers.mnt) is None
    wait_until(lambda: _children() <= running)
    assert sorted(os.walk(layers.base)) == before


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed call said."""
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(r"overlayfs-py: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


# How it is called, and that it works.


def test_success_is_silent_and_the_root_answers(layers: Layers) -> None:
    (layers.lower / "a").write_text("lower")
    with mounted(stack(layers), layers.mnt):
        assert (layers.mnt / "a").read_text() == "lower"
        (layers.mnt / "b").write_text("new")
    assert (layers.upper / "b").read_text() == "new"


def test_daemon_keeps_nothing_of_its_caller(layers: Layers) -> None:
    reader, writer = os.pipe()
    try:
        done = call(stack(layers), pass_fds=[writer])
        assert done.returncode == 0
        os.close(writer)
        pid = daemon_of(layers.mnt)
        process = Path("/proc", str(pid))
        assert os.read(reader, 1) == b""
        assert [os.readlink(process / "fd" / name) for name in "012"] == ["/dev/null"] * 3
        assert os.readlink(process / "cwd") == "/"
        assert os.getsid(pid) == pid
        assert re.search(r"^Umask:\s*0000$", (process / "status").read_text(), re.MULTILINE)
    finally:
        os.close(reader)
        unmount(layers.mnt)
    assert reap(pid) == 0


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_caller_without_standard_descriptors_is_served(layers: Layers, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    assert call(stack(layers), before=close).returncode == 0
    pid = daemon_of(layers.mnt)
    assert os.listdir(layers.mnt) == []
    unmount(layers.mnt)
    assert reap(pid) == 0
    assert call(["-o", "lowerdir=/nonexistent", layers.mnt], before=close).returncode == 1


def test_daemon_may_open_as_much_as_its_hard_limit_allows(layers: Layers) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))

    assert call(stack(layers), before=limit).returncode == 0
    pid = daemon_of(layers.mnt)
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (4096, 4096)
    unmount(layers.mnt)
    assert reap(pid) == 0


def test_podman_style_call_works(layers: Layers) -> None:
    store = layers.base
    (store / "l").mkdir()
    (store / "l" / "AAA").symlink_to("../lower")
    (store / "l" / "BBB").symlink_to("../base")
    layers.add("base").joinpath("below").write_text("")
    (layers.lower / "a").write_text("")
    options = (
        "lowerdir=l/AAA:l/BBB,upperdir=upper,workdir=work,,volatile,uidmapping=:0:100000:1:1:5:10,gidmapping=0:7:1,"
        'private,xino,fsync=0,context="system_u:object_r:container_file_t:s0:c1,c2"'
    )
    os.chown(layers.lower / "a", 1, 0)
    with mounted(["-o", options, "mnt"], layers.mnt, cwd=store):
        assert sorted(os.listdir(layers.mnt)) == ["a", "below"]
        shown = (layers.mnt / "a").stat()
        assert (shown.st_uid, shown.st_gid) == (5, 7)
        assert (layers.mnt / "below").stat().st_uid == 100000
        os.chown(layers.mnt / "a", 100000, 7)
    on_disk = (layers.upper / "a").stat()
    assert (on_disk.st_uid, on_disk.st_gid) == (0, 0)


def test_without_an_upper_nothing_can_be_written(layers: Layers) -> None:
    with mounted(["-o", layer_options([layers.lower]), layers.mnt], layers.mnt):
        with pytest.raises(OSError) as caught:
            (layers.mnt / "a").write_text("")
        assert caught.value.errno == errno.EROFS


def test_five_hundred_lowers_mount_under_the_usual_limit(layers: Layers) -> None:
    names = [f"l{number}" for number in range(500)]
    for name in names:
        layers.add(name).joinpath(name).write_text("")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    done = call(["-o", "lowerdir=" + ":".join(names), layers.mnt], cwd=layers.base, before=limit)
    assert (done.returncode, done.stderr) == (0, "")
    pid = daemon_of(layers.mnt)
    assert sorted(os.listdir(layers.mnt)) == sorted(names)
    unmount(layers.mnt)
    assert reap(pid) == 0


def test_layers_of_any_name_mount(layers: Layers) -> None:
    odd = Path(os.fsdecode(os.fsencode(layers.base) + b'/a:b,c\\d "e"\n\xff'))
    for path in (odd, odd / "low", odd / "up", odd / "wk", odd / "mnt"):
        path.mkdir()
    (odd / "low" / "a").write_text("")
    with mounted(["-o", layer_options([odd / "low"], odd / "up", odd / "wk"), odd / "mnt"], odd / "mnt"):
        assert os.listdir(odd / "mnt") == ["a"]


def test_mountpoint_may_cover_a_layer(layers: Layers) -> None:
    (layers.lower / "a").write_text("lower")
    options = layer_options([layers.lower], layers.upper, layers.work)
    with mounted(["-o", options, layers.lower], layers.lower):
        (layers.lower / "a").write_text("upper")
        assert (layers.lower / "a").read_text() == "upper"
    assert (layers.lower / "a").read_text() == "lower"


def test_a_mount_over_the_library_that_serves_it_copies_large_files_up(layers: Layers) -> None:
    with (layers.lower / "large").open("wb") as large:
        large.seek(64 << 20)
        large.write(b"data")
    # What waits for itself can't be killed, but for an end of the connection.
    inside = textwrap.dedent(
        """
        set -e
        library=$1 done=$2; shift 2
        "$@" "$library"
        { echo more >>"$library/large"; tail -c 9 "$library/large" >"$done"; } &
        waited=0
        until [ -s "$done" ] || [ $waited = 200 ]; do sleep 0.1; waited=$((waited + 1)); done
        umount --lazy --force "$library"
        wait
        """
    )
    library = Path(os.__file__).parent
    options = layer_options([layers.lower, library], layers.upper, layers.work)
    result = layers.base / "done"
    words: list[AnyPath] = ["unshare", "-m", "sh", "-c", inside, "sh", library, result, *_PROGRAM, "-o", options]
    done = call([], program=[os.fsdecode(os.fspath(word)) for word in words])
    assert done.stderr == ""
    assert result.read_text() == "datamore\n"
    assert (layers.upper / "large").stat().st_size == (64 << 20) + 9
    wait_until(lambda: not holders(library))


def test_several_option_arguments_and_switches_of_mount_are_taken(layers: Layers) -> None:
    words: list[AnyPath] = ["-n", "-s", "-v", "-t", "fuse.x", "src", layers.mnt, "-ofsname=other", "-o"]
    words.append(f"lowerdir={layers.lower}")
    with mounted(words, layers.mnt):
        assert mount_line(layers.mnt).startswith(f"other {layers.mnt} fuse.overlayfs-py ro,")


def test_two_mounts_live_side_by_side(layers: Layers) -> None:
    second = Layers(layers.base, layers.lower, layers.add("u2"), layers.add("w2"), layers.add("m2"))
    (layers.lower / "a").write_text("lower")
    with mounted(stack(layers), layers.mnt) as first:
        call(stack(second))
        pid = daemon_of(second.mnt)
        (layers.mnt / "a").write_text("one")
        (second.mnt / "a").write_text("two")
        assert (layers.mnt / "a").read_text() == "one"
        unmount(second.mnt)
        assert reap(pid) == 0
        assert first != pid
        assert (layers.mnt / "a").read_text() == "one"


def test_new_files_get_the_default_acl_in_place_of_the_umask(layers: Layers) -> None:
    user, group, other = ((tag, 0o7) for tag in (0x01, 0x04, 0x20))
    entries = (struct.pack("<HHI", tag, permissions, 2**32 - 1) for tag, permissions in (user, group, other))
    everyone = struct.pack("<I", 2) + b"".join(entries)
    before = os.umask(0o077)
    try:
        with mounted(stack(layers), layers.mnt):
            (layers.mnt / "d").mkdir()
            (layers.mnt / "plain").write_text("")
            os.setxattr(layers.mnt / "d", "system.posix_acl_default", everyone)
            (layers.mnt / "d" / "f").write_text("")
            assert (layers.mnt / "d" / "f").stat().st_mode & 0o777 == 0o666
            assert (layers.mnt / "plain").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.fixture
def installed(layers: Layers) -> Iterator[None]:
    """The program is in /usr/local/bin, under its two names; mount(8) looks for it in the usual places alone."""
    folder = layers.add("bin")
    script = folder / "overlayfs-py"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m overlayfs_py "$@"\n')
    script.chmod(0o755)
    (folder / "fuse-overlayfs").symlink_to("overlayfs-py")
    with kernel_mount("/usr/local/bin", [folder, "/usr/local/bin"]):
        yield


def test_mount_program_mounts_by_type(layers: Layers, installed: None) -> None:
    words = ["mount", "-t", "fuse.overlayfs-py", "overlay", "-o"]
    options = layer_options([layers.lower], layers.upper, layers.work)
    with mounted([options, layers.mnt], layers.mnt, program=words):
        line = mount_line(layers.mnt)
        assert line.startswith(f"overlay {layers.mnt} fuse.overlayfs-py rw,noatime,")
        assert "allow_other" in line and "default_permissions" in line


def test_line_of_fstab_mounts(layers: Layers, installed: None) -> None:
    table = layers.base / "fstab"
    options = os.fsdecode(layer_options([layers.lower], layers.upper, layers.work))
    extra = "_netdev,nofail,x-systemd.requires=/x,X-y,user,noauto,defaults,comment=z,nosuid"
    table.write_text(f"overlay {layers.mnt} fuse.overlayfs-py {extra},{options} 0 0\n")
    with mounted([layers.mnt], layers.mnt, program=["mount", "-T", os.fspath(table)]):
        assert re.match(rf"overlay {layers.mnt} fuse.overlayfs-py rw,nosuid,", mount_line(layers.mnt))


def test_mount_program_hears_of_a_failure(layers: Layers, installed: None, nothing_left: None) -> None:
    words = ["mount", "-t", "fuse.overlayfs-py", "overlay", os.fspath(layers.mnt), "-o", "lowerdir=/nonexistent"]
    done = call([], program=words)
    assert done.returncode != 0
    assert "overlayfs-py: lowerdir '/nonexistent': No such file or directory" in done.stderr


def test_name_of_fuse_overlayfs_works(layers: Layers, installed: None) -> None:
    name = "/usr/local/bin/fuse-overlayfs"
    with mounted(stack(layers), layers.mnt, program=[name]):
        assert os.listdir(layers.mnt) == []
    assert call(["--version"], program=[name]).stdout == f"overlayfs-py {__version__}\n"


# Without privilege.


def test_root_of_a_user_namespace_mounts_by_itself(layers: Layers) -> None:
    (layers.lower / "a").write_text("lower")
    inside = textwrap.dedent(
        """
        set -e
        "$@"
        echo -n new > mnt/b
        stat -f -c %T mnt
        cat mnt/a mnt/b
        grep -o 'fuse.overlayfs-py .*' /proc/self/mountinfo
        umount mnt
        """
    )
    words = ["unshare", "-Urm", "sh", "-c", inside, "sh", *_PROGRAM, *stack(layers)]
    environ = environment(PATH="/usr/bin:/bin")
    done = call([], program=[os.fsdecode(os.fspath(word)) for word in words], cwd=layers.base, env=environ)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "lowernew" in done.stdout
    assert "allow_other" in done.stdout
    assert (layers.upper / "b").read_text() == "new"
    wait_until(lambda: not holders(layers.mnt))


@pytest.fixture
def unprivileged(layers: Layers, checkout: Checkout) -> Iterator[list[str]]:
    """How an ordinary user calls the program; the device that udev opens to all is put there by a bind mount."""
    for path in (layers.lower, layers.upper, layers.work, layers.mnt):
        os.chown(path, _NOBODY, _NOBODY)
    device = layers.base / "fuse"
    os.mknod(device, 0o020666, os.makedev(10, 229))
    device.chmod(0o666)
    mount(os.fsencode(device), b"/dev/fuse", None, MS_BIND)
    try:
        user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "env", "--chdir=/"]
        yield [*user, f"PYTHONPATH={checkout.path}", os.fspath(checkout.python), "-m", "overlayfs_py"]
    finally:
        umount(b"/dev/fuse")
        device.unlink()


def as_nobody(*words: AnyPath) -> subprocess.CompletedProcess[str]:
    return call(words, program=["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"])


def test_ordinary_user_mounts_through_fusermount(layers: Layers, unprivileged: list[str]) -> None:
    (layers.lower / "a").write_text("lower")
    done = call(stack(layers), program=unprivileged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = daemon_of(layers.mnt)
    assert as_nobody("sh", "-c", f"cat {layers.mnt}/a; echo new > {layers.mnt}/b").stdout == "lower"
    line = mount_line(layers.mnt)
    assert f"user_id={_NOBODY}" in line and "nosuid,nodev" in line and "allow_other" not in line
    assert as_nobody("fusermount3", "-u", layers.mnt).returncode == 0
    assert reap(pid) == 0
    assert (layers.upper / "b").stat().st_uid == _NOBODY


def test_daemon_of_an_ordinary_user_unmounts_when_told_to_end(layers: Layers, unprivileged: list[str]) -> None:
    assert call(stack(layers), program=unprivileged).returncode == 0
    pid = daemon_of(layers.mnt)
    os.kill(pid, signal.SIGTERM)
    assert reap(pid) == 0
    assert mounted_at(layers.mnt) is None


@pytest.mark.parametrize("options", ["allow_other", "allow_root"])
def test_what_fusermount_refuses_is_said(layers: Layers, unprivileged: list[str], options: str) -> None:
    with own_file("/etc/fuse.conf", layers.base / "fuse.conf"):
        said = failure(call(stack(layers, options), program=unprivileged))
    assert "user_allow_other" in said
    assert mounted_at(layers.mnt) is None
    wait_until(lambda: not holders(layers.mnt))


@contextlib.contextmanager
def own_file(path: str, empty: Path) -> Iterator[None]:
    empty.write_text("")
    mount(os.fsencode(empty), os.fsencode(path), None, MS_BIND)
    try:
        yield
    finally:
        umount(os.fsencode(path))


def test_user_who_cannot_reach_the_device_is_told(layers: Layers, nothing_left: None) -> None:
    blocked = layers.base / "no-device"
    blocked.write_text("")
    mount(os.fsencode(blocked), b"/dev/fuse", None, MS_BIND)
    try:
        said = failure(call(stack(layers)))
    finally:
        umount(b"/dev/fuse")
        blocked.unlink()
        shutil.rmtree(layers.work / "work", ignore_errors=True)
        shutil.rmtree(layers.work / "index", ignore_errors=True)
    assert "cannot mount on" in said


# In the foreground, and told to end.


@contextlib.contextmanager
def foreground(layers: Layers, *switches: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*_PROGRAM, *switches, *stack(layers)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: process.poll() is not None or mounted_at(layers.mnt) is not None)
        os.listdir(layers.mnt)
        yield process
    finally:
        if mounted_at(layers.mnt) is not None:
            unmount(layers.mnt)
        process.communicate(timeout=_LIMIT)


@pytest.mark.parametrize("switch", ["-f", "--foreground", "-d", "--debug"])
def test_foreground_lasts_until_unmounted(layers: Layers, switch: str) -> None:
    with foreground(layers, switch) as process:
        assert process.poll() is None
        unmount(layers.mnt)
        output, errors = process.communicate(timeout=_LIMIT)
        assert (process.returncode, output) == (0, "")
        assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_in_the_foreground_unmounts(layers: Layers, number: signal.Signals) -> None:
    with foreground(layers, "-f") as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=_LIMIT)
    assert (process.returncode, output) == (0, "")
    # What comes before says how it serves.
    assert errors.splitlines()[1:] == [f"overlayfs-py: unmounting on {number.name}"]
    assert mounted_at(layers.mnt) is None


def test_foreground_failure_is_one_line_too(layers: Layers, nothing_left: None) -> None:
    failure(call(["-f", "-o", "lowerdir=/nonexistent", layers.mnt]))


def test_signal_to_the_daemon_unmounts(layers: Layers) -> None:
    assert call(stack(layers)).returncode == 0
    pid = daemon_of(layers.mnt)
    os.kill(pid, signal.SIGTERM)
    assert reap(pid) == 0
    assert mounted_at(layers.mnt) is None


def test_files_in_use_outlive_the_first_signal_and_not_the_second(layers: Layers) -> None:
    assert call(stack(layers)).returncode == 0
    pid = daemon_of(layers.mnt)
    held = os.open(layers.mnt / "a", os.O_RDWR | os.O_CREAT)
    try:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: mounted_at(layers.mnt) is None)
        os.write(held, b"late")
        assert os.pread(held, 10, 0) == b"late"
        os.kill(pid, signal.SIGTERM)
        assert reap(pid) == 0
        # The second where rings, which the kernel takes down after the process, were still there to take the request.
        with pytest.raises(OSError) as caught:
            os.fsync(held)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        # Nobody is left to answer the flush.
        with contextlib.suppress(OSError):
            os.close(held)
    assert (layers.upper / "a").read_bytes() == b"late"


# Failures, of which each leaves nothing.


def _many(count: int) -> str:
    return ":".join(f"/{number}" for number in range(count))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no words where a mountpoint is needed; usage:"),
        (["a", "b", "mnt"], "3 words"),
        (["-o", "lowerdir=lower"], "no words"),
        (["-x", "mnt"], "no switch -x; usage:"),
        (["--frobnicate", "mnt"], "no switch --frobnicate"),
        (["-o"], "switch -o needs a value"),
        (["mnt"], "no lower layer"),
        (["-o", "lowerdir=gone", "mnt"], "lowerdir '*/gone': No such file or directory"),
        (["-o", "lowerdir=file", "mnt"], "'*/file' is not a directory"),
        (["-o", "lowerdir=lower:lower", "mnt"], "are one directory"),
        (["-o", "lowerdir=lower:lower/sub", "mnt"], "is inside lowerdir"),
        (["-o", "lowerdir=:lower", "mnt"], "begins or ends with a colon"),
        (["-o", f"lowerdir={_many(501)}", "mnt"], "501 lower layers are too many"),
        (["-o", "lowerdir=lower,upperdir=upper", "mnt"], "needs a workdir"),
        (["-o", "lowerdir=lower,upperdir=lower,workdir=work", "mnt"], "are one directory"),
        (["-o", "lowerdir=lower,upperdir=upper,workdir=upper", "mnt"], "are one directory"),
        (["-o", "lowerdir=lower,upperdir=upper,workdir=upper/sub", "mnt"], "is inside upperdir"),
        (["-o", "lowerdir=lower,upperdir=work/sub,workdir=work", "mnt"], "is inside workdir"),
        (["-o", "lowerdir=lower,upperdir=gone,workdir=work", "mnt"], "upperdir '*/gone': No such"),
        (["-o", "lowerdir=lower,upperdir=upper,workdir=gone", "mnt"], "workdir '*/gone': No such"),
        (["-o", "lowerdir=lower,upperdir=upper,workdir=/dev/shm", "mnt"], "on different filesystems"),
        (["-o", "lowerdir=lower", "gone"], "mountpoint '*/gone': No such"),
        (["-o", "lowerdir=lower", "file"], "mountpoint '*/file' is not a directory"),
        (["-o", "lowerdir=lower", "lower/sub"], "mountpoint '*/sub' is inside lowerdir"),
        (["-o", "lowerdir=lower,upperdir=upper,workdir=work", "upper/sub"], "is inside upperdir"),
        (["-o", "lowerdir=lower,verity=on", "mnt"], "verity=on is not supported"),
        (["-o", "lowerdir=lower,verity=require", "mnt"], "verity=require is not supported"),
        (["-o", "lowerdir=lower,engine=fast", "mnt"], "engine cannot be 'fast'"),
        (["-o", "lowerdir=lower,remount", "mnt"], "remount is not supported"),
        (["-o", 'lowerdir=lower,context="u:r', "mnt"], "no closing quote"),
        (["-o", "lowerdir=lower,uidmapping=0:1", "mnt"], "triplets"),
    ],
)
def test_bad_call_fails_with_one_line(
    layers: Layers, arguments: list[str], says: str, request: pytest.FixtureRequest
) -> None:
    (layers.base / "file").write_text("")
    for parent in (layers.lower, layers.upper, layers.work):
        (parent / "sub").mkdir()
    request.getfixturevalue("nothing_left")
    done = call(arguments, cwd=layers.base)
    assert done.returncode == 1
    assert re.search(re.escape(says).replace(r"\*", ".*"), failure(done))


def test_upper_without_xattrs_is_refused(layers: Layers, request: pytest.FixtureRequest) -> None:
    mount(b"ramfs", os.fsencode(layers.base / "upper"), b"ramfs")
    try:
        for name in ("u", "w"):
            (layers.upper / name).mkdir()
        request.getfixturevalue("nothing_left")
        options = layer_options([layers.lower], layers.upper / "u", layers.upper / "w")
        assert "xattr" in failure(call(["-o", options, layers.mnt])).lower()
        shutil.rmtree(layers.upper / "w")
        (layers.upper / "w").mkdir()
    finally:
        umount(os.fsencode(layers.base / "upper"))
        for name in ("u", "w"):
            (layers.upper / name).mkdir(exist_ok=True)


def test_log_file_that_cannot_be_opened_fails_the_mount(layers: Layers, nothing_left: None) -> None:
    said = failure(call(stack(layers), env=environment(OVERLAYFS_PY_LOG="/nonexistent/log")))
    assert "cannot open the log file /nonexistent/log" in said


def fake(definitions: str, root_name: bytes = b"", answer_limit: float = 0.5) -> list[str]:
    script = _WITH_FAKE_ENGINE.format(definitions=definitions, root_name=root_name, answer_limit=answer_limit)
    return [sys.executable, "-c", script]


@pytest.mark.parametrize("root_name", [b"", b"merged"], ids=["in place", "aside"])
@pytest.mark.parametrize(
    ("definitions", "says"),
    [
        ("def serve(overlay, fd, beginning): os._exit(3)", "daemon ended"),
        ("def serve(overlay, fd, beginning): raise ValueError('x')", "see its log"),
        ("def serve(overlay, fd, beginning): time.sleep(60)", "did not answer within 0.5 seconds"),
        ("def serve(overlay, fd, beginning): os.close(fd)", "daemon ended|does not answer"),
        ("def open_overlay(config): raise LayerError('odd layer')\nserve = None", "^overlayfs-py: odd layer$"),
        ("def open_overlay(config): raise KeyError('x')\nserve = None", "see its log"),
        ("def open_overlay(config): os._exit(3)\nserve = None", "see its log"),
    ],
)
def test_daemon_that_fails_leaves_nothing(
    layers: Layers, nothing_left: None, definitions: str, says: str, root_name: bytes
) -> None:
    log = layers.base / "log"
    env = environment(OVERLAYFS_PY_LOG=os.fspath(log))
    try:
        done = call(stack(layers), program=fake(definitions, root_name), env=env)
    finally:
        log.unlink(missing_ok=True)
    assert done.returncode == 32
    assert re.search(says, failure(done))


def test_bug_in_the_daemon_is_in_its_log(layers: Layers) -> None:
    log = layers.base / "log"
    definitions = "def serve(overlay, fd, beginning): raise ValueError('a bug')"
    call(stack(layers), program=fake(definitions), env=environment(OVERLAYFS_PY_LOG=os.fspath(log)))
    assert re.search(r"overlayfs-py\[\d+\]: ERROR: unexpected error", log.read_text())
    assert "ValueError: a bug" in log.read_text()


@pytest.mark.parametrize("root_name", [b"", b"merged"], ids=["in place", "aside"])
@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGINT, 32, "overlayfs-py: interrupted by a signal\n"),
        (signal.SIGTERM, 32, "overlayfs-py: interrupted by a signal\n"),
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
)
def test_program_killed_while_it_waits_leaves_nothing(
    layers: Layers, nothing_left: None, number: signal.Signals, status: int, says: str, root_name: bytes
) -> None:
    serving = layers.base / "serving"
    definitions = f"def serve(overlay, fd, beginning): open({os.fspath(serving)!r}, 'x'); time.sleep(60)"
    program = fake(definitions, root_name, answer_limit=60)
    process = subprocess.Popen([*program, *stack(layers)], env=environment(), stderr=subprocess.PIPE, text=True)
    wait_until(serving.exists)
    serving.unlink()
    assert (mounted_at(layers.mnt) is None) == bool(root_name)
    process.send_signal(number)
    _, errors = process.communicate(timeout=_LIMIT)
    assert (process.returncode, errors) == (status, says)
    wait_until(lambda: mounted_at(layers.mnt) is None)


# What it says, and what is written about it.


def test_unknown_option_is_a_warning_in_the_log(layers: Layers) -> None:
    log = layers.base / "log"
    env = environment(OVERLAYFS_PY_LOG="log")
    with mounted(stack(layers, "threaded=1,nonsense"), layers.mnt, cwd=layers.base, env=env):
        pass
    warned = log.read_text()
    assert "WARNING: option threaded=1 has no effect here; ignored" in warned
    assert "option nonsense has no effect" in warned


def test_unknown_option_is_told_on_a_terminal(layers: Layers) -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        try:
            words = stack(layers, "uperdir=x,noauto")
            subprocess.run([*_PROGRAM, *words], check=True, stderr=theirs, env=environment(), timeout=_LIMIT)
        finally:
            os.close(theirs)
            umount(os.fsencode(layers.mnt))
        assert terminal.read(1000) == b"overlayfs-py: option uperdir=x has no effect here; ignored\r\n"


def test_version_is_one_line() -> None:
    for switch in ("--version", "-V"):
        done = call([switch])
        assert (done.returncode, done.stdout, done.stderr) == (0, f"overlayfs-py {__version__}\n", "")


def test_help_lists_every_switch_and_option_once() -> None:
    for switch in ("--help", "-h"):
        done = call([switch])
        assert (done.returncode, done.stdout, done.stderr) == (0, help_text() + "\n", "")
    switches, options = help_text().split("options:\n")
    for words in SWITCHES:
        assert f"\n  {words} " in switches
    listed = re.findall(r"^  ([a-z][a-z0-9_+]*)", options, re.MULTILINE)
    assert listed == list(OPTIONS)
    assert all(len(line) <= 100 for line in help_text().splitlines())


def test_manual_lists_every_option_and_switch_and_no_other() -> None:
    manual = _MANUAL.read_text()
    _, _, rest = manual.partition(".Sh MOUNT OPTIONS\n")
    options, _, _ = rest.partition(".Pp\nThese are ignored without a warning:")
    listed: list[str] = []
    for item in re.findall(r"^\.It Cm (.*)$", options, re.MULTILINE):
        names = re.split(r" Ns ", item)[0]
        listed += names.split(" , ")
    assert sorted(listed) == sorted(OPTIONS)
    switches, _, _ = manual.partition(".Sh MOUNT OPTIONS\n")
    items = "\n".join(re.findall(r"^\.It Fl (.*)$", switches, re.MULTILINE))
    for words in SWITCHES:
        for switch in re.findall(r"-(-?[A-Za-z]+)", words):
            assert re.search(rf"\b{switch.lstrip('-')}\b", items), switch


def test_manual_names_every_ignored_option() -> None:
    _, _, rest = _MANUAL.read_text().partition("These are ignored without a warning:")
    ignored, _, _ = rest.partition(".Pp")
    for name in IGNORED:
        assert re.search(rf"\b{name.removeprefix('r') if name.startswith(('rp', 'rs', 'runb')) else name}\b", ignored)


def test_manual_is_sound() -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", _MANUAL], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "options", "words", "foreground", "debug"),
    [
        (["-o", "a", "m"], ["a"], ["m"], False, False),
        (["-oa,b", "-o", "c", "m"], ["a,b", "c"], ["m"], False, False),
        (["src", "m", "-o", "a"], ["a"], ["src", "m"], False, False),
        (["-fo", "a", "m"], ["a"], ["m"], True, False),
        (["-f", "-d", "m"], [], ["m"], True, True),
        (["-fdnsv", "m"], [], ["m"], True, True),
        (["--debug", "m"], [], ["m"], True, True),
        (["--foreground", "--", "-m"], [], ["-m"], True, False),
        (["-t", "fuse.x", "-", "m"], [], ["-", "m"], False, False),
    ],
)
def test_command_lines_are_sorted_out(
    arguments: list[str], options: list[str], words: list[str], foreground: bool, debug: bool
) -> None:
    command = parse_command_line([argument.encode() for argument in arguments])
    assert [option.decode() for option in command.options] == options
    assert [word.decode() for word in command.words] == words
    assert (command.foreground, command.debug) == (foreground, debug)


def test_switch_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="no switch -z"):
        parse_command_line([b"-fz"])


def test_a_mount_by_root_loads_no_module_that_only_others_need() -> None:
    needed = "cli.mount_program", "mounting", "core.overlay", "engines.native"
    imports = "".join(f"import overlayfs_py.{name}\n" for name in needed)
    loaded = set(call([], program=[sys.executable, "-c", f"{imports}import sys\nprint(*sys.modules)"]).stdout.split())
    assert "overlayfs_py.engines.native.session" in loaded
    costly = {
        "argparse",
        "asyncio",
        "collections",
        "concurrent",
        "contextlib",
        "enum",
        "functools",
        "importlib",
        "logging",
        "overlayfs_py.cli.doctor",
        "pathlib",
        "pyfuse3",
        "re",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "tempfile",
        "threading",
        "traceback",
        "typing",
    }
    assert loaded & costly == set()


# From Python.


def test_mount_function_returns_a_mount_that_unmounts(layers: Layers) -> None:
    program = """
        import os, sys
        from overlayfs_py.config import parse_options
        from overlayfs_py.errors import MountError
        from overlayfs_py.mounting import mount

        options, mountpoint = map(os.fsencode, sys.argv[1:])
        live = mount(parse_options([options], mountpoint=mountpoint, cwd=b"/", euid=0))
        held = os.open(mountpoint + b"/a", os.O_RDONLY)
        try:
            live.unmount()
        except MountError as error:
            print(error)
        print(os.path.ismount(mountpoint))
        os.close(held)
        live.unmount()
        print(os.path.ismount(mountpoint), os.path.exists(f"/proc/{live.pid}"))
        """
    (layers.lower / "a").write_text("")
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = call([*stack(layers)[1:]], program=words)
    assert done.stderr == ""
    busy, first, last = done.stdout.splitlines()
    assert "busy" in busy
    assert (first, last) == ("True", "False False")

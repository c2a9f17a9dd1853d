"""Which engine and transport a mount takes on which machine, and what `--doctor` says of it."""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from overlayfs_py.cli.doctor import examine
from overlayfs_py.config import parse_options
from overlayfs_py.core.overlay import Overlay
from overlayfs_py.engines import machine
from overlayfs_py.engines.native.session import Session
from overlayfs_py.engines.native.uring import Ring
from tests.conftest import Checkout, Layers
from tests.support.mounts import REPOSITORY, AnyPath, layer_options, mounted_at, our_mount, unmount
from tests.support.syscalls import MS_BIND, mount, umount
from tests.support.uring import SWITCH, switch_kept

_LIMIT: Final = 30
# The same on every architecture but alpha.
_SYS_IO_URING_SETUP, _SYS_IO_URING_ENTER, _SYS_IO_URING_REGISTER = 425, 426, 427
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PROGRAM: Final = (sys.executable, "-m", "overlayfs_py")

Before = Callable[[], None]


def call(
    *words: AnyPath,
    program: Sequence[AnyPath] = _PROGRAM,
    before: Before | None = None,
    tree: Path = REPOSITORY,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program of a source tree to its end."""
    env = {**os.environ, "PYTHONPATH": os.fspath(tree)}
    if log is not None:
        env["OVERLAYFS_PY_LOG"] = os.fspath(log)
    return subprocess.run(
        [*program, *words],
        cwd=tree,
        env=env,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )


def stack(layers: Layers, options: str = "") -> list[AnyPath]:
    return ["-o", layer_options([layers.lower], layers.upper, layers.work, options), layers.mnt]


def log_of_mount(layers: Layers, options: str = "", **how: object) -> str:
    """The log of a mount that works, in the background; its root is listed and unmounted again."""
    log = layers.base / "log"
    log.unlink(missing_ok=True)
    done = call(*stack(layers, options), log=log, **how)  # type: ignore[arg-type]
    try:
        assert (done.returncode, done.stderr) == (0, "")
        os.listdir(layers.mnt)
    finally:
        if mounted_at(layers.mnt) is not None:
            unmount(layers.mnt)
    return log.read_text()


def refusal(layers: Layers, options: str, **how: object) -> str:
    """The one line that a mount fails with, which leaves no mount."""
    done = call(*stack(layers, options), **how)  # type: ignore[arg-type]
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (32, "", 1), done
    assert mounted_at(layers.mnt) is None
    return done.stderr


def rings(pid: int) -> int:
    """How many rings a process has."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return links.count("anon_inode:[io_uring]")


def processors() -> int:
    """Those that the kernel has queues for."""
    return int(subprocess.run(["nproc", "--all"], capture_output=True, check=True).stdout)


@contextlib.contextmanager
def switch(state: str) -> Iterator[None]:
    with switch_kept():
        SWITCH.write_text(state)
        yield


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[None]:
    """Something else in place of a file or directory, for this mount namespace alone."""
    mount(os.fsencode(source), os.fsencode(target), None, MS_BIND)
    try:
        yield
    finally:
        umount(os.fsencode(target))


def forbid_rings() -> None:
    """Here no ring can be made from now on, as container engines have it."""
    forbid(_SYS_IO_URING_SETUP)


def forbid(call: int) -> None:
    """From now on a system call fails with EPERM in this process; seccomp(2)."""
    load, equal, give = 0x20, 0x15, 0x06
    rules = [(load, 0, 0, 0), (equal, 0, 1, call), (give, 0, 0, 0x50000 | errno.EPERM)]
    rules.append((give, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    table = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
    assert ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, table, 0, 0) == 0


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the sources in which nothing is compiled."""
    for package in ("overlayfs_py", "mount_helper"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


# The engine.


def test_the_native_engine_serves_where_it_can(layers: Layers) -> None:
    with switch("N"), our_mount(layers.mnt, [layers.lower], layers.upper, layers.work) as live:
        maps = Path(f"/proc/{live.pid}/maps").read_text()
        assert "engines/native/session." in maps
        assert "pyfuse3" not in maps
        assert rings(live.pid) == 0


def test_without_its_modules_the_portable_engine_serves_and_the_log_says_why(layers: Layers, unbuilt: Path) -> None:
    log = log_of_mount(layers, tree=unbuilt)
    assert "the portable engine serves, as the native one can't: it is not built" in log
    assert refusal(layers, "engine=native", tree=unbuilt).startswith(
        "overlayfs-py: the native engine can't be used here"
    )
    assert "uring=on takes the native engine" in refusal(layers, "uring=on", tree=unbuilt)


def test_a_kernel_before_5_4_gets_the_portable_engine(layers: Layers) -> None:
    # Linux says so of itself where it is asked to.
    old = ("setarch", "--uname-2.6", *_PROGRAM)
    assert "is older than 5.4" in log_of_mount(layers, program=old)
    assert "is older than 5.4" in refusal(layers, "engine=native", program=old)


def test_root_that_may_not_open_every_file_gets_the_portable_engine(layers: Layers) -> None:
    less = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *_PROGRAM)
    assert "it needs root, at least of a user namespace, with CAP_DAC_OVERRIDE" in log_of_mount(layers, program=less)
    assert "CAP_DAC_OVERRIDE" in refusal(layers, "engine=native", program=less)


def test_the_portable_engine_can_be_asked_for(layers: Layers) -> None:
    with our_mount(layers.mnt, [layers.lower], options="engine=portable") as live:
        assert "pyfuse3" in Path(f"/proc/{live.pid}/maps").read_text()


# The transport.


@pytest.mark.parametrize(("state", "options"), [("Y", ""), ("Y", "uring=on"), ("N", "uring=on")])
def test_rings_carry_the_requests_where_they_are_switched_on(layers: Layers, state: str, options: str) -> None:
    with switch(state):
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options) as live:
            assert rings(live.pid) == processors()
        assert SWITCH.read_text() == "Y\n"


@pytest.mark.parametrize(("state", "options"), [("Y", "uring=off"), ("N", "")])
def test_no_ring_is_made_where_none_is_wanted(layers: Layers, state: str, options: str) -> None:
    with switch(state), our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, options) as live:
        assert rings(live.pid) == 0


def test_without_rings_dev_fuse_is_read_and_the_log_says_why(layers: Layers) -> None:
    with switch("Y"):
        log = log_of_mount(layers, before=forbid_rings)
    assert "requests come over /dev/fuse: io_uring is forbidden to this process" in log


def test_uring_on_without_rings_fails_before_anything_is_changed(layers: Layers) -> None:
    with switch("N"):
        said = refusal(layers, "uring=on", before=forbid_rings)
        assert SWITCH.read_text() == "N\n"
    assert said == (
        "overlayfs-py: no FUSE over io_uring: io_uring is forbidden to this process, as container engines do; "
        "use uring=auto\n"
    )


def test_uring_on_without_the_switch_fails(layers: Layers) -> None:
    with bound(layers.add("empty"), SWITCH.parent):
        assert f"cannot turn its switch on ({SWITCH}: " in refusal(layers, "uring=on")


def test_uring_on_fails_where_the_kernel_does_not_agree(layers: Layers, tmp_path: Path) -> None:
    (tmp_path / "switch").write_text("Y\n")
    with switch("N"), bound(tmp_path / "switch", SWITCH):
        assert "no FUSE over io_uring: the kernel does not offer it" in refusal(layers, "uring=on")
        done = call("-f", *stack(layers, "uring=on"))
        assert (done.returncode, mounted_at(layers.mnt)) == (1, None)
        assert done.stderr == "overlayfs-py: no FUSE over io_uring: the kernel does not offer it; use uring=auto\n"
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work) as live:
            os.listdir(layers.mnt)
            assert live.pid


def test_root_of_a_user_namespace_gets_rings_where_the_machine_has_them_on(layers: Layers) -> None:
    inside = ("unshare", "-Urm", "sh", "-c", '"$@" && ls "$mnt" && umount "$mnt"', "sh", *_PROGRAM)
    words = ("env", f"mnt={layers.mnt}", *inside)
    log = layers.base / "log"
    with switch("Y"):
        done = call(*stack(layers, "uring=on"), program=words, log=log)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_user_can_not_turn_rings_on(layers: Layers, checkout: Checkout) -> None:
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Urm")
    with switch("N"):
        program = (*user, checkout.python, "-m", "overlayfs_py")
        said = refusal(layers, "uring=on", program=program, tree=checkout.path)
        assert SWITCH.read_text() == "N\n"
    assert f"cannot turn its switch on ({SWITCH}: Permission denied)" in said


def test_a_mount_whose_rings_can_not_be_served_fails_and_leaves_nothing(layers: Layers) -> None:
    log = layers.base / "log"
    with switch("Y"):
        said = refusal(layers, "", before=lambda: forbid(_SYS_IO_URING_ENTER), log=log)
    assert said == "overlayfs-py: the daemon ended before the root answered; see its log\n"
    assert "Operation not permitted" in log.read_text()


def test_a_mount_whose_rings_can_not_be_woken_has_none(layers: Layers) -> None:
    with switch("Y"):
        said = log_of_mount(layers, before=lambda: forbid(_SYS_IO_URING_REGISTER))
    assert "requests come over /dev/fuse: io_uring is forbidden to this process" in said


def test_a_ring_that_the_kernel_does_not_take_is_an_error(layers: Layers) -> None:
    options = layer_options([layers.lower])
    config = parse_options([options], mountpoint=os.fsencode(layers.mnt), cwd=b"/", euid=0)
    with contextlib.closing(Overlay.open(config)) as overlay, open(layers.base / "plain", "wb") as no_device:
        session = Session(overlay, no_device.fileno(), want_uring=True)
        ring = Ring(no_device.fileno(), 0, None)
        try:
            with pytest.raises(OSError, match="an entry of a ring was refused"):
                ring.serve(session)
        finally:
            ring.close()
            session.close()


# The doctor.


def doctor(*, status: int = 0, **how: object) -> dict[str, str]:
    """What the doctor says: the text by what it is about, with the advice below it."""
    done = call("--doctor", **how)  # type: ignore[arg-type]
    assert (done.returncode, done.stderr) == (status, ""), done
    said: dict[str, str] = {}
    topic = ""
    for line in done.stdout.splitlines():
        head, text = line[:16].strip(), line[16:]
        if line.startswith("    -> ") or not head:
            said[topic] += f"\n{line.strip()}"
        else:
            topic = head
            said[topic] = text
    return said


def value(path: str) -> str:
    return Path(path).read_text().strip()


def test_the_doctor_tells_what_the_machine_has() -> None:
    with switch("N"):
        said = doctor()
    assert said["kernel"] == f"Linux {os.uname().release}"
    assert said["/dev/fuse"] == "usable"
    assert said["mounting"] == "allowed"
    assert said["engine"] == "native"
    assert said["io_uring switch"] == f"N ({SWITCH})"
    assert said["io_uring sysctl"] == f"kernel.io_uring_disabled={value('/proc/sys/kernel/io_uring_disabled')}"
    assert said["requests"].endswith(f"(fs.fuse.max_pages_limit={value('/proc/sys/fs/fuse/max_pages_limit')})")
    assert said["passthrough"] == "allowed"
    assert said["user namespaces"] == "allowed"
    owned = [line.split(":") for line in Path("/etc/subuid").read_text().splitlines()]
    count = sum(int(size) for user, _, size in owned if user in ("root", "0"))
    assert said["subordinate ids"].startswith(f"{count} users, ")
    assert said["result"] == "a mount would work: the native engine over /dev/fuse"


def test_the_command_that_the_doctor_gives_for_rings_turns_them_on(layers: Layers) -> None:
    with switch("N"):
        reason, advice = doctor()["transport"].split("\n-> ")
        assert reason == "/dev/fuse: it is not switched on"
        subprocess.run(["sh", "-c", advice], check=True, timeout=_LIMIT)
        said = doctor()
        assert said["transport"] == "io_uring"
        assert said["result"] == "a mount would work: the native engine over io_uring"
        with our_mount(layers.mnt, [layers.lower]) as live:
            assert rings(live.pid) == processors()


@pytest.mark.parametrize(
    ("setting", "said", "advised"),
    [(0, "halt at once", True), (50_000, "wait 50 µs", True), (200_000, "wait 200 µs", False)],
)
def test_the_doctor_tells_whether_idle_processors_halt_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: int, said: str, advised: bool
) -> None:
    knob = tmp_path / "guest_halt_poll_ns"
    knob.write_text(f"{setting}\n")
    monkeypatch.setattr(machine, "HALT_POLLING", os.fspath(knob))
    monkeypatch.setattr(machine, "CPU_LATENCY", os.fspath(tmp_path / "missing"))
    lines = examine()[0].splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("idle processors")]
    assert lines[number][16:].startswith(said)
    advice = lines[number + 1].partition("-> ")[2]
    assert (advice == f"echo 200000 > {knob}") == advised
    knob.unlink()
    assert "idle processors" not in examine()[0]


def test_the_doctor_sees_that_rings_are_forbidden() -> None:
    with switch("Y"):
        said = doctor(before=forbid_rings)
    assert said["transport"].startswith("/dev/fuse: io_uring is forbidden to this process")


def test_the_doctor_sees_that_nothing_is_built(unbuilt: Path) -> None:
    said = doctor(tree=unbuilt)
    assert said["engine"].startswith("portable\nnot native: it is not built (")
    assert "\n-> " in said["engine"]
    assert said["result"] == "a mount would work: the portable engine over /dev/fuse"


def test_the_doctor_sees_an_old_kernel() -> None:
    said = doctor(program=("setarch", "--uname-2.6", *_PROGRAM))
    assert said["FUSE"].endswith("not copies beyond 4 GiB at once: since Linux 6.18")
    assert "is older than 5.4" in said["engine"]
    assert said["passthrough"] == "the kernel is too old"


@pytest.mark.parametrize("instead", ["/dev/null", "/etc/passwd"])
def test_the_doctor_sees_that_the_device_is_hidden(layers: Layers, instead: str) -> None:
    with bound(Path(instead), Path("/dev/fuse")):
        said = doctor(status=1)
        assert "--device /dev/fuse" in said["/dev/fuse"]
        assert said["result"].startswith("no mount would work: /dev/fuse: ")
        assert call(*stack(layers)).returncode == 32


def test_the_doctor_sees_that_the_device_may_not_be_opened(layers: Layers) -> None:
    device = layers.base / "fuse"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    with bound(device, Path("/dev/fuse")):
        said = doctor(status=1, program=("setpriv", "--reuid=65534", "--clear-groups", *_PROGRAM))
        assert said["/dev/fuse"] == "Permission denied\n-> chmod 666 /dev/fuse, as root of the machine"


def test_the_doctor_sees_a_user_namespace_that_may_not_mount(layers: Layers) -> None:
    said = doctor(status=1, program=("unshare", "-Ur", *_PROGRAM))
    reason, advice = said["mounting"].split("\n-> ")
    assert said["result"] == f"no mount would work: {reason}"
    assert said["passthrough"] == "takes CAP_SYS_ADMIN as root of the machine"
    assert call(*stack(layers), program=("unshare", "-Ur", *_PROGRAM)).returncode == 32
    inside = (*advice.split(" "), "sh", "-c", '"$@" --doctor && "$@"', "sh", *_PROGRAM)
    done = call(*stack(layers), program=inside)
    assert done.returncode == 0, done
    assert "a mount would work: the native engine" in done.stdout


def test_the_doctor_sees_root_without_the_right_to_mount() -> None:
    said = doctor(status=1, program=("setpriv", "--bounding-set=-sys_admin", "--no-new-privs", *_PROGRAM))
    assert said["mounting"].startswith("mounting takes CAP_SYS_ADMIN, or fusermount3")
    assert said["passthrough"].startswith("takes CAP_SYS_ADMIN")


def test_the_doctor_of_a_user_names_fusermount3(checkout: Checkout) -> None:
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    program = (*user, checkout.python, "-m", "overlayfs_py")
    usable = subprocess.run([*user, "test", "-w", "/dev/fuse"], check=False).returncode == 0
    said = doctor(status=0 if usable else 1, program=program, tree=checkout.path)
    assert said["mounting"] == f"through {shutil.which('fusermount3')}"
    assert said["engine"].startswith("portable\nnot native: it needs root")
    assert "subordinate ids" in said
    said = doctor(status=1, program=(*user, "--no-new-privs", *program[4:]), tree=checkout.path)
    assert said["mounting"].startswith("mounting takes CAP_SYS_ADMIN, or fusermount3")

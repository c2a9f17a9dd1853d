"""Options that any mount has: who may do what through it, what it is called, access times; and what does nothing."""

import contextlib
import errno
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from tests.conftest import Layers
from tests.options.rig import NOBODY, error_of, mount_fields, mount_flags, mounted, python_as, run_as
from tests.support.mounts import MountFailed, our_mount

_OPENS = "os.open(sys.argv[1], os.O_RDONLY); print('opened')"


def test_read_only_mount_changes_nothing(layers: Layers, engine: str) -> None:
    (layers.lower / "f").write_text("lower")
    (layers.upper / "g").write_text("upper")
    before = layers.upper.stat().st_mtime_ns
    with mounted(layers, "ro", engine):
        assert "ro" in mount_flags(layers.mnt)
        assert sorted(os.listdir(layers.mnt)) == ["f", "g"]
        for change in (
            lambda: (layers.mnt / "f").write_text(""),
            lambda: (layers.mnt / "g").chmod(0o600),
            lambda: (layers.mnt / "g").unlink(),
            lambda: (layers.mnt / "d").mkdir(),
            lambda: os.setxattr(layers.mnt / "g", "user.key", b""),
            lambda: os.utime(layers.mnt / "f"),
        ):
            assert error_of(change) == errno.EROFS
    assert (os.listdir(layers.upper), os.listdir(layers.work)) == (["g"], [])
    assert layers.upper.stat().st_mtime_ns == before
    with mounted(layers, "ro,rw", engine):
        assert "rw" in mount_flags(layers.mnt)
        (layers.mnt / "f").write_text("upper")


def test_devices_and_set_id_and_programs_work_unless_forbidden(layers: Layers, engine: str) -> None:
    os.mknod(layers.lower / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    shutil.copy("/usr/bin/id", layers.lower / "id")
    (layers.lower / "id").chmod(0o4755)
    program, device = layers.mnt / "id", layers.mnt / "null"
    with mounted(layers, "nodev,nosuid,noexec,dev,suid,exec", engine):
        assert python_as(NOBODY, _OPENS, device) == "opened"
        assert run_as(NOBODY, program, "-u").stdout == "0\n"
        assert not {"nodev", "nosuid", "noexec"} & set(mount_flags(layers.mnt))
    with mounted(layers, "nodev,nosuid", engine):
        assert {"nodev", "nosuid"} <= set(mount_flags(layers.mnt))
        assert python_as(NOBODY, _OPENS, device) == "EACCES"
        assert run_as(NOBODY, program, "-u").stdout == f"{NOBODY}\n"
    with mounted(layers, "noexec", engine):
        done = run_as(NOBODY, program, "-u")
        assert (done.returncode, "Permission denied" in done.stderr) == (126, True)


def aged(path: Path) -> Path:
    """The access time long before the other times, so that any rule for access times would set it anew."""
    os.utime(path, (1000, 2000))
    return path


def access_times(layers: Layers) -> dict[str, bool]:
    """Of which objects looking at them has set the access time, as the mount shows it."""
    names = ("upper", "lower", "d", "recent")
    before = {name: (layers.mnt / name).stat().st_atime_ns for name in names}
    for name in names:
        os.listdir(layers.mnt / name) if name == "d" else (layers.mnt / name).read_text()
    return {name: (layers.mnt / name).stat().st_atime_ns != before[name] for name in names}


@pytest.mark.parametrize(
    ("options", "set_for"),
    [
        ("", set()),
        ("atime", {"upper", "d"}),
        ("strictatime", {"upper", "d", "recent"}),
        ("relatime", {"upper", "d"}),
        ("atime,nodiratime", {"upper"}),
    ],
)
def test_access_times_are_set_where_asked_for(layers: Layers, engine: str, options: str, set_for: set[str]) -> None:
    (layers.upper / "upper").write_text("x")
    (layers.lower / "lower").write_text("x")
    (layers.upper / "d").mkdir()
    (layers.upper / "d" / "x").write_text("")
    (layers.upper / "recent").write_text("x")
    os.utime(layers.upper / "recent", (time.time() + 100, time.time()))
    for path in (layers.upper / "upper", layers.lower / "lower", layers.upper / "d"):
        aged(path)
    with mounted(layers, options, engine):
        found = access_times(layers)
        assert {name for name, changed in found.items() if changed} == set_for
        flags = set(mount_flags(layers.mnt))
        assert ("noatime" in flags) == (options == "")
        assert ("nodiratime" in flags) == options.endswith("nodiratime")
    # a lower layer is never changed
    assert (layers.lower / "lower").stat().st_atime == 1000


def test_root_lets_everyone_in_by_default_and_modes_decide(layers: Layers, engine: str) -> None:
    (layers.lower / "open").write_text("")
    (layers.lower / "closed").write_text("")
    (layers.lower / "closed").chmod(0o600)
    os.chown(layers.lower / "closed", 7, 7)
    with mounted(layers, engine):
        assert {"allow_other", "default_permissions"} <= set(mount_flags(layers.mnt))
        assert python_as(NOBODY, _OPENS, layers.mnt / "open") == "opened"
        assert python_as(NOBODY, _OPENS, layers.mnt / "closed") == "EACCES"
        assert python_as(7, _OPENS, layers.mnt / "closed") == "opened"
        assert python_as(NOBODY, "os.unlink(sys.argv[1])", layers.mnt / "open") == "EACCES"


def test_allow_root_keeps_others_out_of_what_is_cached_too(layers: Layers, engine: str) -> None:
    (layers.lower / "f").write_text("open to all")
    with mounted(layers, "allow_root", engine):
        assert (layers.mnt / "f").read_text() == "open to all"
        assert os.listdir(layers.mnt) == ["f"]
        for script in (
            _OPENS,
            "os.stat(sys.argv[1])",
            "os.listdir(os.path.dirname(sys.argv[1]))",
            "os.statvfs(os.path.dirname(sys.argv[1]))",
            "os.readlink(sys.argv[1])",
        ):
            assert python_as(NOBODY, script, layers.mnt / "f") == "EACCES", script
        assert python_as(0, _OPENS, layers.mnt / "f", gid=5) == "opened"
    with pytest.raises(MountFailed, match="allow_other and allow_root exclude each other"):
        with mounted(layers, "allow_root,allow_other", engine):
            pass


@pytest.mark.parametrize(("name", "shown"), [("name", "name"), ("a b\\,c", "a\\040b,c")])
def test_fsname_is_the_source_in_the_table_of_mounts(layers: Layers, engine: str, name: str, shown: str) -> None:
    with mounted(layers, f"fsname={name}", engine):
        assert mount_fields(layers.mnt)[0] == shown
        assert mount_fields(layers.mnt)[2] == "fuse.overlayfs-py"


def test_options_without_an_effect_are_warned_of_and_mount(layers: Layers, engine: str) -> None:
    log = layers.base / "log"
    context = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    with mounted(layers, "", "frobnicate", "colour=red", context, "", engine, log=log):
        assert os.listdir(layers.mnt) == []
    said = log.read_text()
    assert "option frobnicate has no effect here; ignored" in said
    assert "option colour=red has no effect here; ignored" in said
    if not Path("/sys/fs/selinux/enforce").exists():
        assert "option context has no effect without SELinux; ignored" in said


def test_options_for_others_are_ignored_without_a_word(layers: Layers, engine: str) -> None:
    log = layers.base / "log"
    ignored = "private,slave,shared,unbindable,rprivate,rslave,rshared,runbindable,_netdev,nofail,user,nouser,users"
    more = "owner,group,auto,noauto,defaults,comment=x,silent,loud,nomand,x-systemd.automount,norelatime,nostrictatime"
    with mounted(layers, ignored, more, "nfs_export=off,verity=off,io=cached", engine, log=log):
        assert os.listdir(layers.mnt) == []
    assert "ignored" not in log.read_text()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("nfs_export=on,engine=portable", "nfs_export=on takes the native engine"),
        ("verity=on", "verity=on is not supported"),
        ("verity=require", "verity=require is not supported"),
        ("remount", "remount is not supported"),
        ("metacopy=on,userxattr", "metacopy=on and userxattr exclude each other"),
        ("metacopy=on,redirect_dir=off", "metacopy=on needs redirect_dir=on"),
    ],
)
def test_options_that_would_be_missed_are_refused(layers: Layers, option: str, says: str) -> None:
    with pytest.raises(MountFailed, match=says):
        with our_mount(layers.mnt, [layers.lower], layers.upper, layers.work, option):
            pass
    assert os.listdir(layers.work) == []


def test_uring_is_turned_on_and_used_where_asked_for(layers: Layers, engine: str, over_uring: None) -> None:
    (layers.lower / "f").write_text("lower")
    with mounted(layers, engine) as live:
        (layers.mnt / "f").write_text("upper")
        assert (layers.mnt / "f").read_text() == "upper"
        descriptors = []
        for entry in Path(f"/proc/{live.pid}/fd").iterdir():
            # Those that serve a request come and go.
            with contextlib.suppress(FileNotFoundError):
                descriptors.append(os.readlink(entry))
    rings = [target for target in descriptors if "io_uring" in target]
    assert bool(rings) == ("uring=on" in engine)

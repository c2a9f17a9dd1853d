"""The same without root: in a user namespace that all commands of a user share."""

import os
import signal
from pathlib import Path

from tests.runtime.conftest import USER, Ovl, within
from tests.runtime.test_network import SERVER, fetch, port_of

RUN = ("run", "--network", "none")


def test_a_user_runs_containers_as_root_does(rootless: Ovl) -> None:
    assert rootless.out(*RUN, "--rm", "busy") == "default hello /data 33\n"
    script = "id -u; echo mine > /file; chown 7:8 /file; stat -c %u:%g /file; cat /proc/self/uid_map"
    words = rootless.out(*RUN, "--name", "own", "-u", "root", "busy", "sh", "-c", script).split()
    assert words == ["0", "7:8", "0", str(USER), "1", "1", "200000", "65535"]
    assert os.stat(rootless.home("own") / "upper/file").st_uid == 200006
    assert rootless.out("diff", "own") == "C /file\n"
    rootless.run("commit", "own", "changed")
    assert rootless.out(*RUN, "--rm", "changed", "cat", "/file") == "mine\n"
    rootless.run(*RUN, "--rm", "busy", "sh", "-c", "exit 7", status=7)


def test_commands_of_a_user_share_what_runs(rootless: Ovl) -> None:
    rootless.run(*RUN, "-d", "--name", "long", "-v", "kept:/kept", "-u", "root", "busy", "sleep", "60")
    assert rootless.out("exec", "-u", "www", "long", "id", "-u") == "33\n"
    rootless.run("exec", "long", "touch", "/kept/a")
    (rootless.base / "given").write_text("given\n")
    rootless.run("cp", "given", "long:/given")
    assert rootless.out("exec", "long", "cat", "/given") == "given\n"
    assert "sleep 60" in rootless.out("top", "long")
    rootless.run("commit", "long", "still")
    assert rootless.out(*RUN, "--rm", "-v", "kept:/k:ro", "still", "ls", "/given", "/k") == "/given\n\n/k:\na\n"
    rootless.run("stop", "-t", "0", "long")
    assert rootless.row("long")["ExitCode"] == 137


def test_a_killed_monitor_of_a_user_leaves_nothing_running(rootless: Ovl) -> None:
    rootless.run("run", "-d", "--name", "victim", "-p", "80", "busy", "sleep", "60")
    status = rootless.status("victim")
    os.kill(status["monitor"]["pid"], signal.SIGKILL)
    assert rootless.row("victim")["State"] == "exited"
    for key in ("process", "daemon"):
        assert within(5, lambda key=key: not running(status[key]["pid"]))  # type: ignore[misc]
    rootless.run("start", "victim")
    assert rootless.row("victim")["State"] == "running"


def running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ports_of_a_user_are_published_by_pasta(rootless: Ovl) -> None:
    rootless.run("run", "-d", "--name", "web", "-p", "80", "busy", "sh", "-c", SERVER)
    port = port_of(rootless, "web", "80/tcp")
    assert fetch(port) == "hello\n"
    assert "it is in use" in rootless.error("run", "-p", f"{port}:80", "busy", status=125)
    assert [row["Name"] for row in rootless.rows()] == ["web"]


def test_a_user_who_may_not_open_fuse_is_told(rootless: Ovl) -> None:
    os.chmod("/dev/fuse", 0o600)
    assert rootless.error(*RUN, "busy", status=125) == "cannot open /dev/fuse: Permission denied"
    assert rootless.rows() == []


def test_a_mount_that_nobody_would_see_is_refused(rootless: Ovl) -> None:
    target = rootless.base / "mnt"
    target.mkdir()
    assert "only ovl itself would see a mount" in rootless.error("mount", "busy", target, status=1)
    assert not list(rootless.base.glob("**/daemon-*"))
    assert "no image and no container is mounted" in rootless.error("umount", target, status=1)


def test_a_limit_that_a_user_can_not_set_is_an_error(rootless: Ovl) -> None:
    assert rootless.error(*RUN, "--memory", "20m", "busy", status=125).startswith("--memory cannot be set")
    assert rootless.rows() == []


def test_a_user_without_ranges_runs_what_root_alone_can(alone: Ovl) -> None:
    assert alone.out(*RUN, "--rm", "-u", "0", "busy", "cat", "/proc/self/uid_map").split() == ["0", str(USER), "1"]
    alone.run("run", "-d", "--name", "own", "-p", "80", "-u", "0", "busy", "sh", "-c", SERVER)
    assert fetch(port_of(alone, "own", "80/tcp")) == "hello\n"
    assert b"Invalid argument" in alone.run("exec", "own", "chown", "7", "/file", status=1).stderr
    alone.run("exec", "own", "sh", "-c", "echo mine > /file")
    assert alone.out("diff", "own").startswith("C /file\n")
    alone.run("commit", "own", "changed")
    alone.run("rm", "-f", "own")
    assert alone.out(*RUN, "--rm", "-u", "0", "changed", "cat", "/file") == "mine\n"


def test_a_user_without_ranges_is_told_what_takes_them(alone: Ovl) -> None:
    alone.run("rmi", "busy")
    assert alone.error("load", "-i", alone.layout, status=0).startswith("warning: 2 files are root's that were another")
    line = alone.error(*RUN, "busy", status=125)
    assert line.startswith("the user www has the ids 33:33, which are not mapped here: use -u 0, or have ranges in")
    assert alone.rows() == []


def test_a_store_of_many_owners_is_not_that_of_one(rootless: Ovl) -> None:
    for table in ("/etc/subuid", "/etc/subgid"):
        Path(table).write_text("")
    assert "holds files of many owners, for which there are no ids now" in rootless.error("images", status=1)

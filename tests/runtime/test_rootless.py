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


def test_a_limit_that_a_user_can_not_set_is_an_error(rootless: Ovl) -> None:
    assert rootless.error(*RUN, "--memory", "20m", "busy", status=125).startswith("--memory cannot be set")
    assert rootless.rows() == []

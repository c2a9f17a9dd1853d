"""What a container runs, as whom, where, and what comes out of it."""

import dataclasses
import os
import pty
import select
import signal
import subprocess
import termios
from pathlib import Path
from typing import IO

import pytest

from tests.runtime.conftest import Ovl, within

RUN = ("run", "--rm", "--network", "none")


def test_the_command_environment_user_and_directory_of_the_image_apply(ovl: Ovl) -> None:
    assert ovl.out(*RUN, "busy") == "default hello /data 33\n"


def test_options_take_the_place_of_what_the_image_says(ovl: Ovl) -> None:
    file = ovl.base / "env"
    file.write_text("# a comment\n\nFROM=file\nGREETING=file\n")
    options = ("-e", "GREETING=hi", "--env-file", file, "-w", "/tmp", "-u", "root", "-h", "somewhere")
    script = "echo $GREETING $FROM $(pwd) $(id -u) $(hostname) $HOME"
    assert ovl.out(*RUN, *options, "busy", "sh", "-c", script) == "hi file /tmp 0 somewhere /root\n"


def test_an_entrypoint_replaces_the_command_of_the_image(ovl: Ovl) -> None:
    assert ovl.out(*RUN, "--entrypoint", "/script", "busy", "a", "b c") == "entry a b c\n"
    assert ovl.out(*RUN, "--entrypoint", "/script", "busy") == "entry\n"


def test_groups_of_a_user_are_those_of_the_image(ovl: Ovl) -> None:
    assert ovl.out(*RUN, "busy", "id", "-G") == "33 44\n"
    assert ovl.out(*RUN, "-u", "www:root", "busy", "id", "-G") == "0\n"
    assert ovl.out(*RUN, "-u", "7:8", "busy", "sh", "-c", "id -u; id -G") == "7\n8\n"


def test_exit_codes_go_through(ovl: Ovl) -> None:
    ovl.run(*RUN, "busy", "sh", "-c", "exit 7", status=7)
    ovl.run(*RUN, "busy", "sh", "-c", "sh -c 'kill -9 $$'; exit $?", status=137)
    assert ovl.error(*RUN, "busy", "nosuch", status=127) == "there is no program 'nosuch' in the container"
    assert ovl.error(*RUN, "busy", "/file", status=126) == "cannot run '/file': permission denied"
    assert ovl.rows() == []


def test_standard_streams_are_plain_pipes_and_stay_apart(ovl: Ovl) -> None:
    data = os.urandom(3 << 20)
    assert ovl.run(*RUN, "-i", "busy", "cat", stdin=data).stdout == data
    done = ovl.run(*RUN, "busy", "sh", "-c", "echo out; echo err >&2; cat", stdin=b"not asked for")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_streams_that_are_not_there_are_as_empty_ones(ovl: Ovl) -> None:
    script = 'exec "$@" 0<&- 1>&- 2>&-'
    for words in (("busy", "echo", "said"), ("-i", "busy", "cat")):
        closed = dataclasses.replace(ovl, command=("sh", "-c", script, "sh", *ovl.command))
        done = closed.run("run", "--name", "closed", "--network", "none", *words)
        assert (done.stdout, done.stderr) == (b"", b"")
        assert ovl.out("logs", "closed") == ("said\n" if "echo" in words else "")
        ovl.run("rm", "closed")


def test_a_reader_that_goes_away_ends_the_client(ovl: Ovl) -> None:
    process = ovl.start("run", "--name", "talker", "--network", "none", "busy", "yes", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE
    assert ovl.row("talker")["State"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_container(ovl: Ovl, number: signal.Signals) -> None:
    script = f"trap 'exit {40 + number}' {number:d}; echo ready; while :; do sleep 0.05; done"
    process = ovl.start(*RUN, "busy", "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(20) == 40 + number


def in_terminal(ovl: Ovl, *words: str, typed: bytes = b"") -> tuple[int, bytes]:
    """Status and output of a command with a terminal, in which is typed what is given once there is a prompt."""
    ours, theirs = pty.openpty()
    process = ovl.start(*words, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with open(ours, "r+b", buffering=0) as terminal:
        while True:
            try:
                data = terminal.read(4096)
            except OSError:
                # The last one who had it open has ended.
                break
            seen += data
            if typed and b"# " in seen:
                terminal.write(typed)
                typed = b""
    return process.wait(20), seen


def test_a_terminal_is_one_on_both_sides(ovl: Ovl) -> None:
    status, seen = in_terminal(ovl, *RUN, "-it", "-u", "root", "busy", "sh", typed=b"tty; echo a$((1+1))b; exit 5\r")
    assert status == 5
    assert b"/dev/pts/0" in seen and b"a2b" in seen
    assert "needs a terminal" in ovl.error(*RUN, "-it", "busy", "sh", status=125)


def test_keys_leave_a_container_and_attach_comes_back_to_it(ovl: Ovl) -> None:
    words = ("run", "--name", "shell", "--network", "none", "-it", "-u", "root", "busy", "sh")
    assert in_terminal(ovl, *words, typed=b"\x10\x11")[0] == 0
    assert ovl.row("shell")["State"] == "running"
    ours, theirs = pty.openpty()
    process = ovl.start("attach", "shell", stdin=theirs, stdout=theirs, stderr=theirs)
    assert within(10, lambda: not termios.tcgetattr(theirs)[3] & termios.ICANON)
    os.write(ours, b"exit 6\r")
    assert process.wait(20) == 6
    assert termios.tcgetattr(theirs)[3] & termios.ICANON
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("hang_up", ["the terminal closes", "the signal comes"])
def test_a_terminal_that_is_gone_ends_the_client_alone(ovl: Ovl, hang_up: str) -> None:
    ours, theirs = pty.openpty()
    words = ("run", "--name", "left", "--network", "none", "-it", "-u", "root", "busy", "sh")
    process = ovl.start(*words, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert select.select([ours], [], [], 20)[0]
    if hang_up == "the signal comes":
        process.send_signal(signal.SIGHUP)
    else:
        os.close(ours)
    assert process.wait(20) == 128 + signal.SIGHUP
    if hang_up == "the signal comes":
        os.close(ours)
    assert ovl.row("left")["State"] == "running"
    assert ovl.out("exec", "left", "echo", "goes on") == "goes on\n"


def test_a_terminal_has_the_size_of_the_one_outside(ovl: Ovl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "7")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (31, 101))
    process = ovl.start(*RUN, "-it", "busy", "sh", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with open(ours, "r+b", buffering=0) as terminal:
        assert within(20, lambda: answers(terminal, b"stty size\r", b"31 101"))
        termios.tcsetwinsize(ours, (42, 99))
        # As the kernel does to the processes of a terminal, of which it is none here.
        process.send_signal(signal.SIGWINCH)
        assert within(20, lambda: answers(terminal, b"stty size\r", b"42 99"))
        terminal.write(b"exit 3\r")
        assert process.wait(20) == 3


def answers(terminal: IO[bytes], typed: bytes, wanted: bytes) -> bool:
    """Whether this comes soon when that is typed."""
    terminal.write(typed)
    seen = b""
    while wanted not in seen and select.select([terminal], [], [], 0.5)[0]:
        seen += terminal.read(4096)
    return wanted in seen


def test_exec_runs_further_commands(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "host", "--network", "none", "busy", "sleep", "60")
    assert (
        ovl.out("exec", "-e", "A=b", "-w", "/tmp", "host", "sh", "-c", "echo $A $GREETING $(pwd)") == "b hello /tmp\n"
    )
    assert ovl.out("exec", "-u", "root", "-i", "host", "sh", "-c", "id -u; cat", stdin=b"fed") == "0\nfed"
    done = ovl.run("exec", "host", "sh", "-c", "echo err >&2; exit 9", status=9)
    assert (done.stdout, done.stderr) == (b"", b"err\n")
    assert ovl.error("exec", "host", "nosuch", status=127) == "there is no program 'nosuch' in the container"
    ovl.run("exec", "-d", "host", "touch", "/tmp/made")
    assert within(5, lambda: (ovl.home("host") / "upper/tmp/made").exists())
    status, seen = in_terminal(ovl, "exec", "-it", "host", "tty")
    assert status == 0 and b"/dev/pts/" in seen
    ovl.run("kill", "host")
    assert within(10, lambda: ovl.row("host")["State"] == "exited")
    assert ovl.error("exec", "host", "true", status=1) == "container host is not running"


def test_the_root_is_confined(ovl: Ovl) -> None:
    script = (
        "mount -t tmpfs x /tmp; mknod /tmp/d b 8 0 && cat /tmp/d; echo > /proc/sys/kernel/domainname; hostname x; :"
    )
    done = ovl.run(*RUN, "-u", "root", "busy", "sh", "-c", script)
    for words in (b"mount:", b"can't open", b"domainname", b"hostname:"):
        assert words in done.stderr, done.stderr
    caps = ovl.out(
        *RUN, "-u", "root", "--cap-drop", "ALL", "--cap-add", "CHOWN", "busy", "grep", "CapEff", "/proc/self/status"
    )
    assert int(caps.split()[1], 16) == 1


def test_a_read_only_root_takes_nothing_but_in_its_tmpfs(ovl: Ovl) -> None:
    options = ("--read-only", "--tmpfs", "/run:size=64k,mode=1777", "-u", "root")
    done = ovl.run(
        *RUN, *options, "-u", "root", "busy", "sh", "-c", "echo a > /run/x && cat /run/x; echo b > /x", status=1
    )
    assert done.stdout == b"a\n" and b"Read-only file system" in done.stderr
    full = ovl.run(
        *RUN, *options, "-u", "root", "busy", "dd", "if=/dev/zero", "of=/run/x", "bs=1k", "count=65", status=1
    )
    assert b"No space left" in full.stderr


def test_limits_hold(ovl: Ovl) -> None:
    options = ("--memory", "16m", "--pids-limit", "5", "-u", "root")
    script = "for i in 1 2 3 4 5 6 7; do sleep 2 & done; wait"
    assert b"can't fork" in ovl.run(*RUN, *options, "busy", "sh", "-c", script, status=None).stderr
    ovl.run("run", "--name", "eater", "--network", "none", *options, "busy", "tail", "/dev/zero", status=137)
    assert '"OOMKilled": true' in ovl.out("inspect", "eater")
    script = "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us || cat /sys/fs/cgroup/cpu.max"
    assert ovl.out(*RUN, "--cpus", "0.5", "busy", "sh", "-c", script).startswith("50000")


def test_output_is_kept_and_read_back(ovl: Ovl) -> None:
    script = "printf 'one\\ntwo\\n'; printf '\\377half' >&2; sleep 0.2; printf 'three\\n'"
    ovl.run("run", "--name", "printer", "--network", "none", "busy", "sh", "-c", script)
    done = ovl.run("logs", "printer")
    assert (done.stdout, done.stderr) == (b"one\ntwo\nthree\n", b"\xffhalf")
    assert ovl.out("logs", "-n", "1", "printer") == "three\n"
    assert ovl.out("logs", "-t", "printer").split("\n")[1].endswith("Z two")


def test_logs_follow_a_container_to_its_end(ovl: Ovl) -> None:
    script = "echo first; sleep 0.5; echo last"
    ovl.run("run", "-d", "--name", "slow", "--network", "none", "busy", "sh", "-c", script)
    assert ovl.out("logs", "-f", "slow") == "first\nlast\n"


def test_a_damaged_log_record_costs_only_itself(ovl: Ovl) -> None:
    ovl.run("run", "--name", "torn", "--network", "none", "busy", "echo", "whole")
    log: Path = ovl.home("torn") / "log"
    with log.open("ab") as file:
        file.write(b'{"time": "2026')
    ovl.run("start", "-a", "torn")
    assert ovl.out("logs", "torn") == "whole\nwhole\n"

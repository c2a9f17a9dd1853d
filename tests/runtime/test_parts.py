"""Options, names and users, without a container."""

import os
import socket
from pathlib import Path

import pytest

from overlayfs_py.runtime import client, frames, names, users
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.process import Process
from overlayfs_py.runtime.spec import (
    Port,
    Spec,
    Volume,
    merge_env,
    parse_memory,
    parse_ports,
    parse_signal,
    parse_tmpfs,
)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("80", [Port(0, 80)]),
        ("8080:80", [Port(8080, 80)]),
        ("127.0.0.1:8080:80", [Port(8080, 80, address="127.0.0.1")]),
        ("127.0.0.1::80/udp", [Port(0, 80, "udp", "127.0.0.1")]),
        ("[::1]:53:5353/udp", [Port(53, 5353, "udp", "::1")]),
        ("8000-8001:80-81", [Port(8000, 80), Port(8001, 81)]),
    ],
)
def test_ports_are_written_as_in_docker(text: str, ports: list[Port]) -> None:
    assert parse_ports(text) == ports


@pytest.mark.parametrize("text", ["", ":", "0", "65536", "1:2:3:4", "x:80:80", "1-2:3", "80/icmp", "-1:80", "1:2-"])
def test_ports_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ContainerError, match="-p "):
        parse_ports(text)


def test_numbers_have_units_and_signals_names() -> None:
    assert [parse_memory(text) for text in ("6m", "1g", "1.5G", "8388608", "512MiB")] == [
        6 << 20,
        1 << 30,
        3 << 29,
        8 << 20,
        512 << 20,
    ]
    assert [parse_signal(text) for text in ("9", "KILL", "sigterm", "SIGRTMIN+1")] == [9, 9, 15, 35]
    assert parse_tmpfs("/run:size=1m,exec") == ("/run", "nosuid,nodev,size=1m,exec")
    assert merge_env(["A=1", "B=2"], ["A=3"]) == ("A=3", "B=2")


def test_a_spec_survives_being_written() -> None:
    spec = Spec(args=("a",), volumes=(Volume("/x", name="v"),), ports=(Port(1, 2),), tmpfs=(("/t", "ro"),), cpus=0.5)
    assert Spec.from_json(spec.to_json()) == spec


def test_ids_never_read_as_numbers_and_names_are_names() -> None:
    assert not any(names.new_id()[:12].isdigit() for _ in range(100))
    assert all(names.check(names.invent()) for _ in range(100))


def test_frames_come_whole_from_any_pieces() -> None:
    stream = frames.frame(b"o", b"out") + frames.frame(b"e") + frames.json_frame(b"x", {"code": 1})
    reader = frames.Reader()
    seen = [frame for at in range(len(stream)) for frame in reader.feed(stream[at : at + 1])]
    assert seen == [(b"o", b"out"), (b"e", b""), (b"x", b'{"code": 1}')]
    with pytest.raises(frames.BadFrame):
        list(reader.feed(b"o\xff\xff\xff\xff"))


def test_users_are_read_below_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "real").mkdir()
    (tmp_path / "secret").write_text("root:x:66:66::/:\n")
    (root / "etc/passwd").symlink_to("/real/passwd")
    (root / "real/passwd").write_text("me:x:5:6::/home/me:/bin/sh\nbroken\n7:x:70:70::relative:\n")
    os.mkfifo(root / "etc/group")
    fd = os.open(root, os.O_PATH)
    try:
        assert users.resolve(fd, "me") == users.User(5, 6, (), "/home/me")
        assert users.resolve(fd, "7") == users.User(70, 70, (), "/")
        assert users.resolve(fd, "8:9") == users.User(8, 9, (), "/")
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to("../../secret")
        assert users.resolve(fd, "") == users.User(0, 0, (), "/")
        for text in ("me", "0:", "0:wheel", "99999999999", "-1"):
            with pytest.raises(ContainerError):
                users.resolve(fd, text)
    finally:
        os.close(fd)


def test_a_process_is_known_by_more_than_its_pid() -> None:
    me = Process.of(os.getpid())
    assert me is not None and me.alive()
    assert not Process(me.pid, me.start + 1, me.boot).alive()
    assert not Process(me.pid, me.start, "another boot").alive()
    assert not Process(me.pid, me.start + 1, me.boot).send(9)
    child = os.fork()
    if child == 0:
        os._exit(0)
    theirs = Process.of(child)
    assert theirs is not None and theirs.wait(10) and not theirs.alive()
    os.waitpid(child, 0)


def test_a_client_that_comes_to_the_word_after_the_end_takes_what_was_said(capfd: pytest.CaptureFixture[str]) -> None:
    ours, monitors = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with monitors:
            monitors.sendall(frames.frame(frames.STDOUT, b"said\n") + frames.json_frame(frames.ENDED, {"code": 7}))
        assert client.attach(ours, stdin=False, terminal=False, forward=None) == 7
    assert capfd.readouterr().out == "said\n"

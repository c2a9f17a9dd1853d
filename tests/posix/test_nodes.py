"""Sockets, FIFOs and devices on the mount are those of the kernel."""

import errno
import os
import socket
import stat

import pytest

from tests.posix.files import make
from tests.posix.rig import OTHER, OWNER, Root, as_user, child, fails, opened, prepared, read, read_all, write


def build_directory() -> None:
    os.mkdir("d")
    os.chmod("d", 0o777)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
@prepared(build_directory)
def test_a_socket_is_bound_and_connected(root: Root, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind("d/s")
        server.listen()
        assert stat.S_ISSOCK(os.lstat("d/s").st_mode)

        def talk() -> bytes:
            with socket.socket(socket.AF_UNIX, kind) as client:
                client.connect("d/s")
                client.sendall(b"question")
                return client.recv(100)

        os.chmod("d/s", 0o666)
        with child(talk, OTHER) as process:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(100) == b"question"
                connection.sendall(b"answer")
            assert process.join() == b"answer"


@prepared(build_directory)
def test_datagrams_reach_a_socket_by_each_of_its_names(root: Root) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("d/s")
        os.link("d/s", "d/t")
        os.rename("d/s", "d/u")
        os.chmod("d/t", 0o600)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            for name in ("d/t", "d/u"):
                client.sendto(name.encode(), name)
                assert server.recv(100) == name.encode()
            with fails(errno.ENOENT):
                client.sendto(b"x", "d/s")


@prepared(build_directory)
def test_connecting_needs_the_right_to_write_the_socket(root: Root) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("d/s")
        server.listen()
        os.chmod("d/s", 0o600)

        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("d/s")

        with fails(errno.EACCES):
            as_user(OTHER, connect)
        os.chmod("d/s", 0o602)
        as_user(OTHER, connect)


@prepared(lambda: make("socket"))
def test_a_socket_that_nobody_serves_refuses(root: Root) -> None:
    with socket.socket(socket.AF_UNIX) as client, fails(errno.ECONNREFUSED):
        client.connect("f")
    os.unlink("f")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("f")
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("f")


@prepared(lambda: make("fifo"))
def test_a_fifo_joins_processes(root: Root) -> None:
    os.chmod("f", 0o666)

    def produce() -> None:
        with opened("f", os.O_WRONLY) as descriptor:
            for number in range(100):
                os.write(descriptor, b"%03d" % number)

    with child(produce, OTHER) as process:
        with opened("f") as descriptor:
            data = read_all(descriptor)
        process.join()
    assert data == b"".join(b"%03d" % number for number in range(100))
    assert os.lstat("f").st_size == 0


@prepared(lambda: make("fifo"))
def test_a_fifo_stays_joined_when_it_is_changed_or_removed(root: Root) -> None:
    with opened("f", os.O_RDWR) as first, opened("f", os.O_WRONLY | os.O_NONBLOCK) as second:
        os.chmod("f", 0o600)
        os.chown("f", OWNER.uid, OWNER.gid)
        with opened("f", os.O_WRONLY | os.O_NONBLOCK) as third:
            os.write(third, b"third")
        os.rename("f", "g")
        os.write(second, b"second")
        assert os.read(first, 100) == b"thirdsecond"
        os.unlink("g")
        os.write(second, b"gone")
        assert os.read(first, 100) == b"gone"


def build_devices() -> None:
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod("zero", stat.S_IFCHR | 0o444, os.makedev(1, 5))
    os.mknod("none", stat.S_IFCHR | 0o666, os.makedev(4000, 1))
    os.mknod("disk", stat.S_IFBLK | 0o666, os.makedev(4000, 1))
    for name, mode in (("null", 0o666), ("zero", 0o444), ("none", 0o666), ("disk", 0o666)):
        os.chmod(name, mode)


@prepared(build_devices)
def test_device_nodes_lead_to_their_devices(root: Root) -> None:
    for name in ("null", "zero"):
        with root.touches(here=""):
            assert as_user(OTHER, os.path.exists, name)
    with opened("zero") as descriptor:
        assert os.read(descriptor, 5) == b"\0" * 5
    with opened("null", os.O_RDWR) as descriptor:
        assert os.write(descriptor, b"gone") == 4
        assert os.read(descriptor, 5) == b""
    with fails(errno.EACCES):
        as_user(OTHER, os.open, "zero", os.O_WRONLY)
    for name in ("none", "disk"):
        with fails(errno.ENXIO):
            os.open(name, os.O_RDONLY)


@prepared(build_devices)
def test_a_device_node_keeps_its_number_when_it_changes(root: Root) -> None:
    os.chmod("zero", 0o400)
    os.chown("zero", OWNER.uid, OWNER.gid)
    os.rename("zero", "moved")
    os.link("moved", "second")
    assert os.lstat("second").st_rdev == os.makedev(1, 5)
    assert as_user(OWNER, lambda: os.read(os.open("second", os.O_RDONLY), 3)) == b"\0\0\0"
    with opened("null", os.O_WRONLY | os.O_TRUNC):
        pass
    assert stat.S_ISCHR(os.lstat("null").st_mode)


@prepared(build_directory)
def test_a_pid_file_and_its_socket_can_be_replaced_again_and_again(root: Root) -> None:
    for number in range(5):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("d/s")
        write("d/pid.new", b"%d" % number)
        os.rename("d/pid.new", "d/pid")
        os.unlink("d/s")
    assert os.listdir("d") == ["pid"]
    assert read("d/pid") == b"4"

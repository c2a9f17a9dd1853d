"""Networks and published ports."""

import contextlib
import dataclasses
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.runtime.conftest import Ovl, within

SERVER = "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp"


def port_of(ovl: Ovl, name: str, inside: str) -> int:
    lines = ovl.out("port", name).splitlines()
    return next(int(line.rpartition(":")[2]) for line in lines if line.startswith(inside))


def fetch(port: int, address: str = "127.0.0.1") -> str:
    """What the server answers; waits until it listens."""
    deadline = time.monotonic() + 10
    while True:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            connection.close()


def test_a_published_port_answers(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "web", "-p", "80", "busy", "sh", "-c", SERVER)
    port = port_of(ovl, "web", "80/tcp")
    assert f"0.0.0.0:{port}->80/tcp" in ovl.out("ps")
    assert [fetch(port) for _ in range(3)] == ["hello\n"] * 3
    assert f"{port}" in ovl.error("run", "--name", "late", "-p", f"{port}:80", "busy", status=125)
    assert [row["Name"] for row in ovl.rows()] == ["web"]
    ovl.run("restart", "-t", "0", "web")
    assert fetch(port_of(ovl, "web", "80/tcp")) == "hello\n"
    ovl.run("kill", "web")
    ovl.run("wait", "web")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("0.0.0.0", port))


def test_large_streams_go_through_a_port_both_ways(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "echo", "-p", "127.0.0.1::7", "busy", "nc", "-ll", "-p", "7", "-e", "cat")
    data = bytes(range(256)) * 8192
    with socket.create_connection(("127.0.0.1", port_of(ovl, "echo", "7/tcp")), timeout=20) as client:
        received = b""
        client.setblocking(True)
        sent = 0
        while len(received) < len(data):
            if sent < len(data):
                sent += client.send(data[sent : sent + 65536])
                if sent == len(data):
                    client.shutdown(socket.SHUT_WR)
            received += client.recv(65536)
    assert received == data


ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 7))
while True:
    data, client = server.recvfrom(100)
    server.sendto(data[::-1], client)
"""


def test_datagrams_go_through_a_port_and_answers_come_back(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "echo", "-p", "7/udp", "busy", "sleep", "60")
    port = port_of(ovl, "echo", "7/udp")
    inside = ["nsenter", "--net", "--target", str(ovl.status("echo")["process"]["pid"])]
    with subprocess.Popen([*inside, sys.executable, "-c", ECHO]) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.3)
            client.connect(("127.0.0.1", port))

            def answered() -> bool:
                client.send(b"ping")
                try:
                    return client.recv(100) == b"gnip"
                except TimeoutError:
                    return False

            assert within(10, answered)
        server.kill()


def test_a_network_of_its_own_reaches_the_host_and_none_reaches_nothing(ovl: Ovl) -> None:
    script = "ip -o -4 addr show dev eth0; ip route"
    out = ovl.out("run", "--rm", "busy", "sh", "-c", script)
    assert "default via 10.213." in out
    ping = 'ping -c 1 -W 5 $(ip route | grep default | cut -d" " -f3)'
    assert "1 packets received" in ovl.out("run", "--rm", "-u", "root", "busy", "sh", "-c", ping)
    links = ovl.out("run", "--rm", "--network", "none", "busy", "ip", "-o", "link").splitlines()
    assert [line.split()[1] for line in links] == ["lo:"]
    theirs = ovl.out("run", "--rm", "--network", "host", "busy", "readlink", "/proc/self/ns/net")
    assert theirs.strip() == str(Path("/proc/self/ns/net").readlink())


@pytest.fixture
def two_machines(ovl: Ovl) -> Iterator[tuple[str, str]]:
    """Two network namespaces that stand for machines, of which the first has a way out of IPv4 and IPv6: the second."""
    names = (f"ovl-near-{os.getpid()}", f"ovl-far-{os.getpid()}")
    near, far = names
    ip = partial(subprocess.run, check=True, capture_output=True)
    with contextlib.ExitStack() as stack:
        for name in names:
            ip(["ip", "netns", "add", name])
            stack.callback(ip, ["ip", "netns", "delete", name])
        ip(["ip", "-n", near, "link", "add", "out", "type", "veth", "peer", "name", "out", "netns", far])
        for name, number in ((near, 1), (far, 2)):
            for family, address in (("-4", f"198.51.100.{number}/24"), ("-6", f"2001:db8::{number}/64")):
                ip(["ip", "-n", name, family, "address", "add", address, "dev", "out", *(["nodad"] * (family == "-6"))])
            ip(["ip", "-n", name, "link", "set", "lo", "up"])
            ip(["ip", "-n", name, "link", "set", "out", "up"])
        ip(["ip", "-n", near, "route", "add", "default", "via", "198.51.100.2"])
        yield near, far


def test_what_a_network_of_its_own_sends_goes_out_as_the_hosts(ovl: Ovl, two_machines: tuple[str, str]) -> None:
    near, _ = two_machines
    there = dataclasses.replace(ovl, command=("nsenter", f"--net=/run/netns/{near}", *ovl.command))
    script = "ping -c 1 -W 5 198.51.100.2; ping -c 1 -W 5 2001:db8::2; ip -6 route; cat /etc/hosts"
    run = ("run", "--rm", "-u", "root", "-h", "here", "busy", "sh", "-c", script)
    without = there.run(*run, status=None)
    # The first has no way out of IPv6 yet, so its containers have no address of it.
    assert without.stdout.count(b"1 packets received") == 1 and b"fd4b:" not in without.stdout
    subprocess.run(["ip", "-n", near, "-6", "route", "add", "default", "via", "2001:db8::2"], check=True)
    done = there.out(*run)
    assert done.count("1 packets received") == 2
    assert re.search(r"^fd4b:\S+\there$", done, re.MULTILINE) and "default via fd4b:" in done


def test_a_port_is_published_for_both_families(ovl: Ovl) -> None:
    ovl.run("run", "-d", "--name", "web", "-p", "80", "busy", "sh", "-c", SERVER)
    port = port_of(ovl, "web", "80/tcp")
    assert ovl.out("port", "web") == f"80/tcp -> 0.0.0.0:{port}\n80/tcp -> [::]:{port}\n"
    assert fetch(port) == fetch(port, "::1") == "hello\n"
    ovl.run("rm", "-f", "web")
    ovl.run("run", "-d", "--name", "web", "-p", "0.0.0.0:0:80", "busy", "sh", "-c", SERVER)
    port = port_of(ovl, "web", "80/tcp")
    assert ovl.out("port", "web") == f"80/tcp -> 0.0.0.0:{port}\n"
    assert fetch(port) == "hello\n"
    with pytest.raises(ConnectionRefusedError):
        fetch(port, "::1")


def test_names_are_set_up_for_the_network(ovl: Ovl) -> None:
    hosts = ovl.out("run", "--rm", "-h", "here", "busy", "cat", "/etc/hosts")
    assert "localhost" in hosts and hosts.splitlines()[-1].endswith("\there")
    assert ovl.out("run", "--rm", "--network", "none", "busy", "cat", "/etc/resolv.conf") == ""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_nothing_of_a_network_stays(ovl: Ovl, end: str) -> None:
    made = ovl.out("run", "-d", "--name", "net", "-p", "80", "busy", "sleep", "60").strip()
    link = f"ovl{made[:12]}"
    assert Path("/sys/class/net", link).exists()
    if end == "kill":
        subprocess.run(["kill", "-9", str(ovl.status("net")["monitor"]["pid"])], check=True)
        assert ovl.row("net")["State"] == "exited"
    else:
        ovl.run("stop", "-t", "0", "net")
    assert not Path("/sys/class/net", link).exists()
    assert link not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert not list(Path("/sys/fs/cgroup").glob(f"*/ovl-{made}"))


@pytest.mark.parametrize(
    ("there", "missing"), [(("runc",), "ip; install iproute2"), (("runc", "ip"), "nft or iptables; install nftables")]
)
def test_a_private_network_without_its_programs_is_one_line(
    ovl: Ovl, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], missing: str
) -> None:
    programs = ovl.base / "programs"
    programs.mkdir()
    for name in ("rm", *there):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    links = sorted(path.name for path in Path("/sys/class/net").iterdir())
    with monkeypatch.context() as environment:
        environment.setenv("PATH", str(programs))
        assert f"a private network needs {missing}" in ovl.error("run", "busy", "true", status=125)
    assert ovl.rows() == []
    assert sorted(path.name for path in Path("/sys/class/net").iterdir()) == links

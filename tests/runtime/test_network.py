"""Networks and published ports."""

import contextlib
import dataclasses
import http.client
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.conftest import Ovl, within

SERVER = "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp"


def port_of(ovl: Ovl, name: str, inside: str) -> int:
    lines = ovl.out("port", name).splitlines()
    return next(int(line.rpartition(":")[2]) for line in lines if line.startswith(inside))


def fetch(port: int) -> str:
    """What the server answers; waits until it listens."""
    deadline = time.monotonic() + 10
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
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
def near(ovl: Ovl) -> Iterator[Ovl]:
    """In a network that stands for a machine, joined to another one, 198.51.100.2, that is its way out of IPv4."""
    with contextlib.ExitStack() as stack:
        inside = []
        for _ in range(2):
            holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
            stack.callback(holder.kill)
            assert within(20, lambda pid=holder.pid: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")  # type: ignore[misc]
            inside.append(("nsenter", "--net", "--target", str(holder.pid)))
        here, there = inside
        subprocess.run([*here, *"ip link add out type veth peer name out netns".split(), there[-1]], check=True)
        for machine, number in ((here, 1), (there, 2)):
            commands = (
                "link set lo up",
                f"addr add 198.51.100.{number}/24 dev out",
                f"addr add 2001:db8::{number}/64 dev out nodad",
                "link set out up",
            )
            subprocess.run([*machine, "ip", "-batch", "-"], input="\n".join(commands).encode(), check=True)
        subprocess.run([*here, *"ip route add default via 198.51.100.2".split()], check=True)
        yield dataclasses.replace(ovl, command=(*here, *ovl.command))


def in_network(ovl: Ovl, *words: str) -> str:
    """What a command prints in the network that the program is in."""
    prefix = ovl.command[: ovl.command.index("--target") + 2]
    return subprocess.run([*prefix, *words], capture_output=True, text=True, check=True, timeout=60).stdout


def test_what_a_network_of_its_own_sends_goes_out_as_the_hosts(near: Ovl) -> None:
    script = "ping -c 1 -W 9 198.51.100.2; ping -c 1 -W 9 2001:db8::2; ip -6 route; cat /etc/hosts"
    run = ("run", "--rm", "-u", "root", "-h", "here", "busy", "sh", "-c", script)
    # There is no way out of IPv6 yet, so its containers have no address of it.
    without = near.out(*run)
    assert without.count("1 packets received") == 1 and "fd4b:" not in without
    in_network(near, *"ip -6 route add default via 2001:db8::2".split())
    done = near.out(*run)
    assert done.count("1 packets received") == 2
    assert re.search(r"^fd4b:\S+\there$", done, re.MULTILINE) and "default via fd4b:" in done


FETCH = """
import http.client, sys, time
deadline = time.monotonic() + 20
while True:
    connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
    try:
        connection.request("GET", "/")
        print(connection.getresponse().read().decode(), end="")
        break
    except ConnectionRefusedError:
        print("refused")
        break
    except (http.client.RemoteDisconnected, ConnectionResetError):
        # It does not listen yet.
        assert time.monotonic() < deadline
        time.sleep(0.05)
"""


def test_a_port_is_published_for_both_families(near: Ovl) -> None:
    for option, places in (("80", ["0.0.0.0", "[::]"]), ("0.0.0.0:0:80", ["0.0.0.0"])):
        near.run("run", "-d", "--name", "web", "-p", option, "busy", "sh", "-c", SERVER)
        port = str(port_of(near, "web", "80/tcp"))
        assert near.out("port", "web").splitlines() == [f"80/tcp -> {place}:{port}" for place in places]
        found = [in_network(near, sys.executable, "-c", FETCH, address, port) for address in ("127.0.0.1", "::1")]
        assert found == ["hello\n", "hello\n" if "[::]" in places else "refused\n"]
        near.run("rm", "-f", "web")


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

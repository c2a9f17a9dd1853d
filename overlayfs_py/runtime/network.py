"""The network of a container that has one of its own, made by root: a namespace joined to the host by a veth pair.

Each container has a subnet of four addresses, so no bridge is needed; what it sends further is translated to the host's
address where nft(8) or iptables(8) is there. The pair goes with the namespace, the translation with `remove`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.state import Container
from overlayfs_py.sys import namespaces

_POOL = IPv4Network("10.213.0.0/16")
_PREFIX = 30
_PATIENCE = 1.0  # seconds
_LOCK = "/run/lock/ovl-network"
_FORWARDING = "/proc/sys/net/ipv4/ip_forward"


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace that this process keeps open, and the container's address in it."""

    fd: int
    address: str | None

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"


def create(container: Container) -> Network:
    """Make the namespace and join it to the host. Call it without other threads. Raises ContainerError."""
    for programs, package in (("ip",), "iproute2"), (("nft", "iptables"), "nftables"):
        if not any(map(shutil.which, programs)):
            needed = " or ".join(programs)
            raise ContainerError(f"a private network needs {needed}; install {package}, or use --network host or none")
    link = _link(container)
    with _allocating():
        subnet = _free_subnet(int(container.id[:8], 16))
        host, inside = (f"{address}/{_PREFIX}" for address in subnet.hosts())
        outside_fd = _open_current()
        try:
            namespaces.unshare(namespaces.CLONE_NEWNET)
            fd = _open_current()
            try:
                _ip(
                    "link set lo up",
                    f"link add name eth0 type veth peer name {link} netns /proc/{os.getpid()}/fd/{outside_fd}",
                    f"addr add {inside} dev eth0",
                    "link set eth0 up",
                    f"route add default via {host.partition('/')[0]}",
                )
            finally:
                namespaces.setns(outside_fd, namespaces.CLONE_NEWNET)
        finally:
            os.close(outside_fd)
        _ip(f"addr add {host} dev {link}", f"link set {link} up")
    address = inside.partition("/")[0]
    _await_carrier(link)
    _forward()
    _translate(link, address)
    return Network(fd, address)


def remove(container: Container) -> None:
    """Take back what `create` made, as far as it is still there."""
    link = _link(container)
    if os.path.exists(f"/sys/class/net/{link}"):
        # It may go by itself, with the namespace, at the same time.
        _quietly("ip", "link", "del", link)
    if shutil.which("nft") is not None:
        _quietly("nft", "delete", "table", "ip", link)
    elif shutil.which("iptables") is not None:
        for rule in _quietly("iptables", "-t", "nat", "-S", "POSTROUTING").splitlines():
            if f"-o {link} " in rule:
                _quietly("iptables", "-t", "nat", "-D", *rule.split()[1:])


def _link(container: Container) -> str:
    return f"ovl{container.short_id}"


def _open_current() -> int:
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def _allocating() -> Iterator[None]:
    fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _free_subnet(start: int) -> IPv4Network:
    """The first from the `start`th on that no interface of this machine has an address in."""
    listing = subprocess.run(["ip", "-json", "-4", "address"], capture_output=True, text=True, check=True).stdout
    used = [
        IPv4Interface(f"{info['local']}/{info['prefixlen']}").network
        for interface in json.loads(listing)
        for info in interface["addr_info"]
    ]
    count = 1 << (_PREFIX - _POOL.prefixlen)
    size = 1 << (32 - _PREFIX)
    for number in range(count):
        base = int(_POOL.network_address) + (start + number) % count * size
        subnet = IPv4Network((base, _PREFIX))
        if not any(subnet.overlaps(other) for other in used):
            return subnet
    raise ContainerError(f"all {count} subnets of {_POOL} are in use")


def _await_carrier(link: str) -> None:
    """Wait until the kernel has seen that both ends are up, as it drops what is sent before; not for long, though."""
    state = Path("/sys/class/net", link, "operstate")
    deadline = time.monotonic() + _PATIENCE
    while state.read_text().strip() != "up" and time.monotonic() < deadline:
        time.sleep(0.005)


def _forward() -> None:
    switch = Path(_FORWARDING)
    if switch.read_text().strip() == "0":
        switch.write_text("1")


def _translate(link: str, address: str) -> None:
    if shutil.which("nft") is not None:
        rules = f"""
            table ip {link} {{
                chain postrouting {{
                    type nat hook postrouting priority 100;
                    ip saddr {address} oifname != "{link}" masquerade
                }}
            }}
        """
        _run(["nft", "-f", "-"], rules)
    elif shutil.which("iptables") is not None:
        _run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", address, "!", "-o", link, "-j", "MASQUERADE"], "")


def _ip(*commands: str) -> None:
    _run(["ip", "-batch", "-"], "".join(f"{command}\n" for command in commands))


def _run(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines() or ["it does not say why"]
        raise ContainerError(f"cannot set up the network: {command[0]}: {reason[0]}")


def _quietly(*command: str) -> str:
    """Run what may fail because there is nothing to remove."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout

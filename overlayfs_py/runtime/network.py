"""The network of a container that has one of its own, made by root: a namespace joined to the host by a veth pair.

Each container has a subnet of four addresses, so no bridge is needed; what it sends further is translated to the host's
address by nft(8) or iptables(8). It has such a subnet of IPv6, too, where the host has a way out for that. The pair
goes with the namespace, the translation with `remove`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Network
from pathlib import Path

from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.state import Container
from overlayfs_py.sys import namespaces

_POOL = IPv4Network("10.213.0.0/16")
_PREFIX = 30
_PATIENCE = 1.0  # seconds
_LOCK = "/run/lock/ovl-network"
_POOL6 = IPv6Network("fd4b:1d7e:92a6:213::/64")
"""Of the addresses that are for such use, with forty bits taken at random; RFC 4193."""
_PREFIX6 = 126
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_FORWARDING6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
_ROUTES6 = Path("/proc/net/ipv6_route")
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40
_RTF_REJECT, _RTF_ADDRCONF = 0x200, 0x40000  # linux/route.h, linux/ipv6_route.h


@dataclass(frozen=True, slots=True)
class Network:
    """A network namespace that this process keeps open, and the container's address in it."""

    fd: int
    address: str | None
    address6: str | None = None

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
        host6, inside6 = _subnet6(subnet) if _ipv6_goes_out() else ("", "")
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
                    # There is nobody else on this link, so the addresses need no time to be found free.
                    *([f"addr add {inside6} dev eth0 nodad"] if inside6 else []),
                    *([f"route add default via {host6.partition('/')[0]} dev eth0"] if inside6 else []),
                )
            finally:
                namespaces.setns(outside_fd, namespaces.CLONE_NEWNET)
        finally:
            os.close(outside_fd)
        _ip(
            f"addr add {host} dev {link}",
            f"link set {link} up",
            *([f"addr add {host6} dev {link} nodad"] if host6 else []),
        )
    address, address6 = inside.partition("/")[0], inside6.partition("/")[0]
    _await_carrier(link)
    _forward(_FORWARDING)
    if address6:
        _forward(_FORWARDING6)
    _translate(link, address, address6)
    return Network(fd, address, address6 or None)


def remove(container: Container) -> None:
    """Take back what `create` made, as far as it is still there."""
    link = _link(container)
    if any(name == link for _, name in socket.if_nameindex()):
        # It may go by itself, with the namespace, at the same time.
        _quietly("ip", "link", "del", link)
    if shutil.which("nft") is not None:
        # One that is made first can be deleted whether it was there or not; all in one step, as nft is slow to start.
        families = ("ip", "ip6") if _ROUTES6.exists() else ("ip",)
        _quietly("nft", *(f"table {family} {link}; delete table {family} {link};" for family in families))
        return
    for program in filter(shutil.which, ("iptables", "ip6tables")):
        for rule in _quietly(program, "-t", "nat", "-S", "POSTROUTING").splitlines():
            if f"-o {link} " in rule:
                _quietly(program, "-t", "nat", "-D", *rule.split()[1:])


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


def _subnet6(subnet: IPv4Network) -> tuple[str, str]:
    """The host's address and the container's, in the subnet of IPv6 that goes with one of IPv4."""
    offset = int(subnet.network_address) - int(_POOL.network_address)
    first = _POOL6.network_address + offset
    return f"{first + 1}/{_PREFIX6}", f"{first + 2}/{_PREFIX6}"


def _ipv6_goes_out() -> bool:
    """Whether this machine passes on IPv6, or may begin to.

    One that has its way out from router advertisements would lose it: who forwards heeds them no more, unless told to.
    Source: the kernel's ip-sysctl, accept_ra; proc_net(5) for the table of routes.
    """
    try:
        routes = [line.split() for line in _ROUTES6.read_text().splitlines()]
        forwards = _FORWARDING6.read_text().strip() != "0"
    except FileNotFoundError:
        return False
    out = [int(route[8], 16) for route in routes if route[0] == "0" * 32 and route[1] == "00"]
    ways = [flags for flags in out if not flags & _RTF_REJECT]
    return bool(ways) and (forwards or not any(flags & _RTF_ADDRCONF for flags in ways))


def _await_carrier(link: str) -> None:
    """Wait until the kernel has seen that both ends are up, as it drops what is sent before; not for long, though."""
    deadline = time.monotonic() + _PATIENCE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        while not _flags(any_socket, link) & _IFF_RUNNING and time.monotonic() < deadline:
            time.sleep(0.005)


def _flags(any_socket: socket.socket, link: str) -> int:
    """Those of an interface in the network that a socket is of; netdevice(7), SIOCGIFFLAGS."""
    answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16s24x", link.encode()))
    return int(struct.unpack("16xH22x", answer)[0])


def _forward(switch: Path) -> None:
    if switch.read_text().strip() == "0":
        switch.write_text("1")


def _translate(link: str, address: str, address6: str) -> None:
    families = [("ip", "iptables", address)] + ([("ip6", "ip6tables", address6)] if address6 else [])
    if shutil.which("nft") is not None:
        tables = (
            f"""
            table {family} {link} {{
                chain postrouting {{
                    type nat hook postrouting priority 100;
                    {family} saddr {source} oifname != "{link}" masquerade
                }}
            }}
            """
            for family, _, source in families
        )
        _run(["nft", "-f", "-"], "".join(tables))
        return
    for _, program, source in families:
        if shutil.which(program) is not None:
            _run([program, "-t", "nat", "-A", "POSTROUTING", "-s", source, "!", "-o", link, "-j", "MASQUERADE"], "")


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

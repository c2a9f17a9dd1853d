"""The network of a container that has one of its own, made without root: pasta(1) carries it.

The container sees the host's address as its own; what is published pasta listens for itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from overlayfs_py.runtime import publishing
from overlayfs_py.runtime.errors import ContainerError
from overlayfs_py.runtime.network import Network
from overlayfs_py.runtime.spec import Port
from overlayfs_py.sys import namespaces

_LIMIT = 10.0  # seconds until it must be ready
_PAUSE = 0.005  # seconds


def start(directory: Path, ports: Sequence[Port]) -> tuple[Network, tuple[Port, ...], int]:
    """Make a network namespace and start pasta for it: the network, the ports with their numbers, and pasta's pid.

    It ends with this process. Call it without other threads. Raises ContainerError.
    """
    if shutil.which("pasta") is None:
        raise ContainerError("a private network without root needs pasta; install passt, or use --network host or none")
    net = Network(_fresh_namespace(), None)
    bound = publishing.bind(ports)
    published = tuple(port for _, port in bound)
    # They are pasta's to listen on; this was to learn that they are free.
    for made, _ in bound:
        made.close()
    pid_file = directory / "pasta.pid"
    pid_file.unlink(missing_ok=True)
    said = directory / "pasta.log"
    with said.open("wb") as log:
        child = subprocess.Popen(
            _command(net, published, pid_file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # Without our capabilities it may not look into our directory of /proc.
            pass_fds=(net.fd,),
            preexec_fn=_die_with_us,
        )
    deadline = time.monotonic() + _LIMIT
    while not (pid_file.exists() and pid_file.read_text().strip()):
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            child.wait()
            lines = said.read_text(errors="backslashreplace").strip().splitlines() or ["it does not say why"]
            raise ContainerError(f"cannot set up the network: pasta: {lines[-1]}")
        time.sleep(_PAUSE)
    return net, published, child.pid


def _command(net: Network, ports: Sequence[Port], pid_file: Path) -> list[str]:
    command = ["pasta", "--config-net", "--foreground", "--quiet", "--netns-only", "--pid", str(pid_file)]
    for protocol, option in (("tcp", "-t"), ("udp", "-u")):
        mine = [port for port in ports if port.protocol == protocol]
        both = {(port.host, port.container) for port in mine if port.address == "::"}
        for port in mine:
            everywhere = port.address in ("0.0.0.0", "::") and (port.host, port.container) in both
            if everywhere and port.address == "::":
                # Without an address it is for IPv4 and for IPv6.
                continue
            command += [option, f"{'' if everywhere else f'{port.address}/'}{port.host}:{port.container}"]
        if not mine:
            command += [option, "none"]
    return [*command, "-T", "none", "-U", "none", "--netns", f"/proc/self/fd/{net.fd}"]


def _die_with_us() -> None:
    namespaces.die_with_parent(signal.SIGKILL)


def _fresh_namespace() -> int:
    """A descriptor of a new network namespace, made by a child, as there is no way back into the host's own."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            namespaces.unshare(namespaces.CLONE_NEWNET)
            os.write(tell, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        if not os.read(ready, 1):
            raise ContainerError("the kernel refuses a network namespace; use --network host")
        return os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

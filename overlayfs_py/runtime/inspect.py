"""What is to be said of a container, in Docker's words where it has some."""

from __future__ import annotations

from typing import Any

from overlayfs_py.runtime.spec import Spec
from overlayfs_py.runtime.state import Container, Status
from overlayfs_py.runtime.times import isoformat


def describe(container: Container, status: Status) -> dict[str, Any]:
    """All that is known of a container; the keys are those of `docker inspect`."""
    spec = container.spec
    return {
        "Id": container.id,
        "Created": isoformat(container.created),
        "Path": spec.args[0],
        "Args": list(spec.args[1:]),
        "State": {
            "Status": status.phase,
            "Running": status.phase == "running",
            "OOMKilled": status.out_of_memory,
            "Pid": status.process.pid if status.process is not None else 0,
            "ExitCode": status.exit_code or 0,
            "Error": status.error,
            "StartedAt": isoformat(status.started),
            "FinishedAt": isoformat(status.finished),
        },
        "Image": container.image,
        "Name": container.name,
        "LogPath": str(container.directory / "log"),
        "Config": {
            "Hostname": spec.hostname or container.short_id,
            "User": spec.user,
            "Tty": spec.terminal,
            "OpenStdin": spec.interactive,
            "StdinOnce": spec.stdin_once,
            "Env": list(spec.env),
            "Cmd": list(spec.args),
            "Image": container.image_name,
            "WorkingDir": spec.cwd,
            "Labels": dict(spec.labels),
            "StopSignal": spec.stop_signal,
            "StopTimeout": spec.stop_timeout,
        },
        "HostConfig": {
            "NetworkMode": spec.network,
            "AutoRemove": spec.remove,
            "ReadonlyRootfs": spec.read_only,
            "Memory": spec.memory or 0,
            "NanoCpus": int((spec.cpus or 0) * 1e9),
            "PidsLimit": spec.pids_limit or 0,
            "CapAdd": list(spec.cap_add),
            "CapDrop": list(spec.cap_drop),
            "Tmpfs": dict(spec.tmpfs),
            "MemorySwap": spec.memory_swap or 0,
            "CpuShares": spec.cpu_shares or 0,
            "CpusetCpus": spec.cpuset,
            "OomScoreAdj": spec.oom_score_adj or 0,
            "ShmSize": spec.shm_size,
            "Init": spec.init,
            "Privileged": spec.privileged,
            "PublishAllPorts": spec.publish_all,
            "GroupAdd": list(spec.groups),
            "Sysctls": dict(spec.sysctls),
            "Dns": list(spec.dns),
            "DnsSearch": list(spec.dns_search),
            "DnsOptions": list(spec.dns_options),
            "ExtraHosts": [f"{name}:{address}" for name, address in spec.hosts],
            "SecurityOpt": _security(spec),
            "Ulimits": [{"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard} for limit in spec.ulimits],
            "Devices": [
                {"PathOnHost": device.source, "PathInContainer": device.target, "CgroupPermissions": device.access}
                for device in spec.devices
            ],
        },
        "Mounts": [
            {
                "Type": "bind" if volume.name is None else "volume",
                "Name": volume.name or "",
                "Source": volume.source or str(container.directory.parents[1] / "volumes" / str(volume.name) / "_data"),
                "Destination": volume.target,
                "RW": not volume.read_only,
                "Propagation": volume.propagation,
            }
            for volume in spec.volumes
        ],
        "NetworkSettings": {
            "IPAddress": status.address or "",
            "GlobalIPv6Address": status.address6 or "",
            "Ports": _ports(container, status),
        },
        "GraphDriver": {
            "Name": "overlayfs-py",
            "Data": {
                "LowerDir": ":".join(container.lowers),
                "UpperDir": str(container.upper),
                "WorkDir": str(container.directory / "work"),
                "MergedDir": str(container.root),
            },
        },
    }


def _security(spec: Spec) -> list[str]:
    seccomp = {None: [], "": ["seccomp=unconfined"]}.get(spec.seccomp, [f"seccomp={spec.seccomp}"])
    return [*(["no-new-privileges"] if spec.no_new_privileges else []), *seccomp]


def _ports(container: Container, status: Status) -> dict[str, list[dict[str, str]]]:
    ports: dict[str, list[dict[str, str]]] = {}
    for port in status.ports or container.spec.ports:
        inside = f"{port.container}/{port.protocol}"
        ports.setdefault(inside, []).append({"HostIp": port.address, "HostPort": str(port.host)})
    return ports

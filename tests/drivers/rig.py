"""A snapshotter in a process of its own, and a client that calls it as containerd does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from overlayfs_py.drivers.containerd import snapshots_pb2 as api
from overlayfs_py.drivers.containerd.service import SERVICE
from tests.support.mounts import REPOSITORY

_LIMIT = 30.0  # seconds that a call or a start may take


class Client:
    """The calls of containerd's snapshots API, to a snapshotter itself, or to the one of a name through containerd."""

    def __init__(self, address: Path, name: str = "", metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self._channel = grpc.insecure_channel(f"unix:{address}")
        self._name = name
        self._metadata = metadata

    def close(self) -> None:
        self._channel.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[api.Mount]:
        request = api.PrepareSnapshotRequest(key=key, parent=parent, labels=labels or {})
        return list(self._call("Prepare", request, api.PrepareSnapshotResponse).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[api.Mount]:
        request = api.ViewSnapshotRequest(key=key, parent=parent, labels=labels or {})
        return list(self._call("View", request, api.ViewSnapshotResponse).mounts)

    def mounts(self, key: str) -> list[api.Mount]:
        return list(self._call("Mounts", api.MountsRequest(key=key), api.MountsResponse).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        self._call("Commit", api.CommitSnapshotRequest(name=name, key=key, labels=labels or {}), Empty)

    def remove(self, key: str) -> None:
        self._call("Remove", api.RemoveSnapshotRequest(key=key), Empty)

    def stat(self, key: str) -> api.Info:
        info: api.Info = self._call("Stat", api.StatSnapshotRequest(key=key), api.StatSnapshotResponse).info
        return info

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> api.Info:
        request = api.UpdateSnapshotRequest(info=api.Info(name=name, labels=labels), update_mask=FieldMask(paths=paths))
        info: api.Info = self._call("Update", request, api.UpdateSnapshotResponse).info
        return info

    def find(self, *filters: str) -> list[str]:
        """The names of what the filters match."""
        call = self._channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=api.ListSnapshotsResponse.FromString,
        )
        request = api.ListSnapshotsRequest(snapshotter=self._name, filters=filters)
        responses = call(request, timeout=_LIMIT, metadata=self._metadata)
        return [info.name for response in responses for info in response.info]

    def usage(self, key: str) -> tuple[int, int]:
        """Bytes and inodes."""
        response = self._call("Usage", api.UsageRequest(key=key), api.UsageResponse)
        return response.size, response.inodes

    def cleanup(self) -> None:
        self._call("Cleanup", api.CleanupRequest(), Empty)

    def _call(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        request.snapshotter = self._name
        return call(request, timeout=_LIMIT, metadata=self._metadata)


@dataclass
class Process:
    """A running `overlayfs-py-snapshotter`; its standard error is in `log`."""

    root: Path
    address: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    client: Client = field(init=False)

    def start(self) -> None:
        command = [sys.executable, "-c", "import sys; from overlayfs_py.cli.snapshotter import main; sys.exit(main())"]
        command += ["--root", str(self.root), "--address", str(self.address)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.client = Client(self.address)
        deadline = time.monotonic() + _LIMIT
        while True:
            try:
                self.client.find()
                return
            except grpc.RpcError as error:
                ended = self.process.poll()
                if ended is not None or time.monotonic() > deadline:
                    self.stop(signal.SIGKILL)
                    raise AssertionError(f"it does not answer:\n{self.log.read_text()}") from error
            self.client.close()
            time.sleep(0.02)
            self.client = Client(self.address)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; returns the exit status."""
        self.client.close()
        self.process.send_signal(number)
        return self.process.wait(_LIMIT)

    def directories(self) -> list[str]:
        """What lies in the directory of the snapshots."""
        return sorted(os.listdir(self.root / "snapshots"))


@contextlib.contextmanager
def snapshotter(base: Path) -> Iterator[Process]:
    """A snapshotter whose root, socket and log lie below `base`; must end well and log no error."""
    running = Process(base / "snapshotter", base / "s.sock", base / "snapshotter.log")
    running.start()
    try:
        yield running
    except BaseException:
        if running.process.poll() is None:
            running.stop(signal.SIGKILL)
        raise
    assert running.stop() == 0
    assert "ERROR" not in running.log.read_text(), running.log.read_text()

"""The snapshotter behind gRPC on a Unix socket: the service containerd.services.snapshots.v1.Snapshots."""

import contextlib
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Final

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from overlayfs_py.drivers.containerd import failures
from overlayfs_py.drivers.containerd import snapshots_pb2 as api
from overlayfs_py.drivers.containerd.metadata import Snapshot
from overlayfs_py.drivers.containerd.snapshotter import Mount, Snapshotter
from overlayfs_py.errors import ConfigError

SERVICE: Final = "containerd.services.snapshots.v1.Snapshots"

GRACE: Final = 10.0
"""Seconds that requests being served have to end once the service is told to."""

_SOCKET_PATH_LIMIT = 107  # bytes, unix(7)
_THREADS = 8
_INFOS_A_MESSAGE = 100
_SECOND = 1_000_000_000  # nanoseconds

_CODES: Final[dict[type[failures.SnapshotError], grpc.StatusCode]] = {
    failures.NotFoundError: grpc.StatusCode.NOT_FOUND,
    failures.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    failures.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    failures.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
}

log = logging.getLogger(__name__)


class Service:
    """The methods of the service, each named as in the protocol. The name of the snapshotter in a request says
    nothing: containerd has one socket for each."""

    __slots__ = ("_snapshotter",)

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(self, request: api.PrepareSnapshotRequest) -> api.PrepareSnapshotResponse:
        mounts = self._snapshotter.prepare(request.key, request.parent, request.labels)
        return api.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def View(self, request: api.ViewSnapshotRequest) -> api.ViewSnapshotResponse:
        mounts = self._snapshotter.view(request.key, request.parent, request.labels)
        return api.ViewSnapshotResponse(mounts=_mounts(mounts))

    def Mounts(self, request: api.MountsRequest) -> api.MountsResponse:
        return api.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def Commit(self, request: api.CommitSnapshotRequest) -> Empty:
        self._snapshotter.commit(request.name, request.key, request.labels)
        return Empty()

    def Remove(self, request: api.RemoveSnapshotRequest) -> Empty:
        self._snapshotter.remove(request.key)
        return Empty()

    def Stat(self, request: api.StatSnapshotRequest) -> api.StatSnapshotResponse:
        return api.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def Update(self, request: api.UpdateSnapshotRequest) -> api.UpdateSnapshotResponse:
        info = request.info
        return api.UpdateSnapshotResponse(
            info=_info(self._snapshotter.update(info.name, info.labels, request.update_mask.paths))
        )

    def List(self, request: api.ListSnapshotsRequest) -> Iterator[api.ListSnapshotsResponse]:
        found = self._snapshotter.find(request.filters)
        for at in range(0, len(found), _INFOS_A_MESSAGE):
            infos = [_info(snapshot) for snapshot in found[at : at + _INFOS_A_MESSAGE]]
            yield api.ListSnapshotsResponse(info=infos)

    def Usage(self, request: api.UsageRequest) -> api.UsageResponse:
        usage = self._snapshotter.usage(request.key)
        return api.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: api.CleanupRequest) -> Empty:
        self._snapshotter.cleanup()
        return Empty()


def serve(root: str, address: str) -> None:
    """Serve the snapshots below `root` on the Unix socket `address` until SIGTERM or SIGINT.

    Tells systemd when it is ready, sd_notify(3). Call it in the main thread. Raises ConfigError, OSError and
    sqlite3.Error when it can't begin.
    """
    path = os.path.abspath(address)
    if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
        raise ConfigError(f"the path of the socket is longer than {_SOCKET_PATH_LIMIT} bytes: {path}")
    ends = (signal.SIGTERM, signal.SIGINT)
    # Blocked before threads start, so that sigwait alone takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with contextlib.closing(Snapshotter(root)) as snapshotter:
        try:
            snapshotter.cleanup()
        except OSError as error:
            # What can't be removed is a waste of space, and no reason to serve nobody.
            log.warning("%s", error)
        server = grpc.server(futures.ThreadPoolExecutor(_THREADS))
        server.add_generic_rpc_handlers((_handlers(Service(snapshotter)),))
        _listen(server, path)
        server.start()
        log.info("serving %s on %s", root, path)
        _tell_systemd(b"READY=1")
        signal.sigwait(ends)
        _tell_systemd(b"STOPPING=1")
        server.stop(GRACE).wait()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _listen(server: grpc.Server, path: str) -> None:
    """Bind the socket, for root alone."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # gRPC would take the socket over from one that still serves on it.
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise ConfigError(f"another process serves on {path}")
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {path}") from error
    finally:
        os.umask(mask)


def _tell_systemd(state: bytes) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        notify.sendto(state, address)


def _handlers(service: Service) -> "grpc.GenericRpcHandler[Any, Any]":
    handlers = {}
    for method in api.DESCRIPTOR.services_by_name["Snapshots"].methods:
        behaviour = getattr(service, method.name)
        request: Any = getattr(api, method.input_type.name)
        if method.name == "List":
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(
                _stream(method.name, behaviour), request.FromString, _serialize
            )
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                _single(method.name, behaviour), request.FromString, _serialize
            )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _single(name: str, behaviour: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        with _failures_told(name, context):
            return behaviour(request)

    return call


def _stream(name: str, behaviour: Callable[[Any], Iterator[Any]]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _failures_told(name, context):
            yield from behaviour(request)

    return call


@contextlib.contextmanager
def _failures_told(name: str, context: grpc.ServicerContext) -> Iterator[None]:
    """Turn what a method raises into the code that containerd knows it by."""
    try:
        yield
    except failures.SnapshotError as error:
        context.abort(_CODES[type(error)], str(error))
    except (OSError, sqlite3.Error) as error:
        log.exception("%s failed", name)
        context.abort(grpc.StatusCode.INTERNAL, str(error))


def _mounts(mounts: Sequence[Mount]) -> list[api.Mount]:
    return [api.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _info(snapshot: Snapshot) -> api.Info:
    return api.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=api.Kind.Name(snapshot.kind),
        created_at=_timestamp(snapshot.created),
        updated_at=_timestamp(snapshot.updated),
        labels=snapshot.labels,
    )


def _timestamp(when: int) -> Timestamp:
    return Timestamp(seconds=when // _SECOND, nanos=when % _SECOND)

"""Calls through containerd have the outcomes on our snapshotter that they have on its own for the kernel overlayfs."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from overlayfs_py.drivers.containerd import snapshots_pb2 as api
from tests.drivers.rig import Client
from tests.engines.containerd_rig import OURS, THEIRS, Containerd, containerd

_NAMES: Final = ("a", "b", "c", "d/e", "sha256:f", "")
_LABELS: Final[tuple[dict[str, str], ...]] = (
    {},
    {"x": "1"},
    {"x": "2", "y.z/w": "3"},
    {"x": ""},
    {"containerd.io/gc.root": "now"},
)
_PATHS: Final = ((), ("labels",), ("labels.x",), ("labels.y.z/w", "labels.x"), ("kind",), ("parent", "labels"))
_FILTERS: Final = (
    *((), ("kind==active",), ("kind!=active",), ("name==a",), ("name~=^[ab]$", "kind==view"), ("parent==a",)),
    *(
        ('parent=="sha256:f"',),
        ("labels.x",),
        ('labels."y.z/w"==3',),
        ("labels.x!=1,kind==committed",),
        ("labels.x~=/1|2/",),
    ),
    *(("kind=active",), ("name==",), ("nothing",), ("name~=(",)),
)

Call = tuple[str, Sequence[Any]]


@pytest.fixture(scope="module")
def engine(scratch: Path) -> Iterator[Containerd]:
    with containerd(scratch / "containerd-calls") as running:
        yield running


def call(choose: random.Random) -> Call:
    """One call, likely enough to succeed."""
    name = choose.choice(_NAMES)
    other = choose.choice(_NAMES)
    labels = choose.choice(_LABELS)
    kinds: tuple[Call, ...] = (
        ("prepare", (name, other, labels)),
        ("prepare", (name, "", labels)),
        ("view", (name, other, labels)),
        ("commit", (name, other, labels)),
        ("commit", (name, other, labels)),
        ("mounts", (name,)),
        ("stat", (name,)),
        ("usage", (name,)),
        ("update", (name, labels, choose.choice(_PATHS))),
        ("find", choose.choice(_FILTERS)),
        ("remove", (name,)),
        ("cleanup", ()),
    )
    return choose.choice(kinds)


def shape(mounts: Sequence[api.Mount]) -> list[tuple[str, int, bool]]:
    """Of each mount, what the two must have alike: kind, number of lower layers, whether it can be written to."""
    found = []
    for mount in mounts:
        words = dict(word.partition("=")[::2] for word in mount.options)
        lowers = words.get("lowerdir", "").count(":") + 1
        found.append((mount.type.replace(f"fuse3.{OURS}", "overlay"), lowers, "rw" in words or "upperdir" in words))
    return found


def outcome(method: Callable[..., Any], arguments: Sequence[Any]) -> object:
    """What a call answers, or its code of failure."""
    try:
        found = method(*arguments)
    except grpc.RpcError as error:
        return error.code()
    if isinstance(found, api.Info):
        assert found.created_at.ToNanoseconds() <= found.updated_at.ToNanoseconds()
        return found.name, found.parent, found.kind, dict(found.labels)
    if isinstance(found, list) and found and isinstance(found[0], api.Mount):
        return shape(found)
    # Our mounts keep their names where theirs do, and more room for each.
    return bool(found) if isinstance(found, tuple) else sorted(found) if isinstance(found, list) else found


@pytest.mark.parametrize("seed", range(3))
def test_calls_have_the_outcomes_that_they_have_on_overlayfs(engine: Containerd, seed: int) -> None:
    namespace = f"calls-{seed}"
    # Without a lease, containerd would collect what is made here.
    lease = engine.ctr("-n", namespace, "leases", "create").strip()
    metadata: tuple[tuple[str, str | bytes], ...] = (("containerd-namespace", namespace), ("containerd-lease", lease))
    choose = random.Random(seed)
    done: list[str] = []
    succeeded = 0
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(closing(Client(engine.base / "c.sock", name, metadata))) for name in (OURS, THEIRS)
        )
        for _ in range(400):
            method, arguments = call(choose)
            found = [outcome(getattr(client, method), arguments) for client in (ours, theirs)]
            done.append(f"{method}{tuple(arguments)}: {found}")
            assert found[0] == found[1], "\n".join(done)
            succeeded += not isinstance(found[0], grpc.StatusCode)
    assert succeeded > 50
    engine.ctr("-n", namespace, "leases", "rm", "--sync", lease)

"""The snapshotter under kill -9, concurrency, and a disk that refuses."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from overlayfs_py.drivers.containerd import snapshots_pb2 as api
from tests.conftest import Layers
from tests.drivers.rig import Client, Process, snapshotter
from tests.drivers.test_snapshots import CODE, committed, option, refused, upper
from tests.support.mounts import REPOSITORY, our_mount


def test_a_restart_changes_nothing(process: Process) -> None:
    committed(process.client, "layer", labels={"a": "1"})
    mounts = process.client.prepare("container", "layer")
    known = [process.client.stat(name) for name in process.client.find()]
    usage = process.client.usage("layer")
    assert process.stop() == 0
    assert not process.address.exists()
    process.start()
    assert [process.client.stat(name) for name in process.client.find()] == known
    assert process.client.mounts("container") == mounts
    assert process.client.usage("layer") == usage


def test_kill_9_at_any_moment_loses_no_snapshot_that_was_answered(process: Process) -> None:
    for round_ in range(4):
        done = set(process.client.find())
        client = process.client
        killer = threading.Timer(0.15 + 0.1 * round_, process.process.kill)
        killer.start()
        # What was asked for last may be there or not; what was answered is, and what was removed is not.
        unsure: set[str] = set()
        serial = 0
        try:
            while True:
                name = f"r{round_}-{serial}"
                unsure = {f"{name}-active", name}
                client.prepare(f"{name}-active")
                done.add(f"{name}-active")
                client.commit(name, f"{name}-active")
                done = done - {f"{name}-active"} | {name}
                if serial % 2:
                    client.remove(name)
                    done.remove(name)
                serial += 1
        except grpc.RpcError as error:
            assert error.code() == CODE.UNAVAILABLE, error
        killer.join()
        process.stop(signal.SIGKILL)
        process.start()
        found = set(process.client.find())
        assert serial > 0
        assert found - unsure == done - unsure
        for name in found:
            process.client.usage(name)
        assert len(process.directories()) == len(found), "what had no row went at the start"


def test_cleanup_removes_what_no_snapshot_has_and_nothing_else(process: Process) -> None:
    layer = committed(process.client, "layer")
    snapshots = process.root / "snapshots"
    (snapshots / "777" / "fs" / "a").mkdir(parents=True)
    (snapshots / "removed-5-1").mkdir()
    (snapshots / "file").touch()
    process.client.cleanup()
    assert process.directories() == [layer.parent.name]
    assert os.listdir(layer) == ["layer"]
    process.client.cleanup()


def test_a_directory_left_under_the_next_number_is_not_taken_for_the_snapshots(process: Process) -> None:
    (process.root / "snapshots" / "1" / "fs" / "stranger").mkdir(parents=True)
    assert os.listdir(upper(process.client.prepare("first"))) == []
    process.client.cleanup()
    assert process.directories() == ["1"]


def test_what_can_not_be_removed_is_left_to_cleanup(process: Process) -> None:
    layer = upper(process.client.prepare("active"))
    (layer / "file").touch()
    subprocess.run(["chattr", "+i", layer / "file"], check=True)
    process.client.remove("active")
    assert process.client.find() == []
    (left,) = process.directories()
    (process.root / "snapshots" / "orphan").mkdir()
    (process.root / "snapshots" / "removed-z").mkdir()
    with refused(CODE.INTERNAL):
        process.client.cleanup()
    assert process.directories() == [left], "one that stays keeps no other"
    process.log.write_text("")
    subprocess.run(["chattr", "-i", process.root / "snapshots" / left / "fs" / "file"], check=True)
    process.client.cleanup()
    assert process.directories() == []


def test_a_commit_removes_the_work_directory_unless_a_mount_still_needs_it(process: Process, layers: Layers) -> None:
    committed(process.client, "layer")
    (mount,) = process.client.prepare("used", "layer")
    work = Path(option(mount, "workdir"))
    with our_mount(layers.mnt, [option(mount, "lowerdir")], upper([mount]), work):
        process.client.commit("busy", "used")
        (layers.mnt / "layer").write_text("changed")
    assert work.is_dir()
    (mount,) = process.client.prepare("unused", "layer")
    process.client.commit("idle", "unused")
    assert os.listdir(upper([mount]).parent) == ["fs"]
    assert len(process.directories()) == 3


def test_a_prepare_that_fails_leaves_nothing(layers: Layers) -> None:
    with snapshotter(layers.base) as process:
        committed(process.client, "layer")
        layer = upper(process.client.view("view", "layer"))
        kept = process.directories()
        layer.rename(layer.with_name("away"))
        with refused(CODE.INTERNAL):
            process.client.prepare("container", "layer")
        assert process.client.find() == ["layer", "view"]
        assert process.directories() == kept
        layer.with_name("away").rename(layer)
        process.client.prepare("container", "layer")
        assert "Prepare failed" in process.log.read_text()
        process.log.write_text("")


def test_of_many_who_prepare_one_key_one_gets_it_and_different_keys_all_do(process: Process, client: Client) -> None:
    committed(client, "layer")

    def prepare(key: str) -> api.Mount | None:
        own = Client(process.address)
        try:
            return own.prepare(key, "layer")[0]
        except grpc.RpcError as error:
            assert error.code() == CODE.ALREADY_EXISTS, error
            return None
        finally:
            own.close()

    keys = [f"key-{number % 20}" for number in range(80)]
    with ThreadPoolExecutor(16) as pool:
        made = [mount for mount in pool.map(prepare, keys) if mount is not None]
    assert len(made) == 20
    assert len({upper([mount]) for mount in made}) == 20
    assert sorted(client.find("kind==active")) == sorted(set(keys))
    assert len(process.directories()) == 21


def test_cleanup_takes_no_snapshot_that_is_being_made(process: Process, client: Client) -> None:
    stop = threading.Event()

    def clean() -> None:
        own = Client(process.address)
        while not stop.is_set():
            own.cleanup()
        own.close()

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        layers = [upper(client.prepare(f"s{number}")) for number in range(60)]
    finally:
        stop.set()
        cleaner.join()
    assert all(layer.is_dir() for layer in layers)


def test_systemd_is_told_when_the_socket_answers(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    told = layers.base / "notify.sock"
    monkeypatch.setenv("NOTIFY_SOCKET", str(told))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(told))
        systemd.settimeout(10)
        with snapshotter(layers.base) as process:
            assert systemd.recv(100) == b"READY=1"
            assert process.client.find() == []
        assert systemd.recv(100) == b"STOPPING=1"


def run(*arguments: str) -> tuple[int, str]:
    program = "import sys; from overlayfs_py.cli.snapshotter import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stderr


def test_what_can_not_begin_says_why_in_one_line(process: Process, layers: Layers) -> None:
    later = layers.add("later")
    with sqlite3.connect(later / "metadata.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    other = str(layers.base / "other.sock")
    cases = [
        (["--root", str(process.root), "--address", other], "another snapshotter uses"),
        (["--root", str(layers.lower), "--address", str(process.address)], "another process serves on"),
        (["--root", str(layers.base / "a,b"), "--address", other], "mount options can't carry"),
        (["--root", str(layers.lower), "--address", f"/{'x' * 120}"], "longer than 107 bytes"),
        (["--root", str(later), "--address", other], "written by a later overlayfs-py"),
        (["--root", "/dev/null/x", "--address", other], "Not a directory"),
    ]
    for arguments, reason in cases:
        status, said = run(*arguments)
        assert (status, said.count("\n"), reason in said) == (1, 1, True), said
    assert process.client.find() == [], "the one that runs is not disturbed"
    assert not Path(other).exists()


def test_the_socket_is_for_root_alone(process: Process) -> None:
    assert process.address.stat().st_mode & 0o777 == 0o600


def test_the_generated_code_is_that_of_the_definition(layers: Layers) -> None:
    name = "overlayfs_py/drivers/containerd/snapshots"
    compiler = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={layers.base}", f"{name}.proto"]
    subprocess.run(compiler, cwd=REPOSITORY, check=True)

    def definition(top: Path) -> list[str]:
        return [line for line in (top / f"{name}_pb2.py").read_text().splitlines() if "AddSerializedFile" in line]

    assert len(definition(REPOSITORY)) == 1
    assert definition(layers.base) == definition(REPOSITORY)

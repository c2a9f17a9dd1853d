"""Create, start, stop, restart, remove; names; what stays and what goes."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.images.registry import registry
from tests.runtime.conftest import Ovl, left_of, within
from tests.runtime.image import entries
from tests.support.syscalls import mount, umount

RUN = ("run", "--network", "none")


def test_two_containers_of_one_image_do_not_see_each_other(ovl: Ovl) -> None:
    for name in ("one", "two"):
        ovl.run("run", "-d", "--network", "none", "-u", "root", "--name", name, "busy", "sleep", "60")
    for name in ("one", "two"):
        ovl.run("exec", name, "sh", "-c", f"cat /file && echo {name} > /file && rm /data/seed && touch /{name}")
    for name, other in (("one", "two"), ("two", "one")):
        assert ovl.out("exec", name, "cat", "/file") == f"{name}\n"
        ovl.run("exec", name, "ls", f"/{other}", status=1)
    assert ovl.out(*RUN, "--rm", "-u", "root", "busy", "cat", "/file", "/data/seed") == "of the image\nseed\n"


def test_a_container_that_writes_nothing_has_an_empty_layer(ovl: Ovl) -> None:
    ovl.run(*RUN, "--name", "idle", "busy")
    assert entries(ovl.home("idle") / "upper") == []
    assert ovl.out("diff", "idle") == ""


def test_a_container_keeps_its_layer_over_restarts(ovl: Ovl) -> None:
    made = ovl.out(
        "create", "--network", "none", "-u", "root", "--name", "again", "busy", "sh", "-c", "echo x >> /n; cat /n"
    )
    assert ovl.row("again")["Id"] == made.strip()
    assert ovl.row("again")["State"] == "created"
    assert ovl.out("start", "-a", "again") == "x\n"
    assert ovl.out("start", "-a", made[:12]) == "x\nx\n"
    ovl.run("restart", "again")
    assert ovl.out("wait", "again") == "0\n"
    assert ovl.out("logs", "again") == "x\nx\nx\nx\nx\nx\n"


def test_ps_shows_those_that_run_and_with_a_all(ovl: Ovl) -> None:
    ovl.run(*RUN, "--name", "gone", "busy", "sh", "-c", "exit 3", status=3)
    ovl.run(*RUN, "-d", "--name", "here", "busy", "sleep", "60")
    shown = ovl.out("ps").splitlines()
    assert shown[0].split() == ["CONTAINER", "ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]
    assert len(shown) == 2 and "here" in shown[1] and '"sleep 60"' in shown[1] and "Up " in shown[1]
    everything = ovl.out("ps", "-a").splitlines()
    assert len(everything) == 3 and "Exited (3)" in everything[2]
    assert ovl.out("ps", "-aq").split() == [row["Id"][:12] for row in ovl.rows()]


def test_names_and_ids_work_as_in_docker(ovl: Ovl) -> None:
    made = ovl.out("create", "--name", "mine", "busy").strip()
    assert len(made) == 64
    assert f"name mine is taken by container {made[:12]}" in ovl.error("create", "--name", "mine", "busy", status=125)
    for bad in ("-x", "a", "a/b", "ä" * 3):
        assert "is no name for a container" in ovl.error("create", f"--name={bad}", "busy", status=125)
    ovl.run("rename", "mine", "yours")
    assert ovl.row("yours")["Id"] == made
    assert ovl.error("rm", "mine", status=1) == "no such container: mine"
    ovl.run("create", "busy")
    assert ovl.error("start", "", status=1) == "no such container: "
    assert len(ovl.rows()) == 2
    ovl.run("rm", made[:8])
    assert "_" in ovl.rows()[0]["Name"]


def test_removing_a_container_removes_its_layer_and_nothing_else(ovl: Ovl) -> None:
    before = entries(ovl.root / "layers")
    ovl.run(*RUN, "-d", "--name", "writer", "-u", "root", "busy", "sh", "-c", "rm -r /data; echo a > /file; sleep 60")
    assert "is running" in ovl.error("rm", "writer", status=1)
    home = ovl.home("writer")
    ovl.run("rm", "-f", "writer")
    assert not home.exists()
    assert entries(ovl.root / "layers") == before


def test_stop_sends_the_signal_of_the_image_and_kills_who_does_not_listen(ovl: Ovl) -> None:
    polite = f"trap 'exit 11' {signal.SIGINT:d}; while :; do sleep 0.05; done"
    ovl.run(*RUN, "-d", "--name", "polite", "busy", "sh", "-c", polite)
    ovl.run(*RUN, "-d", "--name", "stubborn", "busy", "sleep", "60")
    assert within(5, lambda: ovl.out("top", "polite").count("sleep 0.05") > 0)
    ovl.run("stop", "-t", "20", "polite")
    ovl.run("stop", "-t", "0.1", "stubborn")
    assert (ovl.row("polite")["ExitCode"], ovl.row("stubborn")["ExitCode"]) == (11, 137)
    ovl.run("stop", "polite")


def test_wait_gives_the_exit_code_also_of_one_that_removes_itself(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--rm", "--name", "brief", "busy", "sh", "-c", "sleep 2; exit 4")
    assert ovl.out("wait", "brief") == "4\n"
    assert within(5, lambda: ovl.rows() == [])


def test_inspect_tells_what_docker_tells(ovl: Ovl) -> None:
    ovl.run(*RUN, "-d", "--name", "shown", "-l", "a=b", "--memory", "32m", "busy", "sleep", "60")
    (told,) = json.loads(ovl.out("inspect", "shown"))
    assert told["State"]["Status"] == "running"
    assert os.path.exists(f"/proc/{told['State']['Pid']}")
    assert told["Config"]["Labels"] == {"kind": "test", "a": "b"}
    assert told["HostConfig"]["Memory"] == 32 << 20
    assert Path(told["GraphDriver"]["Data"]["MergedDir"], "file").read_text() == "of the image\n"


def test_volumes_outlive_containers(ovl: Ovl) -> None:
    outside = ovl.base / "outside"
    outside.mkdir()
    options = ("-v", f"{outside}:/mnt/out", "-v", "kept:/mnt/kept", "-u", "root")
    ovl.run(*RUN, "--rm", *options, "busy", "sh", "-c", "echo a > /mnt/out/a; echo b > /mnt/kept/b")
    assert (outside / "a").read_text() == "a\n"
    assert ovl.out(*RUN, "--rm", "-v", "kept:/k:ro", "busy", "cat", "/k/b") == "b\n"
    ovl.run(*RUN, "--rm", "-u", "root", "-v", "kept:/k:ro", "busy", "touch", "/k/c", status=1)
    assert ovl.out("volume", "ls", "-q") == "kept\n"
    ovl.run("create", "--name", "user", "-v", "kept:/k", "busy")
    assert ovl.error("volume", "rm", "kept", status=1) == "volume kept is in use by container user"
    ovl.run("rm", "-v", "user")
    ovl.run("volume", "rm", "kept")
    assert ovl.out("volume", "ls", "-q") == ""


def test_an_empty_volume_takes_what_the_image_has_there(ovl: Ovl) -> None:
    assert (
        ovl.out(*RUN, "--rm", "-v", "seeded:/data", "busy", "sh", "-c", "cat /data/seed; stat -c %u:%a /data")
        == "seed\n33:750\n"
    )
    ovl.run(*RUN, "--rm", "-v", "seeded:/data", "busy", "mv", "/data/seed", "/data/other")
    assert ovl.out(*RUN, "--rm", "-v", "seeded:/data", "busy", "ls", "/data") == "other\n"


def test_a_volume_without_a_name_goes_with_its_container(ovl: Ovl) -> None:
    ovl.run(*RUN, "--rm", "-v", "/scratch", "busy", "ls", "/scratch")
    assert ovl.out("volume", "ls", "-q") == ""
    ovl.run(*RUN, "--name", "holder", "-v", "/scratch", "busy", "ls", "/scratch")
    ovl.run("rm", "holder")
    assert len(ovl.out("volume", "ls", "-q").split()) == 1
    ovl.run("volume", "prune", "-f")
    assert ovl.out("volume", "ls", "-q") == ""


def test_a_hostile_image_can_not_lead_a_volume_out_of_it(ovl: Ovl) -> None:
    outside = ovl.base / "outside"
    outside.mkdir()
    before = entries(Path("/etc"))
    ovl.run(*RUN, "--rm", "-v", f"{outside}:/out/trap", "busy", "true")
    assert entries(Path("/etc")) == before


BAD_INPUT = [
    (("--memory", "1k"), "--memory 1k: the least is 6m"),
    (("--memory", "lots"), "--memory 'lots': write a number with b, k, m or g, such as 512m"),
    (("--cpus", "900"), "--cpus '900': write a number from 0.01 to"),
    (("-v", "/nosuch:/x"), "-v /nosuch:/x: there is no /nosuch"),
    (("-v", "a:b:c:d"), "-v a:b:c:d: write SOURCE:TARGET[:ro], or a TARGET alone"),
    (("-v", "vol:/"), "-v vol:/: the root of the container can't be replaced"),
    (("-v", "/etc:/x", "--tmpfs", "/x"), "two volumes have the target /x"),
    (("--cap-add", "FLY"), "there is no capability 'FLY'"),
    (("-p", "80"), "-p has no meaning with --network none"),
    (("-p", "a:b"), "-p a:b: write [IP:]HOST:CONTAINER[/udp]"),
    (("--env-file", "nosuch"), "cannot read the env file nosuch: No such file or directory"),
    (("-u", "nobody"), "there is no user 'nobody' in the image's /etc/passwd"),
    (("-u", "root:nogroup"), "there is no group 'nogroup' in the image's /etc/group"),
    (("--stop-signal", "SIGHUG"), "there is no signal 'SIGHUG'"),
    (("-w", "here"), "-w: 'here' must be an absolute path in the container"),
    (("--hostname", "a b"), "'a b' is no host name: use letters, digits, '-' and '.', 63 at most"),
]


def test_bad_input_is_one_line_and_leaves_nothing(ovl: Ovl) -> None:
    assert ovl.error("run", status=125) == "Missing argument 'IMAGE' (see ovl run --help)"
    assert ovl.error("stop", "--nosuch", "x", status=2) == "No such option '--nosuch' (see ovl stop --help)"
    assert ovl.error("images", "--nosuch", status=2) == "No such option '--nosuch' (see ovl images --help)"
    assert ovl.error("nosuch", status=2) == "No such command 'nosuch' (see ovl --help)"
    for options, message in BAD_INPUT:
        assert ovl.error(*RUN, *options, "busy", "true", status=125).startswith(message), options
    assert ovl.rows() == []
    assert ovl.out("volume", "ls", "-q") == ""


def test_an_image_named_for_a_container_is_told(ovl: Ovl) -> None:
    for words in (("diff", "busy"), ("stop", "busy"), ("exec", "busy", "true")):
        told = ovl.error(*words, status=1)
        assert told.startswith("busy is an image, not a container: ovl run makes a container of it"), words
    assert ovl.error("diff", "nosuch", status=1) == "no such container: nosuch"
    # What happens to begin the image's ID is no such name.
    begun = ovl.out("inspect", "-f", "{{.Id}}", "busy").removeprefix("sha256:")[:2]
    assert ovl.error("diff", begun, status=1) == f"no such container: {begun}"


def test_names_of_containers_and_volumes_are_completed(ovl: Ovl, monkeypatch: pytest.MonkeyPatch) -> None:
    ovl.run("create", "--name", "basket", "-v", "kept:/kept", "busy")
    monkeypatch.setenv("_OVL_COMPLETE", "bash_complete")

    def offered(*words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join(["ovl", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        return ovl.out().split()

    assert offered("exec", "ba") == ["plain,basket"]
    assert offered("inspect", "b") == ["plain,basket", "plain,busy"]
    assert offered("volume", "rm", "k") == ["plain,kept"]
    assert offered("cp", "bask") == ["plain,basket:"]
    monkeypatch.delenv("_OVL_COMPLETE")


def test_a_missing_image_is_pulled_if_it_can_be(ovl: Ovl) -> None:
    assert ovl.error(*RUN, "--pull", "never", "nosuch", status=125) == "there is no image nosuch"
    with registry(ovl.base / "registry") as port:
        name = f"127.0.0.1:{port}/tools/busy:1"
        ovl.run("push", "--plain-http", "busy", name)
        ovl.run("rmi", "busy")
        assert ovl.out(*RUN, "--rm", name) == "default hello /data 33\n"
    assert ovl.out(*RUN, "--rm", name) == "default hello /data 33\n"


def test_the_umask_of_the_user_is_not_that_of_containers(ovl: Ovl) -> None:
    before = os.umask(0o077)
    try:
        script = "cat /file; stat -c %a / /kept /etc"
        assert ovl.out(*RUN, "--rm", "-v", "kept:/kept", "busy", "sh", "-c", script) == "of the image\n755\n755\n755\n"
    finally:
        os.umask(before)
    for name in ("containers", "volumes"):
        assert (ovl.root / name).stat().st_mode & 0o777 == 0o700


def test_a_full_disk_is_an_error_and_nothing_else(ovl: Ovl) -> None:
    small = ovl.base / "small"
    small.mkdir()
    mount(b"tmpfs", bytes(small), b"tmpfs", 0, b"size=7m")
    try:
        tight = Ovl(small / "store", ovl.base, ovl.layout)
        tight.run("load", "-i", ovl.layout)
        # What fills the disk before it is known to run does not come to run.
        script = "sleep 1; exec dd if=/dev/zero of=/big bs=1M"
        words = ("--name", "filler", "-u", "root", "busy", "sh", "-c", script)
        assert b"No space left on device" in tight.run(*RUN, *words, status=1).stderr
        with (small / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space left"):
            while True:
                rest.write(bytes(4096))
        assert "No space left on device" in tight.error(*RUN, "--name", "none", "busy", status=125)
        (small / "rest").unlink()
        assert [row["Name"] for row in tight.rows()] == ["filler"]
        tight.run("rm", "filler")
        assert tight.out(*RUN, "--rm", "busy") == "default hello /data 33\n"
        assert left_of(tight.root) == []
    finally:
        umount(bytes(small))

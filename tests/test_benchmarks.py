"""The benchmarks measure what they say, at tiny sizes, and leave nothing behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import benchmarks.workloads as registered
from benchmarks import ledger, profiling, publish
from benchmarks.inputs import Inputs
from benchmarks.peers import PEERS, FuseOverlayfs2, Kernel, Peer, PeerMissing, Stack
from benchmarks.report import amount, report
from benchmarks.requests import NoTrace, collect, switch, tracing
from benchmarks.results import Machine, Measurement, Run
from benchmarks.roundtrip import round_trip
from benchmarks.run import Plan, WrongPlace, measure
from benchmarks.site import Outcome, Site, fuse_connections, mounts_below
from benchmarks.workload import WORKLOADS, Unknown, Work, Workload, choose
from tests.support.mounts import REPOSITORY
from tests.support.syscalls import MS_BIND, mount

# One of each kind that needs no more than tools/bootstrap installs.
KINDS = (
    *("mount", "chroot", "walk", "missing-again", "read", "untar", "delete", "rm-lower", "chown-lower", "cp"),
    *("git-clone", "git-status", "sqlite-fsync", "first-write-ext4", "first-write-xfs"),
    *(
        "clients-walk-2",
        "clients-create-2",
        "layers-mount-60",
        "layers-walk-10",
        "directory-1000",
        "files-1000",
        "mounts-4",
    ),
)
BY_NAME = {peer.name: peer for peer in PEERS}


@pytest.fixture(scope="module")
def inputs(scratch: Path) -> Inputs:
    return Inputs(scratch / "bench-inputs", small=True)


def a_workload(run: Work, *, limit: float = 30.0) -> Workload:
    return Workload("one", "one", "group", "", 0, run, (), (), (), "s", limit, 100, False, False, True, "scratch")


def on(peer: str, run: Work, scratch: Path, inputs: Inputs, *, limit: float = 30.0) -> Outcome:
    inputs.make("empty")
    return Site(scratch / "bench-site", BY_NAME[peer], a_workload(run, limit=limit), inputs).measure()


def a_run(values: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Run:
    """A run with these values of each round, by workload and peer; None for a failure."""
    measured = [
        Measurement(workload, peer, number, Outcome(value, error=None if value else "it broke"))
        for workload, peers in values.items()
        for peer, rounds in peers.items()
        for number, value in enumerate(rounds)
    ]
    machine = Machine("6.18", "Debian", 2, 2**34, "3.11", 0.1)
    peers = [peer.name for peer in PEERS if any(peer.name in found for found in values.values())]
    return Run("2026-01-02T03:04:05+00:00", [], machine, dict.fromkeys(peers, "1"), {}, measured, 60.0, 0.1)


def test_every_kind_of_workload_runs_on_the_floor_the_kernel_and_ours(scratch: Path) -> None:
    base = scratch / "bench-run"
    base.mkdir()
    arguments = ["--small", "--only", ",".join(KINDS), "--peers", "ext4,kernel,portable", "--rounds", "1"]
    places = ["--cache", str(base / "cache"), "--output", str(base / "results")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", *arguments, *places],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(base)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run.load(base / "results/results.json")
    assert run.failures() == {}
    measured = {(one.workload, one.peer) for one in run.measurements if one.outcome.value}
    assert measured == {(name, peer) for name in KINDS for peer in ("ext4", "kernel", "portable")}
    assert run.notes("files-1000", "portable", "daemon bytes per inode") is not None
    plots = {file.stem for file in (base / "results").glob("*.png")}
    assert {"start", "trees", "clients-walk", "layers-mount", "files-daemon-bytes-per-inode"} <= plots
    assert (base / "results/table.md").read_text().count("\n| ") == len(KINDS) + 2, "a title and a line below it"
    assert {path.name for path in base.iterdir()} == {"cache", "results"}
    subprocess.run(["rm", "-rf", base], check=True)


def test_a_workload_that_hangs_on_a_stopped_daemon_is_ended(scratch: Path, inputs: Inputs) -> None:
    def hang(site: Site) -> None:
        os.kill(site.daemons()[0], signal.SIGSTOP)
        with site.clock:
            os.stat(site.mnt / "missing")

    start = time.monotonic()
    outcome = on("portable", hang, scratch, inputs, limit=1.0)
    assert outcome.error == "took more than 1 s"
    assert time.monotonic() - start < 10
    assert mounts_below(scratch / "bench-site") == []
    assert not (scratch / "bench-site").exists()


def test_programs_that_a_workload_leaves_running_are_ended(scratch: Path, inputs: Inputs) -> None:
    def leave(site: Site) -> None:
        with site.clock:
            subprocess.Popen(["sleep", "300"], cwd=site.mnt, start_new_session=True)

    outcome = on("kernel", leave, scratch, inputs)
    assert outcome.error is None
    assert mounts_below(scratch / "bench-site") == []


@pytest.mark.parametrize("peer", ["ext4", "kernel", "portable"])
def test_a_wrong_result_is_a_failure_of_the_peer(peer: str, scratch: Path, inputs: Inputs) -> None:
    def find_nothing(site: Site) -> None:
        with site.clock:
            names = os.listdir(site.mnt)
        site.check("names", names, ["something"])

    outcome = on(peer, find_nothing, scratch, inputs)
    assert outcome.error == "WrongResult: names: [] instead of ['something']"


def test_a_failing_command_is_told_with_its_message(scratch: Path, inputs: Inputs) -> None:
    outcome = on("kernel", lambda site: print(site.run("ls", "/nowhere")), scratch, inputs)
    assert outcome.error is not None
    assert "ls exited with 2" in outcome.error and "/nowhere" in outcome.error


def test_a_traceback_in_our_log_is_a_failure(scratch: Path, inputs: Inputs) -> None:
    def log(site: Site) -> None:
        with site.clock, (site.base / "log").open("a") as file:
            file.write("Traceback (most recent call last):\n")

    error = on("portable", log, scratch, inputs).error
    assert error is not None and error.startswith("the daemon logged: Traceback")


def test_a_workload_that_measures_nothing_fails(scratch: Path, inputs: Inputs) -> None:
    assert on("kernel", lambda site: None, scratch, inputs).error == "the workload measured nothing"


def test_the_floor_cannot_change_a_layer_unless_it_works_on_a_copy(scratch: Path, inputs: Inputs) -> None:
    def write(site: Site) -> None:
        with site.clock:
            (site.mnt / "file").touch()

    outcome = on("ext4", write, scratch, inputs)
    assert outcome.error is not None and "Read-only file system" in outcome.error


def test_a_peer_that_changes_a_lower_layer_breaks_the_run(scratch: Path) -> None:
    class Careless(Peer):
        name = "careless"
        fuse = False

        def version(self) -> str:
            return "1"

        def mount(self, stack: Stack, mountpoint: Path) -> None:
            mount(bytes(stack.lowers[0]), bytes(mountpoint), None, MS_BIND)

    def write(site: Site) -> None:
        with site.clock:
            (site.mnt / "file").touch()

    inputs = Inputs(scratch / "bench-careless", small=True)
    with pytest.raises(WrongPlace, match="changed the lower layers empty"):
        measure(Plan([a_workload(write)], [Careless()], 1, 1.0), inputs, scratch)
    subprocess.run(["rm", "-rf", inputs.cache], check=True)


@pytest.mark.parametrize("breaks", [False, True])
def test_what_makes_files_is_measured_on_an_ext4_with_a_journal_of_which_nothing_stays(
    breaks: bool, scratch: Path, inputs: Inputs
) -> None:
    told = scratch / "bench-journal"

    def look(site: Site) -> None:
        with site.clock:
            (site.mnt / "file").touch()
        journals = subprocess.run(["findmnt", "-no", "SOURCE", "-T", site.base], capture_output=True, text=True)
        journal = Path(f"/proc/fs/jbd2/{Path(journals.stdout.strip()).name}-8")
        one_disk = os.stat(site.base).st_dev == os.stat(site.input("empty")).st_dev
        told.write_text(json.dumps([journal.exists(), one_disk]))

    class Broken(Kernel):
        def mount(self, stack: Stack, mountpoint: Path) -> None:
            raise KeyboardInterrupt

    one = dataclasses.replace(a_workload(look), filesystem="journal", writes=True)
    plan = Plan([one], [Broken() if breaks else BY_NAME["kernel"]], 1, 1.0)
    if breaks:
        with pytest.raises(KeyboardInterrupt):
            measure(plan, inputs, scratch)
    else:
        assert measure(plan, inputs, scratch).failures() == {}
        assert json.loads(told.read_text()) == [True, True]
        told.unlink()
    assert mounts_below(scratch) == []
    assert not (scratch / "disk.ext4").exists()
    backing = [file.read_text() for file in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert not [name for name in backing if str(scratch) in name]


def test_requests_are_counted_by_opcode(scratch: Path, inputs: Inputs) -> None:
    told = scratch / "bench-requests"

    def ask(site: Site) -> None:
        switch(on=True)
        with site.clock:
            for number in range(7):
                os.path.exists(site.mnt / f"missing{number}")
            (site.mnt / "made").mkdir()
        switch(on=False)
        counts = collect(fuse_connections(site.base))
        told.write_text(json.dumps({one.opcode: [one.requests, one.errors, one.seconds] for one in counts}))

    try:
        with tracing():
            outcome = on("portable", ask, scratch, inputs)
    except NoTrace:
        assert [int(part) for part in os.uname().release.split(".")[:2]] < [6, 11]
        return
    assert outcome.error is None
    counts = json.loads(told.read_text())
    told.unlink()
    assert counts["LOOKUP"][0] == 8, "seven names and the new one"
    assert counts["MKDIR"][:2] == [1, 0]
    assert 0 < counts["MKDIR"][2] < 1


def test_a_round_trip_to_a_daemon_that_does_nothing_takes_some_time(scratch: Path) -> None:
    base = scratch / "bench-roundtrip"
    base.mkdir()
    as_it_is, awake = round_trip(base, count=50)
    assert as_it_is > 0 and awake > 0
    assert list(base.iterdir()) == [], "it leaves nothing"


def test_time_by_function_counts_a_function_once_a_stack() -> None:
    stacks = ["main (a.py:1);f (a.py:2);f (a.py:3) 3", "main (a.py:1);g (b.so) 1", "main (a.py:1);poll (libc.so.6) 9"]
    stacks += ["serve (overlayfs_py/engines/native/device.pyx:9);0x7f;read (libc.so.6) 5"]
    lines = profiling.functions_table(stacks)
    assert lines[0] == "4 samples of work, 14 of waiting"
    assert "  75.0%   75.0%  f (a.py)" in lines
    assert "   0.0%  100.0%  main (a.py)" in lines


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was disturbed, which met both peers.
    run = a_run({"walk": {"kernel": [1.0, 10.0, 1.0], "portable": [2.0, 20.0, 2.2]}})
    ratio = run.ratio("walk", "portable", "kernel")
    assert ratio is not None
    assert [ratio.median, ratio.least, ratio.greatest] == pytest.approx([2.0, 2.0, 2.2])
    assert ratio.spread == pytest.approx(0.05)


def test_the_best_fuse_peer_is_none_of_ours_and_did_not_fail() -> None:
    peers: dict[str, list[float | None]] = {
        "kernel": [1.0],
        "fuse-overlayfs": [4.0],
        "fuse-overlayfs-2": [None],
        "unionfs-fuse": [5.0],
    }
    assert a_run({"walk": {**peers, "portable": [2.0]}}).best_fuse("walk") == "fuse-overlayfs"


def test_the_table_shows_failures_and_missing_peers() -> None:
    run = a_run(
        {"walk": {"kernel": [0.1, 0.1], "fuse-overlayfs": [0.4, 0.5], "unionfs-fuse": [None], "portable": [0.2, 0.2]}}
    )
    run.missing["fuse-overlayfs-2"] = "no cargo"
    text = report(run)
    row = next(line for line in text.splitlines() if "`walk`" in line and line.startswith("|"))
    assert "| 450 ms (4.50 × ± 11%) | fails | 200 ms (2.00 × ± 0%; **0.450 × ± 11%**) |" in row
    assert "- `walk` on unionfs-fuse: it broke" in text
    once = report(a_run({"walk": {"kernel": [0.1], "portable": [0.2]}}))
    assert "| 100 ms | 200 ms (2.00 ×) |" in once
    assert "- fuse-overlayfs-2 is missing: no cargo" in text


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(12.345, "s", "12.3 s"), (0.0123, "s", "12.3 ms"), (4.2e-6, "s", "4.20 µs"), (3 * 2**20, "bytes", "3.00 MiB")],
)
def test_amounts_have_three_digits_and_a_unit(value: float, unit: str, shown: str) -> None:
    assert amount(value, unit) == shown


def test_workloads_are_chosen_by_name_family_group_or_pattern() -> None:
    assert [one.name for one in choose(["untar", "walk"])] == ["walk", "untar"]
    assert [one.name for one in choose(["clients-walk"])] == [f"clients-walk-{count}" for count in (1, 2, 4, 8)]
    assert {one.group for one in choose(["trees"])} == {"trees"}
    assert len(choose(["fio-*-4k-*-rand"])) == 6
    assert choose([]) == list(WORKLOADS.values())
    with pytest.raises(Unknown, match="no workload is called nothing; there are mount, "):
        choose(["nothing"])


def test_every_module_of_workloads_is_registered() -> None:
    modules = {file.stem for file in Path(registered.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(registered.__all__) == modules
    assert {one.run.__module__.rpartition(".")[2] for one in WORKLOADS.values()} == modules


def test_a_program_built_by_hand_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSE_OVERLAYFS_2", "/nowhere/fuse-overlayfs")
    with pytest.raises(PeerMissing, match="FUSE_OVERLAYFS_2 names no program: /nowhere/fuse-overlayfs"):
        FuseOverlayfs2().install()


def test_a_peer_that_is_missing_without_cargo_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSE_OVERLAYFS_2", raising=False)
    monkeypatch.setattr("benchmarks.peers.CARGO_ROOT", Path("/nowhere"))
    monkeypatch.setattr("benchmarks.peers.shutil.which", lambda name: None)
    with pytest.raises(PeerMissing, match=r"needs cargo of Rust 1\.85 or newer; or set FUSE_OVERLAYFS_2"):
        FuseOverlayfs2().install()


def test_the_ledger_gains_a_line_and_tells_what_became_slower(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    before = {"kernel": [1.0, 1.0], "portable": [2.0, 2.2]}
    assert ledger.append(a_run({"walk": before, "untar": before}), file) == []
    noisy, slow = {"kernel": [1.0, 1.0], "portable": [2.1, 4.0]}, {"kernel": [1.0, 1.0], "portable": [3.0, 3.2]}
    told = ledger.append(a_run({"walk": noisy, "untar": slow}), file)
    assert told == ["untar on portable took 2.10 × as long as the kernel's, and takes 3.10 × now"]
    assert ledger.append(a_run({"walk": {"kernel": [1.0], "portable": [None]}}), file) == [
        "walk on portable fails now: it broke"
    ]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[1]["ratios"]["portable"]["untar"]["kernel"] == [3.1, 3.0, 3.2]


def test_publishing_replaces_the_results_in_the_readme_alone(tmp_path: Path) -> None:
    run = a_run({"walk": {"kernel": [1.0], "portable": [2.0]}})
    (tmp_path / "names.png").touch()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{publish.BEGIN}\nthe last results\n{publish.END}\nafter\n")
    publish.publish(run, readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "the last results" not in text
    assert "![names](benchmarks/results/names.png)" in text
    publish.publish(run, readme, tmp_path)
    assert readme.read_text() == text

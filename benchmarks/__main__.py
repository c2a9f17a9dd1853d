"""The program: python -m benchmarks run, list, report, publish, profile or roundtrip."""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import benchmarks.workloads as _  # noqa: F401 - registers them
from benchmarks.inputs import Inputs
from benchmarks.ledger import append
from benchmarks.peers import PEERS, ROOT, Peer, PeerMissing
from benchmarks.plots import draw
from benchmarks.profiling import profile
from benchmarks.publish import publish
from benchmarks.report import report
from benchmarks.results import Run
from benchmarks.roundtrip import round_trip
from benchmarks.run import Plan, WrongPlace, check_scratch, isolate, measure
from benchmarks.workload import WORKLOADS, Unknown, choose

RESULTS: Final = Path(__file__).with_name("results")
CACHE: Final = ROOT / ".cache/bench"
ROUNDS: Final = 3
MINUTES: Final = 25.0


def main() -> int:
    options = _parser().parse_args()
    try:
        status: int = options.act(options)
    except (PeerMissing, Unknown, WrongPlace) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure, and write a table, plots and JSON")
    run.add_argument("--only", default="", help="workloads, families, groups or patterns, separated by commas")
    run.add_argument("--peers", default="", help="peers, separated by commas")
    run.add_argument("--rounds", type=int, default=ROUNDS)
    run.add_argument("--minutes", type=float, default=MINUTES, help="begin no more rounds after that")
    run.add_argument("--output", type=Path, help="where results go; default: results, or results/partial for a part")
    run.add_argument("--cache", type=Path, default=CACHE, help="where inputs are kept")
    run.add_argument("--small", action="store_true", help="tiny inputs, to test the benchmarks themselves")
    run.set_defaults(act=_run)
    profiled = commands.add_parser("profile", help="requests by opcode, and time by function of the daemon")
    profiled.add_argument("workload")
    profiled.add_argument("--peers", default="portable")
    profiled.add_argument("--rounds", type=int, default=ROUNDS)
    profiled.add_argument("--cache", type=Path, default=CACHE)
    profiled.add_argument("--small", action="store_true")
    profiled.set_defaults(act=_profile)
    floor = commands.add_parser("roundtrip", help="what a request to a daemon that does nothing takes")
    floor.set_defaults(act=_round_trip)
    listed = commands.add_parser("list", help="the workloads and the peers")
    listed.set_defaults(act=_list)
    again = commands.add_parser("report", help="the table and plots once more, of results that are there")
    again.add_argument("--output", type=Path, default=RESULTS)
    again.set_defaults(act=_report)
    published = commands.add_parser("publish", help="put the results into the README, and a line into the ledger")
    published.set_defaults(act=_publish)
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def choose_peers(wanted: Iterable[str]) -> list[Peer]:
    """The peers that are named; all for none. Raises Unknown."""
    names = list(wanted)
    for name in names:
        if name not in {peer.name for peer in PEERS}:
            raise Unknown(f"no peer is called {name}; there are {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if peer.name in names or not names]


def _run(options: argparse.Namespace) -> int:
    only, named = _words(options.only), _words(options.peers)
    plan = Plan(choose(only), choose_peers(named), options.rounds, options.minutes, only)
    output: Path = options.output or (RESULTS / "partial" if only or named or options.small else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    isolate()
    with tempfile.TemporaryDirectory(prefix="overlayfs-py-bench-", dir=_temporary()) as scratch:
        check_scratch(Path(scratch))
        run = measure(plan, Inputs(options.cache, small=options.small), Path(scratch))
    run.save(output / "results.json")
    _write(run, output)
    print(f"the results are in {output}")
    failed = [name for (name, peer) in run.failures() if any(one.name == peer and one.ours for one in PEERS)]
    if failed:
        print(f"FAILED on ours: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    if run.missing:
        print(f"MISSING: {', '.join(run.missing)}", file=sys.stderr)
    return 1 if failed or run.missing else 0


def _temporary() -> str:
    default = tempfile.gettempdir()
    # /tmp is often in memory.
    return "/var/tmp" if default == "/tmp" else default


def _write(run: Run, output: Path) -> None:
    for old in output.glob("*.png"):
        old.unlink()
    (output / "table.md").write_text(report(run))
    draw(run, output)


def _profile(options: argparse.Namespace) -> int:
    [workload, *more] = choose([options.workload])
    if more:
        raise Unknown(f"{options.workload} is more than one workload")
    isolate()
    with tempfile.TemporaryDirectory(prefix="overlayfs-py-bench-", dir=_temporary()) as scratch:
        inputs = Inputs(options.cache, small=options.small)
        for peer in choose_peers(_words(options.peers)):
            print(profile(workload, peer, options.rounds, inputs, Path(scratch), RESULTS / "partial"))
    return 0


def _round_trip(options: argparse.Namespace) -> int:
    isolate()
    with tempfile.TemporaryDirectory(prefix="overlayfs-py-bench-", dir=_temporary()) as scratch:
        as_it_is, awake = round_trip(Path(scratch))
    print(f"a round trip takes {as_it_is:.1f} µs, and {awake:.1f} µs while processors are kept awake")
    return 0


def _list(options: argparse.Namespace) -> int:
    for peer in PEERS:
        print(f"peer      {peer.name:28} {peer.title}")
    for name, one in WORKLOADS.items():
        print(f"{one.group:9} {name:28} {one.title}")
    return 0


def _report(options: argparse.Namespace) -> int:
    _write(Run.load(options.output / "results.json"), options.output)
    return 0


def _publish(options: argparse.Namespace) -> int:
    run = Run.load(RESULTS / "results.json")
    publish(run)
    for line in append(run):
        print(f"SLOWER: {line}")
    return 0


sys.exit(main())

"""All measurements of a run: workload by workload, peer by peer, round by round.

A round has every workload on every peer once, the peers of a workload one right after the other, each time beginning
with another one. So a disturbance of the machine meets all peers of one round alike, and not all rounds.
"""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from benchmarks.ground import grounds
from benchmarks.inputs import Inputs, fingerprint, remove
from benchmarks.peers import Peer, PeerMissing, install_debian
from benchmarks.results import Machine, Measurement, Run
from benchmarks.site import Site
from benchmarks.workload import Workload
from tests.support.mounts import show_connections
from tests.support.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, become_subreaper, mount, unshare
from tests.support.uring import SWITCH, switch_kept


class WrongPlace(Exception):
    """The benchmarks can't run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    workloads: Sequence[Workload]
    peers: Sequence[Peer]
    rounds: int
    minutes: float
    """After that only what was not measured yet is; so all is measured at least once."""
    only: Sequence[str] = ()
    """What was asked for, for the report; nothing for all."""


def isolate() -> None:
    """Put this process into a mount namespace of its own, and let it adopt the daemons."""
    if os.geteuid() != 0:
        raise WrongPlace("the benchmarks mount filesystems: run them as root")
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    show_connections()
    become_subreaper()
    # An ordinary end, so that everything is cleaned up.
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def check_scratch(scratch: Path) -> None:
    """Raises WrongPlace unless a directory is on ext4: the floor is named after it."""
    ask = ["stat", "-f", "-c", "%T", str(scratch)]
    kind = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    if kind != "ext2/ext3":
        raise WrongPlace(f"{scratch} is on {kind}, not on ext4; name another directory with TMPDIR=")


def install(peers: Sequence[Peer], workloads: Sequence[Workload]) -> dict[str, str]:
    """Install what is missing; returns why, for each peer that can't be had. Raises PeerMissing for a tool."""
    install_debian(sorted({tool for one in workloads for tool in one.tools}))
    missing = {}
    for peer in peers:
        try:
            peer.install()
        except PeerMissing as error:
            missing[peer.name] = str(error)
            print(f"{peer.name} IS MISSING: {error}", flush=True)
    return missing


def prepare(workloads: Sequence[Workload], inputs: Inputs) -> list[str]:
    """Make the inputs; returns the names of those that are layers."""
    layers = sorted({name for one in workloads for name in one.lowers or ("empty",)})
    for name in sorted({*layers, *(name for one in workloads for name in one.inputs)}):
        inputs.make(name)
    return layers


def measure(plan: Plan, inputs: Inputs, scratch: Path) -> Run:
    """Carry out a plan. Raises WrongPlace when a peer changed an input."""
    missing = install(plan.peers, plan.workloads)
    peers = [peer for peer in plan.peers if peer.name not in missing]
    layers = prepare(plan.workloads, inputs)
    before = {name: fingerprint(inputs.path(name)) for name in layers}
    settings = contextlib.ExitStack()
    run = Run(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        only=list(plan.only),
        machine=_machine(),
        versions={peer.name: peer.version() for peer in peers},
        missing=missing,
    )
    started = time.monotonic()
    took = dict.fromkeys((one.name for one in plan.workloads), 0.0)
    hopeless: set[tuple[str, str]] = set()
    with settings:
        if SWITCH.exists():
            # Some peers turn FUSE over io_uring on.
            settings.enter_context(switch_kept())
        places = settings.enter_context(grounds(scratch, inputs, plan.workloads))
        copied = places.fingerprints()
        for number in range(plan.rounds):
            # Those that drop the caches come last, so that the layers have to be read again only once a round. Before
            # them those come last that took long, so that most have all their rounds when the time is over.
            for workload in sorted(plan.workloads, key=lambda one: (one.cold, took[one.name])):
                began = time.monotonic()
                late = number > 0 and began - started + took[workload.name] > plan.minutes * 60
                if number >= workload.rounds or late:
                    continue
                ground = places.of(workload)
                if not workload.cold:
                    for name in workload.lowers:
                        ground.inputs.warm(name)
                turn = number % len(peers)
                for peer in [*peers[turn:], *peers[:turn]]:
                    if peer.only_writes and not workload.writes:
                        continue
                    if (workload.name, peer.name) in hopeless:
                        continue
                    # What a peer has written is not to slow down the next one.
                    ground.settle()
                    outcome = Site(ground.base, peer, workload, ground.inputs).measure()
                    run.measurements.append(Measurement(workload.name, peer.name, number, outcome))
                    if outcome.error is not None:
                        print(f"{workload.name} on {peer.name} FAILED: {outcome.error}", flush=True)
                        # It would take as long again, and the answer would be the same.
                        hopeless.add((workload.name, peer.name))
                if workload.cold:
                    places.cooled()
                os.sync()
                took[workload.name] = time.monotonic() - began
                _tell(run, workload, number, time.monotonic() - started)
        spoilt = places.fingerprints() != copied
    run.seconds = time.monotonic() - started
    run.load_after = os.getloadavg()[0]
    changed = [name for name in layers if fingerprint(inputs.path(name)) != before[name]]
    if changed:
        for name in changed:
            remove(inputs.path(name))
        raise WrongPlace(f"a peer changed the lower layers {', '.join(changed)}; they will be made anew")
    if spoilt:
        raise WrongPlace("a peer changed the copies of the lower layers that were made for this run")
    return run


def _tell(run: Run, workload: Workload, number: int, seconds: float) -> None:
    measured = [one for one in run.measurements if (one.workload, one.round) == (workload.name, number)]
    figures = "  ".join(
        f"{one.peer} {'-' if one.outcome.value is None else format(one.outcome.value, '.4g')}" for one in measured
    )
    print(f"{seconds:6.0f} s  round {number + 1}  {workload.name}: {figures}", flush=True)


def _machine() -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        kernel=platform.release(),
        system=platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        processors=os.cpu_count() or 1,
        memory=memory,
        python=sys.version.split()[0],
        load_before=os.getloadavg()[0],
    )

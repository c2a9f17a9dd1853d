"""One workload under a profiler: requests by opcode, and the daemon's time by function.

The requests are counted first, with nothing else looking on. Then py-spy samples the daemon if it is Python (with the
frames of compiled modules and C libraries), and perf any daemon (with the kernel's part). All look on only while the
workload's clock runs.
"""

import collections
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from benchmarks.ground import Ground, grounds
from benchmarks.inputs import Inputs
from benchmarks.peers import Peer, PeerMissing, install_debian
from benchmarks.requests import Count, NoTrace, collect, switch, tracing
from benchmarks.run import WrongPlace, install, prepare
from benchmarks.site import Site, Watch, fuse_connections
from benchmarks.workload import Workload

_RATE: Final = 500  # samples a second
# py-spy counts a thread that waits as well, when it looks at C libraries.
_WAITING: Final = ("epoll_wait", "sigtimedwait", "pthread_cond_wait", "pthread_cond_timedwait", "sem_clockwait", "poll")
_TAKING_REQUESTS: Final = ("read", "syscall")
"""Calls by which an engine waits for requests; elsewhere they are work."""
_UNKNOWN: Final = "unknown"
_SHOWN: Final = 40  # functions
_START_LIMIT: Final = 30.0  # seconds for a profiler to be at work


class _Requests:
    """Counts requests; leaves them in a file, as it works in the child."""

    def __init__(self, base: Path, file: Path) -> None:
        self.base = base
        self.file = file

    def start(self, daemons: Sequence[int]) -> None:
        switch(on=True)

    def stop(self) -> None:
        switch(on=False)
        self.file.write_text(json.dumps([asdict(count) for count in collect(fuse_connections(self.base))]))


class _Sampler:
    """A profiler that is attached to the daemon, and writes its file when it is interrupted.

    `ready` is what it prints when it is at work; for one that doesn't say it, None, half a second has to do.
    """

    def __init__(self, command: Sequence[str], ready: str | None) -> None:
        self.command = command
        self.ready = ready
        self.running: subprocess.Popen[str] | None = None

    def start(self, daemons: Sequence[int]) -> None:
        if len(daemons) != 1:
            raise OSError(f"there are {len(daemons)} daemons to look at; needs exactly one")
        command = [word.replace("PID", str(daemons[0])) for word in self.command]
        self.running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.running.stdout is not None
        if self.ready is None:
            time.sleep(0.5)
            return
        said = ""
        while self.ready not in said:
            if not (line := self.running.stdout.readline()):
                raise OSError(f"{command[0]} did not start: {said.strip()}")
            said += line

    def stop(self) -> None:
        assert self.running is not None
        self.running.send_signal(signal.SIGINT)
        self.running.communicate(timeout=_START_LIMIT)


def profile(workload: Workload, peer: Peer, rounds: int, inputs: Inputs, scratch: Path, output: Path) -> str:
    """Run a workload under each profiler and describe what was seen; the stacks, for a flame graph, go into `output`.

    Raises WrongPlace when the peer has no daemon or the workload fails, PeerMissing when a profiler or the peer can't
    be installed.
    """
    if not peer.fuse:
        raise WrongPlace(f"{peer.name} has no daemon to look at")
    missing = install([peer], [workload])
    if missing:
        raise PeerMissing(missing[peer.name])
    install_debian(["linux-perf"])
    prepare([workload], inputs)
    output.mkdir(parents=True, exist_ok=True)

    with grounds(scratch, inputs, [workload]) as places:
        return _profile(workload, peer, rounds, places.of(workload), scratch, output)


def _profile(workload: Workload, peer: Peer, rounds: int, ground: Ground, scratch: Path, output: Path) -> str:
    def rounds_under(watch: Watch, file: Path) -> list[str]:
        results = []
        for _ in range(rounds):
            for name in workload.lowers if not workload.cold else ():
                ground.inputs.warm(name)
            ground.settle()
            outcome = Site(ground.base, peer, workload, ground.inputs, watch=watch).measure()
            if workload.cold:
                ground.inputs.cooled()
            if outcome.error is not None:
                raise WrongPlace(f"{workload.name} on {peer.name} failed: {outcome.error}")
            results.append(file.read_text() if file.suffix != ".perf" else _perf_report(file))
        return results

    text = [f"{workload.name} on {peer.name} ({peer.version()}): {workload.title}; {rounds} rounds"]
    try:
        with tracing():
            file = scratch / "requests.json"
            counted = rounds_under(_Requests(ground.base, file), file)
            text += ["", *_requests_table(counted)]
    except NoTrace as error:
        text += ["", str(error)]
    if peer.ours:
        file = scratch / "stacks"
        spy = str(Path(sys.executable).with_name("py-spy"))
        flags = ["--native", "--rate", str(_RATE), "--format", "raw"]
        command = [spy, "record", *flags, "--pid", "PID", "--output", str(file)]
        stacks = "".join(rounds_under(_Sampler(command, "Sampling process"), file))
        (output / f"{workload.name}-{peer.name}.stacks").write_text(stacks)
        text += ["", "py-spy: share of the time in a function itself, and in it with all that it calls", ""]
        text += functions_table(stacks.splitlines())
    file = scratch / "samples.perf"
    command = ["perf", "record", "-F", str(_RATE), "-e", "cpu-clock", "-g", "-p", "PID", "-o", str(file)]
    reports = rounds_under(_Sampler(command, None), file)
    text += ["", "perf: share of the time in a function itself", "", *_perf_table(reports)]
    return "\n".join(text) + "\n"


def _requests_table(counted: Iterable[str]) -> list[str]:
    total: dict[str, Count] = {}
    rounds = 0
    for one in counted:
        rounds += 1
        for fields in json.loads(one):
            count = total.setdefault(fields["opcode"], Count(fields["opcode"]))
            count.requests += fields["requests"]
            count.errors += fields["errors"]
            count.seconds += fields["seconds"]
    lines = [f"{'request':18} {'a round':>10} {'errors':>8} {'µs each':>9} {'ms a round':>11}"]
    for count in sorted(total.values(), key=lambda one: one.seconds, reverse=True):
        each, together = count.seconds / count.requests * 1e6, count.seconds / rounds * 1e3
        frequency = f"{count.requests / rounds:10.0f} {count.errors / rounds:8.0f}"
        lines.append(f"{count.opcode:18} {frequency} {each:9.1f} {together:11.1f}")
    return lines


def functions_table(stacks: Iterable[str]) -> list[str]:
    """From lines such as `outer (file.py:1);inner (file.py:2) 17`: those functions with the most time."""
    itself: collections.Counter[str] = collections.Counter()
    with_called: collections.Counter[str] = collections.Counter()
    waiting = 0
    for line in stacks:
        stack, _, samples = line.rpartition(" ")
        frames = stack.split(";")
        if _waits(frames):
            waiting += int(samples)
            continue
        # Without the line numbers, and frames whose name nobody knows.
        functions = [re.sub(r":\d+\)$", ")", frame) for frame in frames if not frame.startswith("0x")] or [_UNKNOWN]
        itself[functions[-1]] += int(samples)
        for function in set(functions):
            with_called[function] += int(samples)
    total = sum(itself.values()) or 1
    lines = [f"{total} samples of work, {waiting} of waiting", f"{'itself':>7} {'all':>7}"]
    for order in (itself, with_called):
        for function, _ in order.most_common(_SHOWN):
            lines.append(f"{itself[function] / total:7.1%} {with_called[function] / total:7.1%}  {function}")
        lines.append("")
    return lines[:-1]


def _waits(frames: Sequence[str]) -> bool:
    function = frames[-1].partition(" ")[0]
    caller = next((frame for frame in reversed(frames[:-1]) if not frame.startswith("0x")), "")
    return function in _WAITING or (function in _TAKING_REQUESTS and "overlayfs_py/engines/" in caller)


def _perf_report(file: Path) -> str:
    report = ["perf", "report", "-i", str(file), "--stdio", "-q", "--no-children", "-g", "none"]
    fields = ["-F", "sample,dso,symbol", "-t", ";"]
    return subprocess.run([*report, *fields], capture_output=True, text=True, check=True).stdout


def _perf_table(reports: Iterable[str]) -> list[str]:
    itself: collections.Counter[str] = collections.Counter()
    for report in reports:
        for line in report.splitlines():
            samples, _, rest = line.partition(";")
            if samples.strip().isdigit():
                where, _, function = rest.partition(";")
                itself[f"{function.strip()}  {where.strip()}"] += int(samples)
    total = sum(itself.values()) or 1
    kernel = sum(samples for name, samples in itself.items() if name.startswith("[k]"))
    lines = [f"{total} samples, {kernel / total:.0%} of them in the kernel"]
    return [*lines, *(f"{samples / total:7.1%}  {name}" for name, samples in itself.most_common(_SHOWN))]

"""How long podman and containerd take on us and on their other drivers, and what their kernel asks of us meanwhile.

    python -m tests.engines.measure [ROUNDS]

Prints a table of the medians in seconds; then, of one build and one commit on us and on fuse-overlayfs, the requests by
opcode. The image is that of the tests with a Debian root; the build and the container change some thousand files of it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.requests import Count, collect, switch, tracing
from tests.engines.containerd_rig import OURS, THEIRS, containerd
from tests.engines.image import TAG, make_debian
from tests.engines.podman import IMAGE, Store, store
from tests.support.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare

_CHANGES: Final = "rm -rf /usr/share/doc && chmod -R g+w /usr/share/perl && cp -r /etc /copied && echo x >>/etc/passwd"
_CONTAINERFILE: Final = f"""FROM {IMAGE}
RUN echo 1 >/etc/motd && mkdir /new && echo 1 >/new/file
RUN cp -r /usr/share/perl /copied
RUN rm -rf /usr/share/doc && chmod -R g+w /copied
RUN mv /copied /moved && find / -xdev -name '*.pm' | wc -l
LABEL a=b
"""
_BUILD: Final = ("build", "--no-cache", "--network=none", "--quiet", "--tag", "localhost/built")
_COMMIT: Final = ("commit", "--quiet", "changed", "localhost/changed")
_GLANCE: Final = 0.002  # seconds between looks at the mounts there are

Times = dict[str, dict[str, list[float]]]


@contextmanager
def timed(times: Times, what: str, driver: str) -> Iterator[None]:
    """Add the seconds that something takes to a row of the table."""
    start = time.monotonic()
    yield
    times[what][driver].append(time.monotonic() - start)


def podman_once(each: Store, driver: str, context: Path, times: Times) -> None:
    """Run, change, compare, commit, build, save and remove, each once."""
    with timed(times, "podman run", driver):
        each.podman("run", "--detach", "--name", "changed", IMAGE, "sh", "-c", _CHANGES)
    each.podman("wait", "changed")
    with timed(times, "podman diff", driver):
        each.podman("diff", "changed")
    with timed(times, "podman commit", driver):
        each.podman(*_COMMIT)
    with timed(times, "podman build", driver):
        each.podman(*_BUILD, str(context), limit=300.0)
    with timed(times, "podman save", driver):
        each.podman("save", "--quiet", "--output", str(context / "saved"), "localhost/built")
    (context / "saved").unlink()
    with timed(times, "podman rm, rmi", driver):
        each.podman("rm", "changed")
        each.podman("rmi", "localhost/built", "localhost/changed")


def requests_of(each: Store, *command: str) -> list[Count]:
    """What the kernel asks while a command of podman runs, of all mounts it makes."""
    found: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_GLANCE):
            for line in Path("/proc/self/mountinfo").read_text().splitlines():
                words = line.split(" ")
                if words[4].startswith(f"{each.base}/store/overlay/"):
                    found.add(int(words[2].partition(":")[2]))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        switch(on=True)
        each.podman(*command, limit=300.0)
        switch(on=False)
    finally:
        ended.set()
        looking.join()
    return collect(found)


def show(title: str, counts: list[Count]) -> None:
    """The opcodes that took the most time, in lines."""
    total = sum(count.requests for count in counts)
    print(f"\n{title}: {total} requests, {sum(count.seconds for count in counts):.2f} s")
    for count in sorted(counts, key=lambda count: -count.seconds)[:8]:
        each = count.seconds / count.requests * 1e6
        print(f"  {count.opcode:12} {count.requests:7} × {each:5.0f} µs = {count.seconds:.2f} s")


def measure_podman(base: Path, layout: Path, rounds: int, times: Times) -> None:
    context = base / "context"
    context.mkdir()
    (context / "Containerfile").write_text(_CONTAINERFILE)
    with ExitStack() as stack:
        stores = {}
        for driver in ("ours", "fuse-overlayfs", "overlay"):
            stores[driver] = stack.enter_context(store(base / driver, driver))
            stores[driver].pull(layout)
        for _ in range(rounds):
            for driver, each in stores.items():
                podman_once(each, driver, context, times)
        stack.enter_context(tracing())
        for driver in ("ours", "fuse-overlayfs"):
            each = stores[driver]
            each.podman("run", "--detach", "--name", "changed", IMAGE, "sh", "-c", _CHANGES)
            each.podman("wait", "changed")
            show(f"podman commit on {driver}", requests_of(each, *_COMMIT))
            show(f"podman build on {driver}", requests_of(each, *_BUILD, str(context)))


def measure_containerd(base: Path, layout: Path, rounds: int, times: Times) -> None:
    image = f"example.org/debian:{TAG}"
    with containerd(base / "containerd") as engine:
        for _ in range(rounds):
            for kind, driver in ((OURS, "ours"), (THEIRS, "overlay")):
                with timed(times, "ctr image import", driver):
                    engine.take(layout, kind, image)
                with timed(times, "ctr run", driver):
                    engine.container(kind, "short", "true")
                with engine.living(kind, "changed", image):
                    engine.exec("changed", _CHANGES)
                    with timed(times, "ctr snapshots diff", driver):
                        engine.archive(kind, "changed")
                engine.ctr("image", "rm", "--sync", image)


def main(rounds: int) -> None:
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    times: Times = defaultdict(lambda: defaultdict(list))
    base = Path(tempfile.mkdtemp(prefix="overlayfs-py-engines-", dir="/var/tmp"))
    try:
        layout = base / "layout"
        make_debian(layout)
        measure_containerd(base, layout, rounds, times)
        measure_podman(base, layout, rounds, times)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)
    print("\n| seconds | overlayfs-py | fuse-overlayfs 1 | the kernel's overlayfs |\n| --- | --- | --- | --- |")
    for what, row in times.items():
        cells = [
            f"{statistics.median(row[driver]):.2f}" if driver in row else "–"
            for driver in ("ours", "fuse-overlayfs", "overlay")
        ]
        print(f"| `{what}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    os.environ.setdefault("TMPDIR", "/var/tmp")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)

"""`replay FILE`: run a reported script again. `hunt`: collect differences over many random scripts."""

import argparse
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.differential.pair import Divergence, Finding, Pair, report, run
from tests.differential.random_ops import MAKERS, World, first_step, random_step
from tests.differential.reduce import reduced
from tests.differential.script import Script, load
from tests.differential.side import PROFILES, Mounter, Profile, fuse_overlayfs, kernel, ours
from tests.differential.stacks import any_stack
from tests.support.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, become_subreaper, mount, unshare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument(
        "--second", help="`ours:OPTIONS`, `kernel:OPTIONS` or `fuse-overlayfs:OPTIONS` to compare the kernel with"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    replaying = commands.add_parser("replay", help="run a script and print what differs")
    replaying.add_argument("file", type=Path)
    replaying.add_argument("--reduce", type=float, default=0, metavar="SECONDS")
    hunting = commands.add_parser("hunt", help="run random scripts and collect what differs")
    hunting.add_argument("--profile", choices=PROFILES, default="privileged")
    hunting.add_argument("--ops", type=int, default=5000)
    hunting.add_argument("--steps", type=int, default=150, help="operations in one script")
    hunting.add_argument("--seed", type=int, default=0)
    hunting.add_argument("--reduce", type=float, default=120, metavar="SECONDS")
    hunting.add_argument("--out", type=Path, help="directory for one file a difference")
    arguments = parser.parse_args()
    unshare(CLONE_NEWNS)
    mount(b"none", b"/", None, MS_REC | MS_PRIVATE)
    become_subreaper()
    second = _second(arguments.second)
    scratch = Path(tempfile.mkdtemp(prefix="overlayfs-py-differential-", dir="/var/tmp"))
    os.chmod(scratch, 0o755)
    try:
        if arguments.command == "replay":
            return _replay(arguments.file, scratch, second, arguments.reduce)
        return _hunt(arguments, scratch, second)
    finally:
        shutil.rmtree(scratch)


def _second(name: str | None) -> Mounter | None:
    if name is None:
        return None
    mounter, _, options = name.partition(":")
    return {"ours": ours, "kernel": kernel, "fuse-overlayfs": fuse_overlayfs}[mounter](options)


def _replay(file: Path, scratch: Path, second: Mounter | None, limit: float) -> int:
    script = load(file.read_text())
    finding = run(script, scratch / "0", second)
    if finding is None:
        print("no difference")
        return 0
    if limit:
        script, finding = reduced(script, finding, scratch, second, limit)
    print(report(script, finding))
    return 1


def _hunt(arguments: argparse.Namespace, scratch: Path, second: Mounter | None) -> int:
    profile: Profile = PROFILES[arguments.profile]
    seen: dict[tuple[str, ...], int] = {}
    done = 0
    seed = arguments.seed
    started = time.monotonic()
    while done < arguments.ops:
        script, finding = random_script(profile, seed, arguments.steps, scratch / "hunt", second)
        shutil.rmtree(scratch / "hunt")
        done += len(script.steps)
        if finding is not None:
            seen[finding.signature] = seen.get(finding.signature, 0) + 1
            print(f"seed {seed}: {len(script.steps)} steps: {finding.signature}", flush=True)
            if seen[finding.signature] == 1:
                if arguments.reduce:
                    script, finding = reduced(script, finding, scratch, second, arguments.reduce)
                if arguments.out:
                    (arguments.out / f"{profile.name}-{seed}.txt").write_text(report(script, finding))
                else:
                    print(report(script, finding), flush=True)
        seed += 1
    print(f"{done} operations in {time.monotonic() - started:.0f} s, {len(seen)} kinds of difference:")
    for signature, count in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{count:5} {' '.join(signature)}")
    return bool(seen)


def random_script(
    profile: Profile, seed: int, length: int, base: Path, second: Mounter | None = None
) -> tuple[Script, Finding | None]:
    """Run a random script as it is made; a part of the kinds of operations, so that scripts differ in character."""
    source = random.Random(seed)
    stack = any_stack(source, profile)
    kinds = [kind for kind in MAKERS if source.randrange(4)] or ["rename"]
    weights = [MAKERS[kind][0] for kind in kinds]
    pair = Pair(profile, stack, base, second)
    try:
        with pair:
            world = World(pair.first)
            pair.do(first_step(source))
            for kind in source.choices(kinds, weights, k=length):
                world.look()
                pair.do(random_step(source, world, kind))
            pair.finish()
    except Divergence as divergence:
        return pair.script, divergence.finding
    return pair.script, None


if __name__ == "__main__":
    raise SystemExit(main())

"""The kernel's overlayfs as oracle: everything it shows, ours must show too."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.differential.cases import CASES
from tests.differential.machine import run_machine
from tests.differential.pair import Finding, report, run
from tests.differential.reduce import reduced
from tests.differential.script import Chmod, Script, Step, Unlink, Write, load, show
from tests.differential.side import PROFILES, fuse_overlayfs, kernel
from tests.differential.stacks import NASTY, fitting
from tests.differential.sweeps import sweep
from tests.support.namespaces import in_user_namespace
from tests.support.trees import Node

# How many random operations each profile compares; OVERLAYFS_PY_DIFF_OPS is what to do in all instead, and
# OVERLAYFS_PY_DIFF_SEED another seed, a number or "random".
OPERATIONS: Final = {
    "privileged": 2600,
    "metacopy": 1000,
    "userxattr": 1000,
    "rootless": 500,
    "portable": 1000,
    "passthrough": 800,
    "uring": 800,
}
AT_LEAST: Final = 5000

_REDUCTION: Final = 100.0  # seconds
_SWEPT: Final = [(profile, name) for profile in ("privileged", "userxattr", "portable") for name in NASTY] + [
    ("metacopy", "links"),
    ("metacopy", "redirects"),
    ("metacopy", "special"),
    ("rootless", "whiteouts"),
    ("rootless", "modes"),
]


@pytest.fixture
def base(scratch: Path) -> Iterator[Path]:
    """A directory for the layers and mounts of both sides."""
    path = scratch / f"differential-{os.getpid()}"
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def _asked(profile: str) -> int:
    asked = os.environ.get("OVERLAYFS_PY_DIFF_OPS")
    return OPERATIONS[profile] * int(asked) // sum(OPERATIONS.values()) if asked else OPERATIONS[profile]


def _seed() -> int:
    asked = os.environ.get("OVERLAYFS_PY_DIFF_SEED", "1")
    return random.SystemRandom().randrange(1 << 32) if asked == "random" else int(asked)


def _compare(script: Script, base: Path) -> Finding | None:
    if PROFILES[script.profile].user_namespace:
        return in_user_namespace(lambda: run(script, base / "pair"), 300)
    return run(script, base / "pair")


def test_every_run_compares_thousands_of_operations() -> None:
    assert sum(_asked(profile) for profile in OPERATIONS) >= AT_LEAST


@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("profile", OPERATIONS)
def test_random_operations_show_the_same_on_both_sides(profile: str, base: Path) -> None:
    operations, seed = _asked(profile), _seed()

    def work() -> tuple[int, tuple[Script, Finding] | None]:
        driven = run_machine(PROFILES[profile], base / "pair", operations, seed)
        failure = driven.failure and reduced(*driven.failure, base, None, _REDUCTION)
        return driven.done, failure

    done, failure = in_user_namespace(work, 23 * 3600) if PROFILES[profile].user_namespace else work()
    print(f"{profile}: {done} operations, first seed {seed}")
    if failure:
        pytest.fail(report(*failure), pytrace=False)
    assert done >= operations


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("profile", "name"), _SWEPT)
def test_everything_done_to_everything_shows_the_same_on_both_sides(profile: str, name: str, base: Path) -> None:
    stack = fitting(NASTY[name], PROFILES[profile])
    script = Script(profile, stack, sweep(stack))
    finding = _compare(script, base)
    if finding and not PROFILES[profile].user_namespace:
        shutil.rmtree(base / "pair")
        script, finding = reduced(script, finding, base, None, _REDUCTION)
    if finding:
        pytest.fail(report(script, finding), pytrace=False)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_what_once_differed_is_the_same_now(name: str, base: Path) -> None:
    finding = _compare(CASES[name], base)
    if finding:
        pytest.fail(report(CASES[name], finding), pytrace=False)


def test_the_kernel_compared_with_itself_shows_no_difference(base: Path) -> None:
    profile = PROFILES["privileged"]
    driven = run_machine(profile, base / "pair", 1500, 7, kernel(profile.kernel_options))
    assert driven.failure is None
    assert driven.done >= 1500


def test_a_difference_is_found_reduced_and_reported(base: Path) -> None:
    profile = PROFILES["privileged"]
    other = kernel("redirect_dir=off,index=on,xino=on")
    driven = run_machine(profile, base / "pair", 3000, 7, other)
    assert driven.failure is not None
    script, finding = reduced(*driven.failure, base, other, 60)
    assert len(script.steps) <= 5
    told = report(script, finding)
    assert "Rename" in told and "EXDEV" in told
    assert load(told) == script


def test_another_implementation_is_told_from_the_kernel(base: Path) -> None:
    script = Script(
        "privileged",
        ((Node(b"d/f", data=b"f"),), (Node(b"d/g", data=b"g"),)),
        (Step(Chmod(b"d/f", 0o600)), Step(Unlink(b"d/g")), Step(Write(b"d/f"))),
    )
    finding = run(script, base / "pair", fuse_overlayfs(""))
    assert finding is not None


def test_a_script_survives_being_written_down() -> None:
    for name, stack in NASTY.items():
        script = Script("privileged", stack, sweep(stack))
        assert load(show(script)) == script, name

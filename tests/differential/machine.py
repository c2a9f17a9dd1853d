"""The state machine that drives both sides with random operations."""

import itertools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.differential.pair import Divergence, Finding, Pair
from tests.differential.random_ops import MAKERS, World, first_step, random_step
from tests.differential.script import Script
from tests.differential.side import Mounter, Profile
from tests.differential.stacks import any_stack

STEPS: Final = 250  # operations in one script

_SOURCES: Final = st.randoms(use_true_random=True)


@dataclass(slots=True)
class Run:
    """What is compared, how many operations were, and the script that has shown a difference, with what it was."""

    profile: Profile
    base: Path
    second: Mounter | None
    done: int = 0
    failure: tuple[Script, Finding] | None = None


class Operations(RuleBasedStateMachine):
    """Runs each operation on both sides as soon as it is made; what the first side has then guides the next one.

    Its rules are groups of the kinds in MAKERS; hypothesis chooses among them, and one generator that it seeds makes
    the arguments. Making a failing script shorter is left to reduce.py, which knows that steps can be dropped.
    """

    run: ClassVar[Run]
    pair: Pair | None = None

    @initialize(source=_SOURCES)
    def mount(self, source: random.Random) -> None:
        self.source = source
        run = self.run
        self.pair = Pair(run.profile, any_stack(source, run.profile), run.base, run.second)
        self.pair.__enter__()
        self.world = World(self.pair.first)
        self._checked(lambda pair: pair.do(first_step(source)))

    @rule()
    def alter_names(self) -> None:
        kinds = "create", "mkdir", "rmdir", "unlink", "rename", "rename_dir", "link", "symlink", "mknod"
        self._step(*kinds)

    @rule()
    def change_data(self) -> None:
        self._step("create", "write", "map_write", "truncate", "copy", "open")

    @rule()
    def describe(self) -> None:
        self._step("chmod", "chown", "utimens", "set_xattr", "set_acl", "remove_xattr")

    @rule()
    def examine(self) -> None:
        kinds = ["read", "readdir", "stat", "readlink", "get_xattr", "list_xattr", "access", "statfs"]
        # What takes longer than all else comes less often.
        kinds += ["remount", "rotate"] if self.source.randrange(2) else []
        self._step(*kinds)

    @rule()
    def hold(self) -> None:
        self._step("open", "handle", "close")

    def _step(self, *kinds: str) -> None:
        (kind,) = self.source.choices(kinds, [MAKERS[kind][0] for kind in kinds])
        self.world.look()
        self._checked(lambda pair: pair.do(random_step(self.source, self.world, kind)))
        self.run.done += 1

    def teardown(self) -> None:
        try:
            self._checked(Pair.finish)
        finally:
            self._unmount(None)

    def _checked(self, compare: Callable[[Pair], None]) -> None:
        if self.pair is None:
            return
        try:
            compare(self.pair)
        except Divergence as divergence:
            self.run.failure = self.pair.script, divergence.finding
            self._unmount(divergence)
            raise

    def _unmount(self, error: Exception | None) -> None:
        if self.pair is not None:
            pair, self.pair = self.pair, None
            pair.__exit__(type(error) if error else None, error, None)
            shutil.rmtree(self.run.base)


def run_machine(profile: Profile, base: Path, operations: int, first_seed: int, second: Mounter | None = None) -> Run:
    """Drive the machine until that many operations are done or something differs. Equal seeds give equal scripts."""
    current = Run(profile, base, second)

    class Machine(Operations):
        run = current

    choices = settings(
        max_examples=max(1, min(10, operations // STEPS)),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    for number in itertools.count(first_seed):
        try:
            run_state_machine_as_test(seed(number)(Machine), settings=choices)
        except Divergence:
            break
        if current.done >= operations:
            break
    return current

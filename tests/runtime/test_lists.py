"""What lists show, and how they are asked for less."""

import json
import os
import pty
import re

import pytest

from tests.runtime.conftest import Ovl


@pytest.fixture
def three(ovl: Ovl) -> Ovl:
    """With one container that runs, one that has ended and one that was never started."""
    ovl.run("run", "-d", "--name", "up", "--network", "none", "-l", "a=1", "-v", "kept:/k", "busy", "sleep", "60")
    ovl.run(
        "run", "--name", "down", "--network", "none", "-l", "a=1", "-l", "b", "busy", "sh", "-c", "exit 3", status=3
    )
    ovl.run("create", "--name", "new", "busy")
    return ovl


FILTERS = {
    "": ["up"],
    "-a": ["new", "down", "up"],
    "-l": ["new"],
    "-n 2": ["new", "down"],
    "-a -f name=n": ["new", "down"],
    "-f status=exited": ["down"],
    "-f status=exited -f status=created": ["new", "down"],
    "-f exited=3": ["down"],
    "-f exited=0": [],
    "-a -f label=a": ["down", "up"],
    "-a -f label=a=1 -f label=b": ["down"],
    "-a -f volume=kept": ["up"],
    "-a -f network=private": ["new"],
    "-a -f ancestor=busy:latest -f name=up": ["up"],
    "-a -f ancestor=other": [],
}


def test_ps_shows_what_passes_its_filters(three: Ovl) -> None:
    shown = {text: json.loads(three.out("ps", "--format", "json", *text.split())) for text in FILTERS}
    assert {text: [row["Name"] for row in rows] for text, rows in shown.items()} == FILTERS


def test_filters_that_are_none_are_told(ovl: Ovl) -> None:
    for text in ("name", "nosuch=1"):
        assert ovl.error("ps", "-f", text, status=1).startswith(f"--filter {text}: write KEY=VALUE, with one of name, ")


def test_inspect_fills_in_a_template(three: Ovl) -> None:
    words = three.out(
        "inspect", "-f", "{{.State.ExitCode}} {{.Name}} {{json .Config.Labels}} {{ .State.Running }}", "down"
    )
    assert words == '3 down {"kind": "test", "a": "1", "b": ""} false\n'
    assert three.out("inspect", "--format", "{{.Config.User}}", "busy") == "www\n"
    assert three.error("inspect", "-f", "{{.Nosuch}}", "down", status=1) == "there is no 'Nosuch' in 'Nosuch'"
    assert "{{range}}" in three.error("inspect", "-f", "{{range}}", "down", status=1)


def test_a_table_has_no_spaces_at_the_ends_of_its_lines(three: Ovl) -> None:
    lines = three.out("ps", "-a").splitlines()
    assert [line.split()[-1] for line in lines] == ["NAMES", "new", "down", "up"]
    assert not any(line.endswith(" ") for line in lines)
    assert len({line.index(word) for line, word in zip(lines, ("NAMES", "new", "down", "up"), strict=True)}) == 1


def test_a_table_on_a_terminal_is_as_wide_as_that(three: Ovl) -> None:
    ours, theirs = pty.openpty()
    process = three.start("ps", "-a", "--no-trunc", stdout=theirs, stdin=theirs)
    os.close(theirs)
    seen = b""
    with open(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                seen += terminal.read(4096)
            except OSError:
                # The command has ended.
                break
    assert process.wait(20) == 0
    lines = re.sub(r"\x1b\[\d*m", "", seen.decode()).splitlines()
    assert max(map(len, lines)) <= 200 and lines[0].rstrip().endswith("NAMES")


def test_prune_is_there_by_its_short_name(three: Ovl) -> None:
    assert three.out("prune", "-f").split("\n") == ["container new", "container down", ""]
    three.run("rm", "-f", "up")
    three.run("volume", "rm", "kept")

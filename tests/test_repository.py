"""What is written down agrees with the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from overlayfs_py.config import IGNORED, OPTIONS
from tests.differential import known

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MANUAL = ROOT / "docs" / "overlayfs-py.8"


def plain(text: str) -> str:
    """Words only, as a reader takes them: no code marks, one space between, small letters."""
    return re.sub(r"\s+", " ", text.replace("`", "")).lower()


def table(*heads: str) -> list[str]:
    """The rows of the table of the readme that has this head."""
    head = f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}\n"
    return README.read_text().partition(head)[2].partition("\n\n")[0].splitlines()


def test_the_options_table_of_the_readme_is_that_of_the_program() -> None:
    forms = {name: f"{name}{option.value}".replace("|", "\\|") for name, option in OPTIONS.items()}
    assert table("option", "meaning") == [f"| `{forms[name]}` | {option.help} |" for name, option in OPTIONS.items()]


def test_the_manual_page_explains_every_option_and_no_other() -> None:
    section = MANUAL.read_text().partition(".Sh MOUNT OPTIONS")[2].partition(".Sh ENVIRONMENT")[0]
    items = re.findall(r"^\.It Cm (.*)$", section, re.MULTILINE)
    explained = {name for item in items for name in re.split(r" (?:Ns|Op|Oo)\b", item)[0].split(" , ")}
    assert explained == set(OPTIONS)
    unexplained = {name for name in IGNORED if name not in section}
    assert unexplained == {"rprivate", "rslave", "rshared", "runbindable"}, "only the recursive kinds are left out"


def test_the_manual_page_renders_without_a_warning() -> None:
    done = subprocess.run(
        ["groff", "-man", "-mandoc", "-Tutf8", "-ww", "-z", MANUAL], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_the_readme_lists_each_accepted_difference_from_the_kernel() -> None:
    accepted = [
        difference
        for value in vars(known).values()
        if isinstance(value, tuple)
        for difference in value
        if isinstance(difference, known.Known)
    ]
    assert accepted
    assert table("here", "why") == [f"| {difference.what} | {difference.why} |" for difference in accepted]


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{file}: a relative import"
            yield node.module.partition(".")[0]


def test_the_mount_helper_imports_the_standard_library_alone() -> None:
    files = list((ROOT / "mount_helper").rglob("*.py"))
    assert files
    foreign = {(file.name, name) for file in files for name in imported(file)}
    assert {entry for entry in foreign if entry[1] not in sys.stdlib_module_names | {"mount_helper"}} == set()


def test_every_dependency_is_declared_and_explained() -> None:
    allowed = sys.stdlib_module_names | {"overlayfs_py", "mount_helper"}
    used = {name for file in (ROOT / "overlayfs_py").rglob("*.py") for name in imported(file)} - allowed
    table = README.read_text().partition("## What each dependency is for")[2]
    assert used == {
        *("click", "pyfuse3", "requests", "rich", "tomlkit", "trio", "urllib3", "xattr", "zstandard"),
        *("grpc", "google"),
    }
    for name in used:
        assert f"| {name} |" in table

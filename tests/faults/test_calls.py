"""No system call of the overlay escapes the fault injection."""

import ast
import fcntl
import os
from pathlib import Path
from types import ModuleType

import pytest
import xattr

import overlayfs_py
from tests.faults.calls import CHANGING, FOREIGN, HARMLESS, READING, Calls

PACKAGE = Path(overlayfs_py.__file__).parent
SOURCES = sorted([*PACKAGE.glob("core/*.py"), *PACKAGE.glob("sys/*.py")])
# Used while a mount is set up, before any operation.
SETTING_UP = frozenset({"mounts.py"})


def functions_used(tree: ast.AST, module: str) -> set[str]:
    """The functions of a module that a source refers to as attributes."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_system_call_goes_through_the_fault_injection(source: Path) -> None:
    tree = ast.parse(source.read_text())
    known = {"open", *READING, *CHANGING, *HARMLESS}
    used = {name for name in functions_used(tree, "os") if not isinstance(getattr(os, name), (int, type, ModuleType))}
    assert used <= known
    used = {name for name in functions_used(tree, "fcntl") if callable(getattr(fcntl, name))}
    assert used <= {"ioctl", "flock", "fcntl"}
    used = {name for name in functions_used(tree, "xattr") if callable(getattr(xattr, name))}
    assert used <= {"setxattr", "removexattr"}
    if source.name not in SETTING_UP:
        assert foreign_functions(tree) <= {name for module, name, _ in FOREIGN if module.__file__ == str(source)}


def foreign_functions(tree: ast.Module) -> set[str]:
    """The names a source gives to functions of the C library."""
    return {
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign) and "LIBC" in ast.unparse(statement.value)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def test_the_call_asked_for_fails_and_no_other(tmp_path: Path) -> None:
    with Calls().installed() as calls, calls.watched(fail_at=2, number=28):
        os.mkdir(tmp_path / "one")
        with pytest.raises(OSError, match="No space left"):
            os.mkdir(tmp_path / "two")
        os.mkdir(tmp_path / "three")
    assert sorted(os.listdir(tmp_path)) == ["one", "three"]
    assert calls.names == ["mkdir"] * 3

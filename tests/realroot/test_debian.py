"""Debian works as a root on the filesystem: packages, git, a compiler, pip and a database, and all of it is still there
after a remount and on the kernel's overlayfs.

The tests of one layout share a root, in the order of this file; each passes alone as well.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.realroot.root import Layout, Root
from tests.support.trees import Tree, compare_trees, read_tree


@pytest.fixture(scope="module", params=["whole", "split"])
def root(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Root]:
    layout: Layout = request.param
    made = Root(scratch / f"debian-{layout}", layout)
    yield made
    made.close()
    subprocess.run(["rm", "-rf", "--one-file-system", made.base], check=True)


def tree_of(root: Root, since: int) -> Tree:
    return read_tree(bytes(root.mnt), since)


def assert_same(before: Tree, after: Tree) -> None:
    differences = compare_trees(before, after, ignore=["atime"])
    assert not differences, "\n".join(map(str, differences[:50]))


def test_the_root_is_what_its_packages_say(root: Root) -> None:
    assert not list(root.mnt.glob("opt/*/stale"))
    assert root.verify() == ""


def test_a_package_is_installed_removed_and_installed_again(root: Root) -> None:
    root.run("apt-get", "--quiet", "update")
    install = ["apt-get", "--quiet", "--yes", "install", "--no-install-recommends"]
    root.run(*install, "cron")
    assert root.run("stat", "--format", "%a %U %G", "/usr/bin/crontab", "/var/spool/cron/crontabs").splitlines() == [
        "2755 root crontab",
        "1730 root crontab",
    ]
    # In a lower layer: its directories become whiteouts, then opaque directories.
    root.run("apt-get", "--quiet", "--yes", "purge", "sqlite3")
    assert not (root.mnt / "usr/share/doc/sqlite3").exists()
    assert not (root.mnt / "usr/bin/sqlite3").exists()
    root.run(*install, "sqlite3")
    assert root.run("sqlite3", ":memory:", "SELECT 6 * 7") == "42\n"
    root.run("apt-get", "check")
    assert root.verify() == ""


def test_git_clones_commits_and_collects_garbage(root: Root) -> None:
    root.run("git", "clone", "--quiet", "/srv/source.git", "/root/clone")
    objects = [path for path in (root.mnt / "root/clone/.git/objects").glob("??/*") if path.is_file()]
    assert objects
    assert {path.stat().st_nlink for path in objects} == {2}, "git makes hard links to the objects that it clones"

    git = ["git", "-C", "/root/clone", "-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
    (root.mnt / "root/clone/dir0/file0").write_text("changed\n")
    root.run(*git, "mv", "dir1", "moved")
    root.run(*git, "commit", "--quiet", "--all", "--message", "Move a directory and change a file")
    root.run(*git, "checkout", "--quiet", "HEAD~5")
    root.run(*git, "checkout", "--quiet", "main")
    root.run(*git, "push", "--quiet")
    for directory in ("/root/clone", "/srv/source.git"):
        root.run("git", "-C", directory, "gc", "--quiet", "--prune=now")
        assert root.run("git", "-C", directory, "fsck", "--full", "--strict") == ""
        assert root.run("git", "-C", directory, "rev-list", "--count", "main") == "21\n"
    assert root.run(*git, "status", "--porcelain") == ""


def test_make_builds_a_c_project_and_rebuilds_what_changed(root: Root) -> None:
    make = ["make", "--directory", "/srv/project", "--jobs=2", "--no-print-directory"]
    root.run(*make)
    assert root.run("/srv/project/hello") == "hello, world: 42\n"
    root.run(*make, "--question")

    header = root.mnt / "srv/project/parts.h"
    header.write_text(header.read_text().replace("world", "overlay"))
    compiled = [line.split()[-1] for line in root.run(*make).splitlines() if " -c " in line]
    assert sorted(compiled) == ["lib/word.c", "main.c"]
    assert root.run("/srv/project/hello") == "hello, overlay: 42\n"
    root.run(*make, "clean")
    assert not list((root.mnt / "srv/project").rglob("*.o"))


def test_pip_installs_and_uninstalls_a_package(root: Root) -> None:
    pip = ["pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    system = ["--break-system-packages", "--root-user-action=ignore"]
    root.run(*pip, "install", *system, "idna")
    encode = "import idna; print(idna.encode('ドメイン.テスト').decode())"
    assert root.run("python3", "-c", encode) == "xn--eckwd4c7c.xn--zckzah\n"
    root.run(*pip, "check")
    root.run(*pip, "uninstall", "--yes", *system, "idna")
    assert not list((root.mnt / "usr/local/lib").rglob("idna*"))


def test_processes_share_a_database_in_wal_mode(root: Root) -> None:
    root.run("python3", "/srv/transfer.py", "/srv/accounts.db")
    assert not list((root.mnt / "srv").glob("accounts.db-*"))
    total = "SELECT count(*), sum(balance), sum(length(note)) FROM account"
    assert root.run("sqlite3", "/srv/accounts.db", "PRAGMA integrity_check", total) == "ok\n4000|4000000|4000000\n"


def test_a_remount_shows_the_same_root(root: Root) -> None:
    since = time.time_ns()
    before = tree_of(root, since)
    root.close()
    root.open()
    assert_same(before, tree_of(root, since))
    assert root.verify() == ""


def test_the_kernel_shows_the_same_root(root: Root) -> None:
    since = time.time_ns()
    ours = tree_of(root, since)
    with root.on_the_kernel():
        assert_same(ours, tree_of(root, since))
        assert root.verify() == ""

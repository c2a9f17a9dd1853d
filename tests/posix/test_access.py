"""access and faccessat: real ids, effective ids, root, and every class of permission."""

import errno
import os

import pytest

from tests.posix import calls
from tests.posix.calls import AT_EACCESS, AT_SYMLINK_NOFOLLOW
from tests.posix.rig import BY_ROLE, MEMBER, OTHER, OWNER, Root, User, as_user, fails, prepared, write


def build_modes() -> None:
    for mode in range(0, 0o1000, 0o25):
        write(f"{mode:o}", b"")
        os.chown(f"{mode:o}", OWNER.uid, OWNER.gid)
        os.chmod(f"{mode:o}", mode)


MODES = range(0, 0o1000, 0o25)
SHIFT = {"owner": 6, "member": 3, "other": 0}


@pytest.mark.parametrize("role", BY_ROLE)
@prepared(build_modes)
def test_access_goes_by_ones_class(root: Root, role: str) -> None:
    def probe() -> list[tuple[int, int]]:
        return [(mode, want) for mode in MODES for want in range(8) if os.access(f"{mode:o}", want)]

    granted = [(mode, want) for mode in MODES for want in range(8) if (mode >> SHIFT[role]) & want == want]
    assert as_user(BY_ROLE[role], probe) == granted


@prepared(build_modes)
def test_root_may_execute_only_what_someone_may(root: Root) -> None:
    for mode in MODES:
        assert os.access(f"{mode:o}", os.R_OK | os.W_OK)
        assert os.access(f"{mode:o}", os.X_OK) == bool(mode & 0o111)


def build_private() -> None:
    for user in (OWNER, OTHER):
        name = f"of-{user.uid}"
        write(name, b"", 0o600)
        os.chown(name, user.uid, user.gid)
    write("of-group", b"", 0o060)
    os.chown("of-group", 0, MEMBER.groups[0])
    os.chmod("of-group", 0o060)


@prepared(build_private)
def test_access_asks_for_the_real_ids_and_at_eaccess_for_the_effective(root: Root) -> None:
    def probe() -> None:
        os.setgroups([])
        os.setresgid(OWNER.gid, OTHER.gid, 0)
        os.setresuid(OWNER.uid, OTHER.uid, 0)
        calls.access(f"of-{OWNER.uid}", os.R_OK | os.W_OK)
        calls.access(f"of-{OTHER.uid}", os.R_OK | os.W_OK, AT_EACCESS)
        calls.access("of-group", os.R_OK)
        with fails(errno.EACCES):
            calls.access("of-group", os.R_OK, AT_EACCESS)
        with fails(errno.EACCES):
            calls.access(f"of-{OTHER.uid}", os.R_OK)
        with fails(errno.EACCES):
            calls.access(f"of-{OWNER.uid}", os.R_OK, AT_EACCESS)
        os.close(os.open(f"of-{OTHER.uid}", os.O_RDWR))
        with fails(errno.EACCES):
            os.open(f"of-{OWNER.uid}", os.O_RDONLY)

    as_user(User(0, 0), probe)


@prepared(build_private)
def test_supplementary_groups_count(root: Root) -> None:
    assert as_user(MEMBER, os.access, "of-group", os.R_OK | os.W_OK)
    assert not as_user(OTHER, os.access, "of-group", os.R_OK)


def build_links() -> None:
    write("secret", b"", 0o600)
    os.symlink("secret", "link")
    os.symlink("missing", "dangling")
    os.mkdir("d", 0o755)
    write("d/f", b"", 0o644)


@prepared(build_links)
def test_access_follows_links_unless_told_not_to(root: Root) -> None:
    with fails(errno.EACCES):
        as_user(OTHER, calls.access, "link", os.R_OK)
    as_user(OTHER, calls.access, "link", os.R_OK, AT_SYMLINK_NOFOLLOW)
    with fails(errno.ENOENT):
        calls.access("dangling", os.F_OK)
    calls.access("dangling", os.F_OK, AT_SYMLINK_NOFOLLOW)
    with fails(errno.EINVAL):
        calls.access("secret", 8)


@prepared(build_links)
def test_each_directory_on_the_way_must_be_searchable(root: Root) -> None:
    for mode, reachable, listable in ((0o711, True, False), (0o744, False, True), (0o700, False, False)):
        os.chmod("d", mode)
        assert as_user(OTHER, os.access, "d/f", os.R_OK) == reachable
        if listable:
            assert as_user(OTHER, os.listdir, "d") == ["f"]
        else:
            with fails(errno.EACCES):
                as_user(OTHER, os.listdir, "d")
        if reachable:
            as_user(OTHER, os.stat, "d/f")
        else:
            with fails(errno.EACCES):
                as_user(OTHER, os.stat, "d/f")


@prepared(build_links)
def test_a_change_of_rights_counts_at_once_for_everyone(root: Root) -> None:
    for _ in range(3):
        os.chmod("d/f", 0o600)
        assert not as_user(OTHER, os.access, "d/f", os.R_OK)
        os.chmod("d/f", 0o604)
        assert as_user(OTHER, os.access, "d/f", os.R_OK)
        os.chmod("d", 0o700)
        assert not as_user(OTHER, os.access, "d/f", os.R_OK)
        os.chmod("d", 0o755)


@prepared(build_links)
def test_a_process_keeps_the_directory_it_may_no_longer_search(root: Root) -> None:
    def probe() -> None:
        os.chdir("d")
        os.setresuid(OTHER.uid, OTHER.uid, OTHER.uid)
        os.stat("f")

    as_user(User(0, 0), probe)
    os.chmod("d", 0o700)
    with fails(errno.EACCES):
        as_user(User(0, OTHER.gid), probe)

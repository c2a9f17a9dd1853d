"""Listing directories: complete, without duplicates, with stable positions, while entries come and go."""

import os
import random
import stat

import pytest

from tests.posix.calls import Directory
from tests.posix.files import FORMATS, TYPES, make
from tests.posix.rig import Root, child, inside, opened, prepared, write

COUNT = 500
NAMES = [b"%05d" % number + b"-" * 100 for number in range(COUNT)]
"""More than fit a buffer of readdir, several times."""


def build_types() -> None:
    for kind in TYPES:
        make(kind, kind)


@prepared(build_types)
def test_a_listing_tells_types_and_inode_numbers(root: Root) -> None:
    with Directory(".") as listing:
        entries = {entry.name.decode(): entry for entry in listing}
    assert set(entries) == {".", "..", *TYPES}
    for kind in TYPES:
        assert entries[kind].kind == FORMATS[kind] >> 12
        assert entries[kind].ino == os.lstat(kind).st_ino
    assert entries["."].ino == os.stat(".").st_ino
    assert entries["."].kind == entries[".."].kind == stat.S_IFDIR >> 12


@prepared(build_types)
def test_inode_numbers_of_a_listing_stay_when_files_change(root: Root) -> None:
    def numbers() -> dict[str, int]:
        with os.scandir(".") as entries:
            return {entry.name: entry.inode() for entry in entries}

    before = numbers()
    for kind in TYPES:
        os.lchown(kind, 1, 1)
    assert numbers() == before == {kind: os.lstat(kind).st_ino for kind in TYPES}


def build_empty() -> None:
    os.mkdir("d")


@prepared(build_empty)
def test_an_empty_directory_lists_dot_and_dotdot(root: Root) -> None:
    with Directory("d") as listing:
        entries = {entry.name: entry.ino for entry in listing}
    assert set(entries) == {b".", b".."}
    assert entries[b"."] == os.stat("d").st_ino
    assert entries[b".."] in (os.stat(".").st_ino, os.stat("d").st_ino) or root.traits.overlay


def build_many() -> None:
    os.mkdir("d")
    for name in NAMES:
        os.symlink("x", b"d/" + name)


@prepared(build_many)
def test_a_directory_of_hundreds_is_listed_once_each(root: Root) -> None:
    assert sorted(os.listdir(b"d")) == NAMES
    os.unlink(b"d/" + NAMES[200])
    os.mkdir("d/new")
    assert sorted(os.listdir(b"d")) == sorted({*NAMES, b"new"} - {NAMES[200]})


@prepared(build_many)
def test_every_position_leads_back_to_its_entry(root: Root) -> None:
    with Directory("d") as listing:
        found = []
        while True:
            position = listing.tell()
            entry = listing.read()
            if entry is None:
                break
            assert listing.tell() == entry.offset
            found.append((position, entry.name))
        end = position
        for position, name in random.Random(1).sample(found, 100):
            listing.seek(position)
            entry = listing.read()
            assert entry is not None
            assert entry.name == name
        listing.seek(end)
        assert listing.read() is None
        position, name = found[COUNT // 2]
        listing.seek(position)
        assert [entry.name for entry in listing] == [name for _, name in found[COUNT // 2 :]]
    assert sorted(name for _, name in found) == sorted([*NAMES, b".", b".."])


@prepared(build_many)
def test_positions_hold_in_another_stream_of_the_directory(root: Root) -> None:
    with Directory("d") as first, Directory("d") as second:
        entries = list(first)
        second.seek(entries[300].offset)
        assert [entry.name for entry in second] == [entry.name for entry in entries[301:]]


@prepared(build_many)
def test_rewinding_shows_the_directory_as_it_is_now(root: Root) -> None:
    with Directory("d") as listing:
        assert len(list(listing)) == COUNT + 2
        write("d/new")
        os.unlink(b"d/" + NAMES[1])
        listing.rewind()
        names = {entry.name for entry in listing}
        assert b"new" in names
        assert NAMES[1] not in names
        assert len(names) == COUNT + 2


@prepared(build_many)
def test_removing_while_listing_misses_nothing_that_stays(root: Root) -> None:
    seen: list[bytes] = []
    with Directory("d") as listing:
        for entry in listing:
            seen.append(entry.name)
            if entry.name[4:5] in (b"3", b"7"):
                os.unlink(os.path.join(b"d", entry.name))
    assert len(seen) == len(set(seen))
    stay = {name for name in NAMES if name[4:5] not in (b"3", b"7")}
    assert stay <= set(seen)
    assert set(os.listdir(b"d")) == stay


@prepared(build_many)
def test_a_tree_is_emptied_in_one_pass_of_a_listing(root: Root) -> None:
    with Directory("d") as listing:
        for entry in listing:
            if entry.name not in (b".", b".."):
                os.unlink(os.path.join(b"d", entry.name))
    assert os.listdir("d") == []
    os.rmdir("d")


@prepared(build_many)
def test_making_while_listing_shows_old_entries_once_each(root: Root) -> None:
    seen: list[bytes] = []
    with Directory("d") as listing:
        for entry in listing:
            seen.append(entry.name)
            if len(seen) <= 250:
                os.symlink("x", f"d/new{len(seen)}")
    assert len(seen) == len(set(seen))
    assert set(NAMES) <= set(seen)
    assert len(os.listdir("d")) == COUNT + 250


@prepared(build_many)
def test_a_position_kept_over_removals_leads_to_what_followed(root: Root) -> None:
    with Directory("d") as listing:
        for _ in range(COUNT // 2):
            entry = listing.read()
            assert entry is not None
        position = listing.tell()
        rest = [entry.name for entry in listing]
        for name in rest[:100]:
            os.unlink(os.path.join(b"d", name))
        listing.seek(position)
        after = [entry.name for entry in listing]
        assert [name for name in after if name not in rest[:100]] == rest[100:]


@prepared(build_many)
def test_others_making_and_removing_do_not_disturb_a_listing(root: Root) -> None:
    def churn() -> None:
        for number in range(400):
            write(f"d/churn{number}")
            os.rename(f"d/churn{number}", f"d/churned{number}")
            os.unlink(f"d/churned{number}")

    with child(churn) as process:
        for _ in range(6):
            names = os.listdir(b"d")
            stable = [name for name in names if not name.startswith(b"churn")]
            assert sorted(stable) == NAMES
        process.join()
    assert sorted(os.listdir(b"d")) == NAMES


@prepared(build_many)
def test_renaming_while_listing_keeps_every_file(root: Root) -> None:
    with opened("d") as directory:
        for name in os.listdir(directory):
            os.rename(name, f"r{name}", src_dir_fd=directory, dst_dir_fd=directory)
    assert sorted(os.listdir(b"d")) == [b"r" + name for name in NAMES]


@prepared(build_many)
def test_renaming_each_entry_as_it_is_read_comes_to_an_end(root: Root) -> None:
    steps = 0
    with Directory("d") as listing:
        for entry in listing:
            steps += 1
            assert steps < 3 * COUNT, "the listing goes on for ever"
            if entry.name in NAMES:
                os.rename(b"d/" + entry.name, b"d/renamed" + entry.name[:5])
    assert sorted(os.listdir(b"d")) == [b"renamed" + name[:5] for name in NAMES]


@prepared(build_many)
def test_two_listings_of_one_directory_do_not_mix(root: Root) -> None:
    with Directory("d") as first, Directory("d") as second:
        one, two = [], []
        for left in first:
            one.append(left.name)
            if len(one) % 3 == 0:
                right = second.read()
                assert right is not None
                two.append(right.name)
        two += [entry.name for entry in second]
    assert sorted(one) == sorted(two) == sorted([*NAMES, b".", b".."])


def build_huge() -> None:
    os.mkdir("huge")
    for half in (0, 50_000):
        # Links are quicker to make than files, and a directory doesn't know the difference.
        write(f"huge/{half}")
        for number in range(half + 1, half + 50_000):
            os.link(f"huge/{half}", f"huge/{number}")


def test_a_directory_of_100_000_entries_is_listed_and_found(root: Root) -> None:
    # Making and removing them one by one through a mount would only test patience.
    root.kept = True
    with inside(root.upper or "."):
        build_huge()
    names = os.listdir("huge")
    assert len(names) == len(set(names)) == 100_000
    for number in (1, 50_000, 99_999):
        assert stat.S_ISREG(os.lstat(f"huge/{number}").st_mode)
    assert not os.path.lexists("huge/100000")
    os.unlink("huge/77777")
    write("huge/100000")
    names = os.listdir("huge")
    assert len(names) == 100_000
    assert "100000" in names
    assert "77777" not in names


@pytest.mark.parametrize("length", [1, 100, 255])
@prepared(build_empty)
def test_long_names_are_listed_whole(root: Root, length: int) -> None:
    names = {f"{number:03}".rjust(length, "n")[-length:] for number in range(300)}
    for name in names:
        write(f"d/{name}")
    assert set(os.listdir("d")) == names
    for name in names:
        os.unlink(f"d/{name}")
    assert os.listdir("d") == []

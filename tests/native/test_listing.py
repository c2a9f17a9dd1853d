"""Positions in a listing, which have to mean the same in every request of the protocol."""

from overlayfs_py.engines.native.listing import Listing, Listings, position_of

NAMES = [b"%d" % number for number in range(1000)]


def read_all(listing: Listing, start: int = 0, stop_after: int | None = None) -> tuple[list[bytes], int]:
    """The names from `start` on that a reader gets, and the position it is at then."""
    seen: list[bytes] = []
    at = start
    for position, name in listing.entries[listing.after(start) :]:
        if stop_after is not None and len(seen) == stop_after:
            break
        if name not in listing.removed:
            seen.append(name)
        at = position
    return seen, at


def test_a_reader_that_stops_goes_on_where_it_was_in_a_listing_taken_anew() -> None:
    first, at = read_all(Listing(NAMES), stop_after=300)
    rest, _ = read_all(Listing(NAMES), at)
    assert sorted(first + rest) == sorted(NAMES)
    assert not set(first) & set(rest)


def test_names_that_come_and_go_move_no_other() -> None:
    listing = Listing(NAMES)
    first, at = read_all(listing, stop_after=500)
    listing.add(b"new")
    for name in first[:100]:
        listing.remove(name)
    rest, _ = read_all(listing, at)
    assert set(NAMES) - set(first) <= set(rest) <= (set(NAMES) - set(first)) | {b"new"}


def test_a_name_made_again_is_listed_once() -> None:
    listing = Listing(NAMES)
    listing.remove(b"7")
    assert b"7" not in read_all(listing)[0]
    listing.add(b"7")
    assert read_all(listing)[0].count(b"7") == 1


def test_positions_leave_room_for_dot_and_dot_dot_and_fit_telldir() -> None:
    assert all(3 <= position_of(name) < 1 << 63 for name in NAMES)


def test_the_listings_used_least_recently_go_first() -> None:
    listings = Listings(2)
    listings.put(1, Listing([b"a"]))
    listings.put(2, Listing([b"b"]))
    listings.get(1)
    listings.put(3, Listing([b"c"]))
    assert listings.get(2) is None
    assert listings.get(1) is not None and listings.get(3) is not None

"""Pages of the journal: what is written is what is read, and what may have happened is never left out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_mao.journal import effect_key
from dagster_mao.journal._pages import (
    DONE,
    GONE_DONE,
    GONE_UNKNOWN,
    INTENDED,
    NOT_DONE,
    UNKNOWN,
    Earlier,
    Entry,
    Page,
    Segment,
    Slot,
    Told,
)

KEYS = st.binary(min_size=32, max_size=32)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(0, 2**62)
SLOTS = st.builds(Slot, TEXTS, st.integers(0, 40), st.booleans())
ENTRIES = st.builds(
    Entry,
    NUMBERS,
    SLOTS,
    st.sampled_from([INTENDED, DONE, UNKNOWN, NOT_DONE, GONE_DONE, GONE_UNKNOWN]),
    st.none() | TEXTS,
    st.none() | st.floats(0, 4e9),
    st.integers(0, 3),
)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    records = draw(st.lists(st.none() | TEXTS, min_size=1, max_size=5))
    keys = draw(st.lists(KEYS, min_size=len(records), max_size=len(records)))
    return Segment(draw(NUMBERS), records, keys, draw(st.none() | SLOTS), draw(NUMBERS))


PAGES = st.builds(
    Page,
    st.lists(segments(), max_size=4),
    st.lists(SLOTS, max_size=3),
    st.lists(ENTRIES, max_size=6),
    st.lists(NUMBERS, max_size=4),
    NUMBERS,
)


@settings(max_examples=100, deadline=None)
@given(PAGES)
def test_a_page_is_read_as_it_was_written(page: Page) -> None:
    assert Page.decode(*page.encode()) == page


FUNDS, OFFER = Slot("funds"), Slot("offer")
CALLS = [bytes([n]) * 32 for n in range(4)]


def told(*pages: Page) -> Told:
    read = Told()
    for number, page in enumerate(pages, 1):
        read.add(number, Page.decode(*page.encode()))
    return read


def found(read: Told, undone_to: int = 0) -> list[tuple[str | None, str, int]]:
    return [(effect.record, effect.entry.slot.name, effect.entry.state) for effect in read.outstanding(undone_to)]


ANNOUNCED = Page([Segment(0, ["A0", "A1"], CALLS[:2])], [FUNDS, OFFER])


def test_what_was_announced_may_have_happened_and_is_undone_newest_first() -> None:
    assert found(told(ANNOUNCED)) == [
        ("A1", "offer", UNKNOWN),
        ("A1", "funds", UNKNOWN),
        ("A0", "offer", UNKNOWN),
        ("A0", "funds", UNKNOWN),
    ]


def test_an_outcome_takes_the_place_of_what_was_announced_and_a_closed_segment_says_that_there_is_no_more() -> None:
    outcomes = Page(entries=[Entry(0, FUNDS, DONE, "1"), Entry(0, OFFER, NOT_DONE), Entry(1, FUNDS, UNKNOWN)], closed=[0])
    assert found(told(ANNOUNCED, outcomes)) == [("A1", "funds", UNKNOWN), ("A0", "funds", DONE)]
    assert found(told(ANNOUNCED, Page(closed=[0]))) == []


def test_what_is_undone_is_not_undone_again_and_what_comes_late_is() -> None:
    late = Page(entries=[Entry(1, FUNDS, DONE, "1")])
    assert found(told(ANNOUNCED, late), undone_to=1) == [("A1", "funds", DONE)]
    assert found(told(ANNOUNCED, late), undone_to=2) == []


def test_keys_are_those_that_the_target_was_handed() -> None:
    (effect, *_) = told(ANNOUNCED).outstanding()
    assert effect.key.hex() == effect_key(CALLS[1].hex(), "offer")
    batch = told(Page([Segment(0, [None], [CALLS[0]]), Segment(1, ["A0"], [CALLS[3]], FUNDS, parent=0)]))
    (of_batch,) = batch.outstanding()
    assert (of_batch.key, of_batch.call, of_batch.is_of_batch) == (CALLS[3], CALLS[0], True)


def known(*pages: Page) -> Earlier:
    earlier = Earlier([7])
    for number, page in enumerate(pages, 1):
        earlier.add(7, number, page)
    return earlier


def test_what_is_known_to_be_done_is_not_made_unknown_by_who_did_not_know() -> None:
    earlier = known(ANNOUNCED, Page(entries=[Entry(0, FUNDS, DONE, "1")]), Page(entries=[Entry(0, FUNDS, UNKNOWN)]))
    assert earlier.of_call(CALLS[0]) == {("funds", 0): (0, DONE, "1")}


def test_what_was_superseded_is_done_again_under_another_key() -> None:
    gone = Page(entries=[Entry(0, FUNDS, GONE_DONE, "1")], saga=3)
    earlier = known(ANNOUNCED, Page(entries=[Entry(0, FUNDS, DONE, "1")]), gone)
    assert earlier.of_call(CALLS[0]) == {("funds", 0): (1, NOT_DONE, None)}
    assert [(e.record, e.entry.state) for e in told(ANNOUNCED, gone).superseded(3)] == [("A0", GONE_DONE)]

"""The ledger must show every double effect, or it proves nothing about the pipeline that acts on it."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from resources.core_bank import CoreBank


@pytest.fixture
def bank(tmp_path):
    return CoreBank(path=str(tmp_path / "not there yet" / "bank.db"))


def test_a_repeat_is_written_down_and_takes_no_effect(bank):
    assert bank.post("w/approval/a/funds", "reservation", "a", amount=500) is True
    assert bank.post("w/approval/a/funds", "reservation", "a", amount=500) is False
    assert bank.totals() == [("reservation", 1, 500, 1, 0)]


def test_a_key_cannot_come_to_stand_for_another_amount(bank):
    bank.post("k", "reservation", "a", amount=500)
    with pytest.raises(ValueError, match="stands for"):
        bank.post("k", "reservation", "a", amount=700)
    assert bank.totals() == [("reservation", 1, 500, 0, 0)]


def test_of_many_at_once_one_takes_effect(bank):
    with ThreadPoolExecutor(8) as pool:
        firsts = list(pool.map(lambda _: bank.post("k", "inquiry", "a"), range(24)))
    assert sum(firsts) == 1
    assert bank.totals() == [("inquiry", 1, 0, 23, 0)]


def test_a_cancellation_takes_the_effect_back_once(bank):
    bank.post("k", "reservation", "a", amount=500)
    bank.post("other", "reservation", "b", amount=300)
    assert [bank.cancel("k", 0) for _ in range(2)] == [True, False]
    assert bank.totals() == [("reservation", 1, 300, 0, 1)]


def test_what_is_cancelled_before_it_was_asked_for_takes_no_effect_later(bank):
    """A zombie asks late: after the compensation of its attempt."""
    assert bank.cancel("k", 0) is False
    with pytest.raises(ValueError, match="was cancelled"):
        bank.post("k", "reservation", "a", amount=500, epoch=0)
    assert bank.totals() == []
    assert bank.post("k", "reservation", "a", amount=500, epoch=1) is True, "the next attempt is not late"


def test_of_many_cancellations_at_once_one_takes_effect(bank):
    bank.post("k", "inquiry", "a")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: bank.cancel("k", 0), range(24))) == 1


def test_a_posting_under_way_when_the_step_ends_is_finished_first(bank):
    with ThreadPoolExecutor(1) as thread:
        with bank._ledger() as ledger:  # of a thread for which nobody waits, as of a call that timed out
            ending = thread.submit(bank.teardown_after_execution, None)
            assert not wait([ending], timeout=0.2).done, "the connection is in use"
            ledger.execute("SELECT count(*) FROM ledger")
        ending.result(timeout=60)
    assert bank.post("w@0/1", "inquiry", "1"), "who comes later opens it again"


@pytest.mark.parametrize("table", ["ledger", "cancellations"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET key = 1", "DELETE FROM {}"])
def test_the_ledger_is_append_only(bank, statement, table):
    bank.post("k", "reservation", "a", amount=500)
    bank.cancel("k", 0)
    with sqlite3.connect(bank.path) as ledger, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        ledger.execute(statement.format(table))

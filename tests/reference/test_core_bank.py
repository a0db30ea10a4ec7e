"""The ledger must show every double effect, or it proves nothing about the pipeline that acts on it."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from resources.core_bank import CoreBank


@pytest.fixture
def bank(tmp_path):
    return CoreBank(path=str(tmp_path / "not there yet" / "bank.db"))


def test_a_repeat_is_written_down_and_takes_no_effect(bank):
    assert bank.post("w/approval/a/funds", "reservation", "a", amount=500) is True
    assert bank.post("w/approval/a/funds", "reservation", "a", amount=500) is False
    assert bank.totals() == [("reservation", 1, 500, 1)]


def test_a_key_cannot_come_to_stand_for_another_amount(bank):
    bank.post("k", "reservation", "a", amount=500)
    with pytest.raises(ValueError, match="stands for"):
        bank.post("k", "reservation", "a", amount=700)
    assert bank.totals() == [("reservation", 1, 500, 0)]


def test_of_many_at_once_one_takes_effect(bank):
    with ThreadPoolExecutor(8) as pool:
        firsts = list(pool.map(lambda _: bank.post("k", "inquiry", "a"), range(24)))
    assert sum(firsts) == 1
    assert bank.totals() == [("inquiry", 1, 0, 23)]


@pytest.mark.parametrize("statement", ["UPDATE ledger SET amount = 1", "DELETE FROM ledger"])
def test_the_ledger_is_append_only(bank, statement):
    bank.post("k", "reservation", "a", amount=500)
    with sqlite3.connect(bank.path) as ledger, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        ledger.execute(statement)

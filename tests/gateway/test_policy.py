"""Policies: what cannot be is refused with a fix, and operators change them without touching code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import dagster_mao as mao
from dagster_mao.gateway import Breaker, Gateway, Policy


def refer(entry: Any) -> Any: ...


def wrong(**declared: Any) -> mao.WiringError:
    with pytest.raises(mao.WiringError) as caught:
        Policy(**declared)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("declared", "field", "fix"),
    [
        ({"timeout": True}, "timeout", "seconds above 0"),
        ({"timeout": "30"}, "timeout", "seconds above 0"),
        ({"retries": True}, "retries", "whole number"),
        ({"retries": 2.0}, "retries", "whole number"),
        ({"retry_within": 0}, "retry_within", "seconds above 0"),
        ({"transient": ConnectionError}, "transient", r"\(ConnectionError,\)"),
        ({"transient": [ConnectionError]}, "transient", "tuple"),
        ({"not_counted": ("ValueError",)}, "not_counted", "tuple of error classes"),
        ({"rate_key": ""}, "rate_key", "not empty"),
        ({"rate_limit": 60}, "rate_limit", "60/minute"),
        ({"breaker": {"fail_max": 3}}, "breaker", "mao.Breaker"),
        ({"isolate": 1, "timeout": 1}, "isolate", "True or False"),
        ({"token_limit": "many"}, "token_limit", "60/minute"),
        ({"tokens_per_call": 0}, "tokens_per_call", "whole number from 1"),
        ({"fallback": "refer"}, "fallback", "a function"),
        ({"when_open": "wait"}, "when_open", '"fail", "fallback" or "defer"'),
        ({"when_open": "deffer", "breaker": Breaker()}, "when_open", "'defer' meant"),
        ({"when_open": "defer"}, "when_open", "give it a breaker"),
        ({"when_open": "fallback", "fallback": refer}, "when_open", "give it a breaker"),
        ({"when_open": "fallback", "breaker": Breaker()}, "when_open", "give it a fallback"),
        ({"keep_answers": -1}, "keep_answers", "0 keeps no answers"),
        ({"keep_answers": float("inf")}, "keep_answers", "number of seconds"),
        ({"keep_answers": None}, "keep_answers", "number of seconds"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(declared: dict[str, Any], field: str, fix: str) -> None:
    error = wrong(**declared)
    assert error.field == field
    with pytest.raises(mao.WiringError, match=fix):
        raise error


@pytest.mark.parametrize(
    ("declared", "degradation"),
    [
        ({}, "fail"),
        ({"breaker": Breaker()}, "fail"),
        ({"fallback": refer}, "fallback"),
        ({"fallback": refer, "breaker": Breaker(), "when_open": "fail"}, "fail"),
        ({"fallback": refer, "breaker": Breaker(), "when_open": "defer"}, "defer"),
        ({"breaker": Breaker(), "when_open": "defer"}, "defer"),
        ({"when_open": "fail"}, "fail"),
    ],
)
def test_what_becomes_of_the_rest_when_it_opens(declared: dict[str, Any], degradation: str) -> None:
    assert Policy(**declared).degradation == degradation


def test_what_must_be_shared_needs_a_database_and_says_how_to_do_without(tmp_path: Path) -> None:
    alone = Policy(timeout=1, retries=2, fallback=refer, keep_answers=0)
    assert not alone.is_shared
    Gateway(alone, "shop.asking", None)
    for shared in (Policy(), Policy(keep_answers=0, breaker=Breaker()), *(Policy(keep_answers=0, **{f: "9000/day"}) for f in LIMITS)):
        assert shared.is_shared
        with pytest.raises(mao.WiringError, match=r"database=.*keep_answers=0"):
            Gateway(shared, "shop.asking", None)
        Gateway(shared, "shop.asking", str(tmp_path / "shared.db"))


LIMITS = ("rate_limit", "token_limit")

# -- overrides -----------------------------------------------------------------------------------------------------------------------

DECLARED = Policy(
    timeout=30, retries=3, breaker=Breaker(fail_max=7, reset_timeout=60, name="bureau"), fallback=refer, not_counted=(ValueError,)
)


def test_nothing_changed_is_the_policy_itself() -> None:
    assert DECLARED.overridden(None, agent="score") is DECLARED
    assert DECLARED.overridden({}, None, {}, agent="score") is DECLARED


def test_fields_are_changed_and_the_others_stay() -> None:
    changed = DECLARED.overridden(
        json.loads('{"timeout": null, "retries": 0, "rate_limit": "5/second", "breaker": {"fail_max": 2}, "fallback": null}'), agent="score"
    )
    assert changed == Policy(
        rate_limit="5/second", breaker=Breaker(fail_max=2, reset_timeout=60, name="bureau"), not_counted=(ValueError,), retries=0
    )
    assert DECLARED.retries == 3


def test_a_breaker_is_given_to_who_has_none_and_taken_from_who_has_one() -> None:
    assert Policy().overridden({"breaker": {}}, agent="score").breaker == Breaker()
    assert DECLARED.overridden({"breaker": None}, agent="score").breaker is None


def test_of_several_overrides_the_last_counts_and_only_what_comes_out_must_be_a_policy() -> None:
    deferring = Policy(breaker=Breaker(), when_open="defer")
    everywhere, its_own = {"breaker": None, "timeout": 9}, {"when_open": None, "timeout": 5}
    assert deferring.overridden(everywhere, its_own, agent="score") == Policy(timeout=5)
    with pytest.raises(mao.WiringError, match="give it a breaker"):
        deferring.overridden(everywhere, agent="score")
    changes = {"breaker": {"fail_max": 2}}, {"breaker": {"reset_timeout": 5}}
    assert DECLARED.overridden(*changes, agent="score").breaker == Breaker(2, 5, "bureau")
    changes = {"breaker": {"fail_max": 2}}, {"breaker": None}, {"breaker": {"reset_timeout": 5}}
    assert DECLARED.overridden(*changes, agent="score").breaker == Breaker(7, 5, "bureau")


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"time_out": 3}, "time_out", "Is 'timeout' meant"),
        ({"retry": 3}, "retry", "'retries'"),
        ({3: 3}, "3", "there are timeout"),
        ({"breaker": {"failmax": 3}}, "breaker.failmax", "Is 'fail_max' meant"),
        ({"breaker": {"fail_max": 0}}, "breaker.fail_max", "whole number from 1"),
        ({"breaker": "off"}, "breaker", "null to switch it off"),
        ({"breaker": Breaker()}, "breaker", "give its fields"),
        ({"timeout": -1}, "timeout", "seconds above 0"),
        ({"timeout": [1]}, "timeout", "a number, a text, or null"),
        ({"retries": None}, "retries", "whole number"),
        ({"fallback": refer}, "fallback", "null. switches it off"),
        ({"fallback": "tests.gateway.test_policy.refer"}, "fallback", "null. switches it off"),
        ({"transient": None}, "transient", "leave it to the agent"),
        ({"not_counted": []}, "not_counted", "cannot be overridden"),
        ({"when_open": "defer"}, "when_open", "give it a breaker"),
        ("off", "policies", "timeout"),
    ],
)
def test_an_override_that_cannot_be_names_agent_field_and_fix(changes: Any, field: str, told: str) -> None:
    with pytest.raises(mao.WiringError, match=told) as caught:
        Policy().overridden(changes, agent="score")
    assert (caught.value.agent, caught.value.field) == ("score", field)
    assert caught.value.fix


# -- describe ------------------------------------------------------------------------------------------------------------------------


@mao.agent
def refer_to_human(entry: Any) -> Any: ...


class Referral(mao.Agent):
    def execute(self, entry: Any) -> Any: ...


@pytest.mark.parametrize(
    ("fallback", "name"),
    [
        (refer, "refer"),
        (refer_to_human, "refer_to_human"),
        (Referral(), "Referral"),
        (Referral, "Referral"),
    ],
)
def test_it_is_described_as_json_can_say_it(fallback: Any, name: str) -> None:
    described = Policy(breaker=Breaker(), fallback=fallback, not_counted=(ValueError,)).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["fallback"] == f"{__name__}.{name}"
    assert described["breaker"] == {"fail_max": 5, "reset_timeout": 30.0, "name": None}
    assert described["transient"] == ["dagster_mao.gateway._policy.TransientError", "ConnectionError", "TimeoutError"]
    assert described["not_counted"] == ["ValueError"]
    assert {name: described[name] for name in ("timeout", "retries", "isolate")} == {"timeout": None, "retries": 0, "isolate": False}


def test_a_function_in_parts_has_a_name_too() -> None:
    assert Policy(fallback=functools.partial(refer, 1)).describe()["fallback"] == "functools.partial"

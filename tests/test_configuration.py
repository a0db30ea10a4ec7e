"""What of a resource's configuration counts: a rotated key must not make paid answers worthless, another model must."""

from __future__ import annotations

import datetime as dt
import enum
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import BaseModel, Field, SecretStr

from dagster_mao.configuration import config_digest


class Colour(enum.Enum):
    RED = "red"


class Inner(dg.ConfigurableResource):
    url: str = "https://bureau"
    token: str = "t"


class Bureau(dg.ConfigurableResource):
    url: str = "https://user:secret@bureau/v1"
    api_key: str = "k"
    max_tokens: int = 5
    pin: str = Field(default="1234", json_schema_extra={"dagster__is_secret": True})
    options: dict[str, Any] = {"region": "eu", "password": "p"}
    inner: Inner


class Plain(BaseModel):
    key: SecretStr = SecretStr("s")
    hidden: str = Field(default="h", exclude=True)
    folder: Path = Path("/data")
    day: dt.date = dt.date(2026, 1, 1)
    colours: set[Colour] = {Colour.RED}
    limits: tuple[int, ...] = (1, 2)


class Client:
    """No model: says itself what counts."""

    def __init__(self, model: str, key: str) -> None:
        self.model, self.key = model, key

    def __mao_config__(self) -> dict[str, Any]:
        return {"model": self.model}


def bureau(**changed: Any) -> Bureau:
    return Bureau(**{"inner": Inner(), **changed})


class Unknown:
    pass


def same(one: Any, other: Any) -> bool:
    return config_digest({"it": one}) == config_digest({"it": other})


@pytest.mark.parametrize(
    "changed",
    [
        {"api_key": "other"},
        {"pin": "4321"},
        {"url": "https://user:rotated@bureau/v1"},
        {"options": {"region": "eu", "password": "other"}},
        {"inner": Inner(token="other")},
    ],
)
def test_a_rotated_secret_changes_nothing(changed: dict[str, Any]) -> None:
    assert same(bureau(), bureau(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"url": "https://user:secret@bureau/v2"},
        {"url": "https://another:secret@bureau/v1"},
        {"max_tokens": 6},
        {"options": {"region": "us", "password": "p"}},
        {"inner": Inner(url="https://elsewhere")},
    ],
)
def test_what_counts_changes_the_digest(changed: dict[str, Any]) -> None:
    assert not same(bureau(), bureau(**changed))


def test_pydantic_models_that_are_no_resources_count_as_well() -> None:
    assert same(Plain(), Plain(key=SecretStr("other"), hidden="other"))
    for changed in ({"folder": Path("/other")}, {"day": dt.date(2026, 1, 2)}, {"limits": (2, 1)}, {"colours": set()}):
        assert not same(Plain(), Plain(**changed))


def test_an_object_may_say_what_counts() -> None:
    assert same(Client("small", "key"), Client("small", "rotated"))
    assert not same(Client("small", "key"), Client("large", "key"))


def test_of_anything_else_the_class_counts() -> None:
    assert same(Unknown(), Unknown())
    assert not same(Unknown(), Client("small", ""))
    assert config_digest({}) == ""


def test_what_is_in_memory_only_does_not_change_from_process_to_process() -> None:
    class Holder(BaseModel, arbitrary_types_allowed=True):
        held: Any = None

    assert same(Holder(held=Unknown()), Holder(held=Unknown()))

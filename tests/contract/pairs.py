"""Pairs of contracts, generated small enough that every value which can tell them apart is tried.

The bounds, lengths and members lie within a handful of values, and `values` gives those and their neighbours; so a claim about all values
can be checked by looking at all of them.
"""

from __future__ import annotations

import datetime as dt
import decimal
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional

import polars as pl
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, ValidationError, create_model

from dagster_mao.contract import Contract

REQUIRED = object()
_DAYS = [dt.date(2020, 1, day) for day in range(1, 6)]
_VALUES: dict[str, list[Any]] = {
    "int": list(range(-4, 10)),
    "float": [-math.inf, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0, math.inf, math.nan],
    "str": ["".join(letters) for n in range(4) for letters in itertools.product("ab ", repeat=n)] + ["aaaa", "A", "a\n"],
    "bool": [True, False],
    "date": _DAYS,
    "decimal": [decimal.Decimal(n) / 4 for n in range(-4, 14)],
}


def odd(value: Any) -> Any:
    if value in {1, "a"}:
        raise ValueError("odd")
    return value


def mended(value: Any) -> Any:
    """Takes what the type does not: repairs before it is judged."""
    if value is None:
        return 2
    return abs(value)


@dataclass(frozen=True)
class Spec:
    """A field: its column's kind, and its annotation."""

    kind: str
    annotation: Any
    default: Any = REQUIRED
    members: dict[str, Spec] = field(default_factory=dict)
    item: Spec | None = None

    def values(self) -> Iterator[Any]:
        """All that a column of this kind may hold, as far as it matters here."""
        yield None
        if self.item is not None:
            items = list(self.item.values())
            yield from ([value] * n for n in range(5) for value in (items if n else items[:1]))
        elif self.members:
            yield from varied(self.members)
        else:
            yield from _VALUES[self.kind]


def varied(specs: dict[str, Spec]) -> Iterator[dict[str, Any]]:
    """Records around one that is valid, if there is one: each differs from it in one field."""
    base = {name: good[0] if (good := accepted(spec)) else None for name, spec in specs.items()}
    yield base
    for name, spec in specs.items():
        for value in spec.values():
            yield base | {name: value}


def accepted(spec: Spec) -> list[Any]:
    """The values that pydantic takes, what is neither null nor empty first."""
    model = create_model("One", x=(spec.annotation, ...))
    return sorted((v for v in spec.values() if valid(model, {"x": v})), key=lambda v: v is None or v == [])


def valid(model: type[BaseModel], record: dict[str, Any]) -> bool:
    try:
        model.model_validate(record, strict=False)
    except ValidationError:
        return False
    return True


def contract_of(specs: dict[str, Spec], name: str = "Generated") -> Contract[Any]:
    fields: dict[str, Any] = {n: (s.annotation, ... if s.default is REQUIRED else s.default) for n, s in specs.items()}
    return Contract(create_model(name, **fields))


def frame_of(contract: Contract[Any], records: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(records, schema=contract.schema, strict=True, orient="row")


@st.composite
def _bounds(draw: Any, limits: list[Any]) -> dict[str, Any]:
    low, high = sorted(draw(st.tuples(st.sampled_from(limits), st.sampled_from(limits))))
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found[draw(st.sampled_from(["gt", "ge"]))] = low
    if low < high and draw(st.booleans()):
        found[draw(st.sampled_from(["lt", "le"]))] = high
    return found


@st.composite
def _lengths(draw: Any) -> dict[str, Any]:
    low, high = draw(st.integers(0, 2)), draw(st.integers(2, 3))
    return {name: n for name, n in (("min_length", low), ("max_length", high)) if draw(st.booleans())}


@st.composite
def scalars(draw: Any, kind: str, validators: bool = True) -> Spec:
    annotation: Any
    choice = draw(st.integers(0, 5))
    if kind == "int":
        limits = draw(_bounds([0, 2, 4, 6])) | draw(st.sampled_from([{}, {}, {"multiple_of": 2}, {"multiple_of": 4}]))
        plain = Annotated[int, Field(**limits)]
        annotation = draw(st.sampled_from([Literal[0, 1], Literal[1, 2], Literal[5]])) if choice == 0 else plain
        if validators and choice in {1, 2}:
            annotation = draw(st.sampled_from([Annotated[plain, AfterValidator(odd)], Annotated[plain, BeforeValidator(mended)]]))
    elif kind == "float":
        limits = draw(_bounds([0.0, 1.0, 2.0])) | draw(st.sampled_from([{}, {}, {"allow_inf_nan": False}]))
        annotation = Annotated[float, Field(**limits)]
    elif kind == "str":
        limits = draw(_lengths()) | draw(st.sampled_from([{}, {}, {"pattern": "^a"}, {"strip_whitespace": True}] if validators else [{}]))
        plain = Annotated[str, StringConstraints(**limits)]
        annotation = draw(st.sampled_from([Literal["a", "b"], Literal["b", "ab"], Literal["aaaa"]])) if choice == 0 else plain
        if validators and choice in {1, 2}:
            annotation = Annotated[plain, AfterValidator(odd)]
    elif kind == "bool":
        annotation = draw(st.sampled_from([bool, bool, Literal[True]]))
    elif kind == "date":
        annotation = Annotated[dt.date, Field(**draw(_bounds([_DAYS[1], _DAYS[3]])))]
    else:
        annotation = Annotated[decimal.Decimal, Field(decimal_places=2, **draw(_bounds([decimal.Decimal("0.5"), decimal.Decimal(1)])))]
    return Spec(kind, annotation)


@st.composite
def specs(draw: Any, depth: int = 1, validators: bool = True, kinds: tuple[str, ...] = tuple(_VALUES)) -> Spec:
    shape = draw(st.sampled_from(["scalar", "scalar", "list", "struct"] if depth else ["scalar"]))
    if shape == "list":
        item = draw(specs(depth - 1, validators, kinds))
        spec = Spec("list", Annotated[list[item.annotation], Field(**draw(_lengths()))], item=item)  # type: ignore[name-defined]
    elif shape == "struct":
        members = draw(_members(depth - 1, validators, kinds))
        spec = Spec("struct", contract_of(members, "Inner").model, members=members)
    else:
        spec = draw(scalars(draw(st.sampled_from(kinds)), validators))
    if draw(st.integers(0, 2)) == 0:
        spec = Spec(spec.kind, Optional[spec.annotation], spec.default, spec.members, spec.item)  # noqa: UP045 - generated
    return spec


@st.composite
def _members(draw: Any, depth: int, validators: bool, kinds: tuple[str, ...]) -> dict[str, Spec]:
    members = {}
    for name in draw(st.sets(st.sampled_from("xyz"), min_size=1, max_size=3)):
        spec = draw(specs(depth, validators, kinds))
        if draw(st.booleans()):
            # Good ones and bad ones: pydantic does not look.
            default = draw(st.sampled_from([v for v in spec.values() if not isinstance(v, dict)]))
            spec = Spec(spec.kind, spec.annotation, default, spec.members, spec.item)
        members[name] = spec
    return dict(sorted(members.items()))


@st.composite
def pairs(draw: Any, validators: bool = True) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """The fields of two versions: few kinds, so that many fields differ in their constraints only."""
    kinds = tuple(draw(st.sets(st.sampled_from(list(_VALUES)), min_size=1, max_size=2)))
    old, new = draw(_members(1, validators, kinds)), draw(_members(1, validators, kinds))
    kept = {name: spec for name, spec in old.items() if draw(st.booleans())}
    return old, dict(sorted((new | kept).items()))

"""What changed from one version of a contract to the next, and how rows sealed under the one are read under the other.

Both versions are `Contract.describe()` data, so that what a seal recorded can be compared when its model is long gone. The terms are those
of schema registries (Confluent, "Schema Evolution and Compatibility"), put as who is left behind when the other side moves on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from pydantic_core import PydanticUndefined

from dagster_mao.contract._compare import Difference, differences, readable, rewrites, unknown
from dagster_mao.contract._masking import MASK
from dagster_mao.contract._types import Field, Type, spell
from dagster_mao.errors import IncompatibleContractError

if TYPE_CHECKING:
    from dagster_mao.contract._contract import Contract

Impact = Literal["breaking for writers", "breaking for readers", "unproven", "harmless"]


@dataclass(frozen=True)
class Change:
    """One thing that changed, at the path `field` ("income.amount", "sources[]"; the contract's name for the record as a whole).

    `kind` says who is left behind:

    - "breaking for writers": what keeps the old contract may break the new one. So may a writer that has not changed, and every snapshot
      sealed before: the new version is not *backward* compatible with the old one. A new field without a default, a narrower bound.
    - "breaking for readers": what keeps the new contract may break the old one, by which somebody may still read: not *forward*
      compatible. A field that is gone (unless the old contract had a default for it), a wider bound.
    - "unproven": whether one side breaks the other is known only with the data, or with the code: patterns, validators.
    - "harmless": whatever keeps the one keeps the other, as far as this change goes.

    What is breaking for both is two changes, with the same `detail`.
    """

    field: str
    kind: Impact
    detail: str


def evolution(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """What changed from `old` to `new`, in the order of the new one's fields; empty when nothing did.

    If no change is breaking for writers or unproven, every batch that keeps `old` can be upgraded to `new` and keeps it; if none is
    breaking for readers or unproven, the other way round. Validators are code that no description holds: a field that has some is listed
    as unproven in any case.
    """
    if old == new:
        return ()
    old = {**old, "name": new["name"]}
    impacts = _Impacts(differences(old, new, fill=True), differences(new, old, fill=True))
    steps = list(_fields(old["fields"], new["fields"], "", rewrites(old) or rewrites(new)))
    changes = [change for step in steps for change in impacts.of(step)]
    changes += impacts.unmentioned({step.field for step in steps if not step.inert})
    return (*changes, *_key(old["key"], new["key"]))


@dataclass(frozen=True)
class _Step:
    """A place where the descriptions differ. `inert`: in words that judge nothing; `opaque`: behind a validator that may change values."""

    field: str
    detail: str
    inert: bool = False
    opaque: bool = False


class _Impacts:
    """What is breaking where, from what either version demands beyond the other."""

    def __init__(self, of_new: Sequence[Difference], of_old: Sequence[Difference]) -> None:
        sides: dict[Impact, Sequence[Difference]] = {"breaking for writers": of_new, "breaking for readers": of_old}
        self._of: dict[str, dict[Impact, str]] = {}
        for side, found in sides.items():
            for one in found:
                self._of.setdefault(one.field, {}).setdefault("unproven" if one.kind == "unproven" else side, one.detail)

    def of(self, step: _Step) -> Iterator[Change]:
        found = {} if step.inert else self._of.get(step.field, {})
        otherwise: Impact = "unproven" if step.opaque and not step.inert else "harmless"
        for kind in sorted(found, key=_ORDER.index) or [otherwise]:
            yield Change(step.field, kind, step.detail)

    def unmentioned(self, told: set[str]) -> Iterator[Change]:
        """Fields that read the same and are not, or not provably, the same demand: those with validators."""
        for field, found in self._of.items():
            if field not in told:
                yield from (Change(field, kind, found[kind]) for kind in sorted(found, key=_ORDER.index))


_ORDER: list[Impact] = ["breaking for writers", "breaking for readers", "unproven"]


def _key(old: str | None, new: str | None) -> Iterator[Change]:
    if new not in (None, old):
        yield Change(str(new), "breaking for writers", "is the key now, and must be unique")
    if old not in (None, new):
        yield Change(str(old), "breaking for readers", "is no longer the key, and need not be unique")


def _fields(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], path: str, opaque: bool) -> Iterator[_Step]:
    before, after = {f["name"]: f for f in old}, {f["name"]: f for f in new}
    for name, field in before.items():
        if name not in after:
            yield _Step(path + name, f"removed; {_filled(field, 'readers by the old contract')}")
    for name, field in after.items():
        if name not in before:
            yield _Step(path + name, f"added, {field['type']}; {_filled(field, 'what was written before')}")
        else:
            yield from _node(before[name], field, path + name, opaque)
            yield from _words(before[name], field, path + name)
    if [n for n in before if n in after] != [n for n in after if n in before]:
        yield _Step(path.rstrip(".") or "record", "the fields are in another order", inert=True)


def _filled(field: Mapping[str, Any], who: str) -> str:
    if "default" not in field:
        return f"no default for {who}"
    return f"default {_shown_default(field)} for {who}"


def _shown_default(field: Mapping[str, Any]) -> str:
    return MASK if field.get("personal") else repr(field["default"])


def _node(old: Mapping[str, Any], new: Mapping[str, Any], where: str, opaque: bool) -> Iterator[_Step]:
    told = list(_differs(old, new))
    opaque = opaque or rewrites(old) or rewrites(new)
    if told:
        yield _Step(where, "; ".join(told), opaque=opaque)
    if "fields" in old and "fields" in new:
        yield from _fields(old["fields"], new["fields"], where + ".", opaque)
    if "items" in old and "items" in new:
        yield from _node(old["items"], new["items"], where + "[]", opaque)


def _differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    composed = ("fields" in old and "fields" in new) or ("items" in old and "items" in new)
    if old["type"] != new["type"]:
        yield f"{old['type']} became {new['type']}"
    if old["dtype"] != new["dtype"] and not composed:
        yield f"column {old['dtype']} became {new['dtype']}"
    if old["nullable"] != new["nullable"]:
        yield "may be null now" if new["nullable"] else "may not be null any more"
    before, after = old["constraints"], new["constraints"]
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            told = [spell(name, side[name]) if name in side else "" for side in (before, after)]
            yield f"{told[0]} became {told[1]}" if all(told) else f"{told[1]}, new" if told[1] else f"{told[0]} no more"
    if (old["validators"], old.get("modes", [])) != (new["validators"], new.get("modes", [])):
        yield "other validators"
    for name in unknown(old, new):
        yield f"{name} changed"


def _words(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> Iterator[_Step]:
    if old.get("personal", False) != new.get("personal", False):
        told = "is personal now: masked wherever it is shown" if new.get("personal") else "is no longer personal: what was masked is shown"
        yield _Step(where, told, inert=True)
    if ("default" in old, old.get("default")) != ("default" in new, new.get("default")):
        before, after = (_shown_default(side) if "default" in side else "none" for side in (old, new))
        yield _Step(where, f"default: {before} became {after}", inert=True)
    if old.get("description") != new.get("description"):
        yield _Step(where, "is described in other words", inert=True)


# --- reading -----------------------------------------------------------------------------------------------------------------------------


def upgraded(contract: Contract[Any], frame: pl.LazyFrame, recorded: Mapping[str, Any]) -> pl.LazyFrame:
    """Rows sealed under the `recorded` contract as rows of `contract`; see `Contract.upgrade`."""
    cannot = f"what was sealed under {recorded['name']} v{recorded['version']} cannot be read as {contract.name} v{contract.version}"
    if None not in (recorded["key"], contract.key) and recorded["key"] != contract.key:
        # Which record became of which could not be told: the old key need not say which rows the new one means.
        what = f"{cannot}: its records are told apart by {recorded['key']!r}, not by {contract.key!r}"
        raise IncompatibleContractError(what, field=contract.key, fix=f"mark {recorded['key']!r} in {contract.name} as mao.Key")
    for found in readable(recorded, contract.describe()):
        if found.kind == "contradiction":
            raise IncompatibleContractError(
                f"{cannot}: {found.detail}",
                field=found.field,
                fix=f"give {found.field!r} of {contract.name} a default that every reader can live with"
                if found.detail.startswith("missing")
                else f"make {contract.name} allow what {recorded['name']} did, or read by a contract that does",
            )
    present = frame.collect_schema()
    other = [f for f in contract.fields if present.get(f.name) != f.type.dtype]
    filled = [_filled_in(f, present.get(f.name), pl.col(f.name)).alias(f.name) for f in other]
    return contract.select(frame.with_columns(filled) if filled else frame)


def _filled_in(field: Field, present: Any, value: pl.Expr) -> pl.Expr:
    if present is not None:
        return _retyped(field.type, present, value)
    if field.default is PydanticUndefined:
        return value
    return pl.lit(field.default, dtype=field.type.dtype)


def _retyped(node: Type, present: Any, value: pl.Expr) -> pl.Expr:
    """The struct with the members of `node`, the list of them; any other type as it is."""
    if present == node.dtype:
        return value
    if node.fields and isinstance(present, pl.Struct):
        inner = {f.name: f.dtype for f in present.fields}
        members = [_filled_in(f, inner.get(f.name), value.struct.field(f.name)).alias(f.name) for f in node.fields]
        return pl.when(value.is_not_null()).then(pl.struct(members))
    if node.item is not None and isinstance(present, pl.List):
        return value.list.eval(_retyped(node.item, present.inner, pl.element()))
    return value

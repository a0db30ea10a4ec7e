"""Time travel: which versions of a workflow were there at a moment, or when one of them had just been sealed."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol, TypeVar

from dagster_mao.errors import UnknownVersionError

When = dt.datetime | int
"""A moment, with its time zone; or a version of one workflow: its state when that version had just been sealed."""

_SHAPE = re.compile(r"(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?)(Z|[+-]\d{2}(?::?\d{2})?)?)?")
_FIX = "write 2026-03-03T12:00Z, or 2026-03-03T13:00+01:00"


class Timed(Protocol):
    """A seal, or as much of it as tells when it was made."""

    @property
    def sealed_at(self) -> dt.datetime: ...


S = TypeVar("S", bound=Timed)


def is_moment(text: str) -> bool:
    """Whether the text is written like a moment, or like one that lacks its time or its zone."""
    return _SHAPE.fullmatch(text) is not None


def moment(text: str) -> dt.datetime:
    """A moment as ISO 8601 writes it, with its zone: `2026-03-03T12:00Z`. Raises `UnknownVersionError` for any other text."""
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise UnknownVersionError(f"{text!r} is no moment", fix=_FIX)
    day, time, zone = found.groups()
    if not time or not zone:
        raise UnknownVersionError(f"The moment {text!r} has no {'time zone' if time else 'time'}", fix=_FIX)
    # Python 3.10 reads neither Z nor every number of digits.
    whole, _, fraction = (time if time.count(":") == 2 else f"{time}:00").partition(".")
    digits = zone.replace("Z", "+0000").replace(":", "").ljust(5, "0")
    try:
        return dt.datetime.fromisoformat(f"{day}T{whole}.{fraction.ljust(6, '0')}{digits[:3]}:{digits[3:]}")
    except ValueError as error:
        raise UnknownVersionError(f"{text!r} is no moment: {error}", fix=_FIX) from None


def passed(when: dt.datetime) -> dt.datetime:
    """The moment in UTC. Raises `UnknownVersionError` where it has no zone, or has not come yet: what is there then, nobody knows."""
    if when.tzinfo is None:
        raise UnknownVersionError(f"The moment {when.isoformat()} has no time zone", fix=_FIX)
    if when > dt.datetime.now(dt.timezone.utc):
        raise UnknownVersionError(f"The moment {when.isoformat()} has not come yet", fix="leave it out for the state as it is now")
    return when.astimezone(dt.timezone.utc)


def there(seals: Sequence[S], when: When, *, workflow: str | None = None) -> list[S]:
    """Of a workflow's seals, those that were there.

    At a moment: a version counts once it and all versions before it say that they were sealed by then, that very microsecond included.
    Clocks of hosts differ; the order of versions is the order of what happened, and no version is shown without those before it. As of a
    version: those up to it. Raises `UnknownVersionError` for a version that there is not, and for a moment without a zone or to come.
    """
    if isinstance(when, int):
        if not 0 <= when < len(seals):
            known = f"it has versions 0 to {len(seals) - 1}" if seals else "nothing was sealed for this workflow"
            raise UnknownVersionError(f"No version {when}: {known}", workflow=workflow, fix="`dagster-mao history` lists what there is")
        return list(seals[: when + 1])
    until = passed(when)
    return list(takewhile(lambda seal: seal.sealed_at <= until, seals))

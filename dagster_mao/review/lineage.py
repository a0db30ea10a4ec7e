"""A picture of a workflow's lineage, as SVG: which version was made from which, from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dagster_mao.state import Seal

_WIDTH, _HEIGHT, _ACROSS, _DOWN, _MARGIN = 176, 50, 64, 18, 8


def lineage_svg(seals: Sequence[Seal], links: Mapping[int, str]) -> str:
    """The seals as boxes in columns, each right of all that it was made from, with an arrow from every parent that is among them.

    `links` has, by version, where a click on a box leads.
    """
    places = _places(seals)
    if not places:
        return ""
    width = (1 + max(column for column, _ in places.values())) * (_WIDTH + _ACROSS) - _ACROSS + 2 * _MARGIN
    height = (1 + max(row for _, row in places.values())) * (_HEIGHT + _DOWN) - _DOWN + 2 * _MARGIN
    arrows = [_arrow(places[parent.version], places[seal.version]) for seal in seals for parent in seal.parents if parent.version in places]
    boxes = [_box(seal, places[seal.version], links.get(seal.version)) for seal in seals]
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="Lineage">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" class="tip"/></marker></defs>'
        f"{''.join(arrows)}{''.join(boxes)}</svg>"
    )


def _places(seals: Sequence[Seal]) -> dict[int, tuple[int, int]]:
    """Column and row of each version: one column further than the furthest of its parents. Versions come before those made from them."""
    places: dict[int, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    for seal in sorted(seals, key=lambda seal: seal.version):
        column = max((places[parent.version][0] + 1 for parent in seal.parents if parent.version in places), default=0)
        places[seal.version] = (column, filled.get(column, 0))
        filled[column] = filled.get(column, 0) + 1
    return places


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    column, row = place
    return _MARGIN + column * (_WIDTH + _ACROSS), _MARGIN + row * (_HEIGHT + _DOWN)


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    (left, top), (right, bottom) = _corner(start), _corner(end)
    x, y, to_x, to_y = left + _WIDTH, top + _HEIGHT // 2, right, bottom + _HEIGHT // 2
    bend = (x + to_x) // 2
    return f'<path d="M{x} {y}C{bend} {y} {bend} {to_y} {to_x} {to_y}" class="arrow" marker-end="url(#tip)"/>'


def _box(seal: Seal, place: tuple[int, int], link: str | None) -> str:
    x, y = _corner(place)
    name = seal.agent if len(seal.agent) <= 22 else f"{seal.agent[:21]}\u2026"
    about = f"@{seal.version} \u00b7 {seal.row_count:,} records"
    drawn = (
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" class="box {escape(seal.kind)}"/>'
        f'<text x="{x + 12}" y="{y + 21}" class="name">{escape(name)}</text>'
        f'<text x="{x + 12}" y="{y + 38}" class="about">{escape(about)}</text>'
    )
    return f'<a href="{escape(link)}">{drawn}</a>' if link else drawn

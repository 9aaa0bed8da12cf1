"""Where a table of a DuckDB connection is: names resolved as DuckDB resolves them in SQL.

The catalogue is asked, and not DuckDB's own binder: this would take a variable of the calling
Python code for a table that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_IDENTIFIER = re.compile(r'"(?:[^"]|"")*"|[^".,]+')


class Place(NamedTuple):
    """A schema of the connection's own database, or of an attached one."""

    catalog: str
    schema: str

    def __str__(self) -> str:
        return f"{quoted(self.catalog)}.{quoted(self.schema)}"


TEMPORARY = Place("temp", "main")  # TEMP tables, and what `connection.register` was given


class Table(NamedTuple):
    """Where a table is, and its columns' types by their names in lower case."""

    name: str
    columns: dict[str, str]


def find_places(connection: Any, schema: str | None) -> list[Place]:
    """The schemas in which tables are looked for, in that order.

    Without ``schema`` those of an unqualified name: temporary tables, the search path, the default
    schema. Else the first of these readings of ``schema`` that holds a table: a schema of the
    search path or of the current database, ``catalogue.schema``, a catalogue, of which the default
    schema is taken.

    Raises:
        ValueError: a name with quotation marks that do not match.
    """
    here, path = _search_path(connection)
    if schema is None:
        return list(dict.fromkeys([TEMPORARY, *path, Place(here, "main")]))
    readings = _readings(schema, here, path)
    for reading in readings:
        if any(_holds_tables(connection, place) for place in reading):
            return reading
    return list(dict.fromkeys(place for reading in readings for place in reading))


def find_table(connection: Any, places: Sequence[Place], name: str) -> Table:
    """The table, from the first place that has it; without columns where none has. Names are
    compared without case, as in SQL; of two that differ in case alone (an attached database may
    have them), the one written as asked for is taken."""
    for place in places:
        rows = connection.execute(
            "SELECT table_catalog, table_schema, table_name, lower(column_name), data_type"
            " FROM information_schema.columns WHERE lower(table_name) = lower(?)"
            " AND lower(table_catalog) = lower(?) AND lower(table_schema) = lower(?)"
            " ORDER BY table_name <> ?, table_schema <> ?, table_catalog, table_schema, table_name",
            [name, *place, name, place.schema],
        ).fetchall()
        if rows:
            catalog, schema, table = rows[0][:3]
            columns = {row[3]: str(row[4]).upper() for row in rows if row[:3] == rows[0][:3]}
            return Table(f"{Place(catalog, schema)}.{quoted(table)}", columns)
    return Table(quoted(name), {})


def places_with(connection: Any, name: str) -> list[str]:
    """Every schema of every catalogue that has a table of that name, as SQL writes it."""
    rows = connection.execute(
        "SELECT DISTINCT table_catalog, table_schema FROM information_schema.tables"
        " WHERE lower(table_name) = lower(?) ORDER BY ALL",
        [name],
    ).fetchall()
    return [str(Place(*row)) for row in rows]


def quoted(name: str) -> str:
    """An identifier as SQL writes it, whatever it holds."""
    return '"' + name.replace('"', '""') + '"'


def _search_path(connection: Any) -> tuple[str, list[Place]]:
    """The current catalogue, and the schemas in which an unqualified name is looked for."""
    here, schema, path = connection.execute(
        "SELECT current_database(), current_schema(), current_setting('search_path')"
    ).fetchone()
    places = []
    for entry in _split(path, ","):
        names = _split(entry, ".")
        names = [here, *names][-2:]
        places.append(Place(*map(_unquoted, names)))
    return here, places or [Place(here, schema)]


def _readings(schema: str, here: str, path: Sequence[Place]) -> list[list[Place]]:
    if '"' in schema:
        if schema.count('"') % 2:
            raise ValueError(f"schema: expected quotation marks in pairs, got {schema!r}")
        names = [_unquoted(name) for name in _split(schema, ".")]
        pairs = [(names[0], names[1])] if len(names) == 2 else []
        name = names[0] if len(names) == 1 else None
    else:
        dots = [i for i, letter in enumerate(schema) if letter == "."]
        pairs = [(schema[:dot], schema[dot + 1 :]) for dot in dots]
        name = schema
    readings = [[Place(*pair)] for pair in pairs]
    if name is None:
        return readings
    # As in SQL, `main` may also be that of temporary tables.
    known = [TEMPORARY, *path] if name.lower() == TEMPORARY.schema else path
    own = [place for place in known if place.schema.lower() == name.lower()]
    own = list(dict.fromkeys([*own, Place(here, name)]))
    defaults = [[Place(name, default)] for default in ("main", "public")]
    return [own, *readings, *defaults]


def _holds_tables(connection: Any, place: Place) -> bool:
    found = connection.execute(
        "SELECT 1 FROM information_schema.tables"
        " WHERE lower(table_catalog) = lower(?) AND lower(table_schema) = lower(?) LIMIT 1",
        list(place),
    ).fetchone()
    return found is not None


def _split(text: str, separator: str) -> list[str]:
    """``text`` at each separator outside quotation marks; the parts keep theirs. One without its
    partner, which older DuckDB writes for a name that holds one, is a letter."""
    parts, end = [""], 0
    while end < len(text):
        if text[end] == separator:
            parts.append("")
            end += 1
            continue
        found = _IDENTIFIER.match(text, end)
        piece = text[end] if found is None else found.group()
        parts[-1] += piece
        end += len(piece)
    return [part.strip() for part in parts if part.strip()]


def _unquoted(name: str) -> str:
    if name.startswith('"') and name.endswith('"') and len(name) > 1:
        return name[1:-1].replace('""', '"')
    return name

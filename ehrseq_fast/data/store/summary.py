"""A store in lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MOST_NAMES = 8  # in a line


def describe_store(store: Any) -> str:
    """The lines of :meth:`EventStore.describe`, whose module imports this one."""
    counts = store.header["counts"]
    source = store.header["source"]
    visits = np.diff(store.patient_offsets)
    split = store.header["split"]
    per_split = ", ".join(f"{name} {n:,}" for name, n in split["patients"].items())
    lines = [
        f"store               {store.path}",
        f"source              {source.get('kind', '?')}: {source.get('path', '?')}",
        f"visits by           {store.visit_rule}",
        f"patients            {store.n_patients:,} "
        f"({counts['patients without visits']:,} without visits)",
        f"visits              {store.n_visits:,}",
        f"entries             {len(store.codes):,} distinct codes of visits, from "
        f"{counts['events']:,} events",
        f"numeric values      {counts['values']:,}",
        f"without a time      {counts['static_entries']:,}",
        f"births, deaths      {counts['births']:,}, {counts['deaths']:,}",
        f"observation periods {counts['periods']:,}",
        f"splits              {per_split} ({split['rule']})",
        f"codes               {store.n_codes:,}; vocabulary {store.vocab_size:,} with padding and "
        f"unknown (at least {store.header['vocabulary']['min_count']} times in train)",
    ]
    if store.n_visits:
        mean, p90, most = visits.mean(), np.percentile(visits, 90), visits.max()
        lines.insert(5, f"visits per patient  mean {mean:.1f}, p90 {p90:.0f}, max {most:,}")
        first, last = store.visit_times.min(), store.visit_times.max()
        lines.append(f"from, to            {str(first)[:10]}, {str(last)[:10]}")
    lines += [f"left out            {n:,} {what}" for what, n in store.left_out.items() if n]
    noticed, missing = source.get("noticed", {}), source.get("missing", {})
    lines += [f"noticed             {n:,} {what}" for what, n in noticed.items() if n]
    lines += [f"missing             {what}: {why}" for what, why in missing.items()]
    lines += [f"not read            {line}" for line in _not_read(source)]
    return "\n".join(lines)


def _not_read(source: Mapping[str, Any]) -> list[str]:
    """What the source has besides, by the entries that readers write into the header."""
    tables: Mapping[str, int | None] = source.get("not_read", {})
    lines = [
        f"table {name}: {'a view that fails' if rows is None else f'{rows:,} rows'}"
        for name, rows in tables.items()
    ]
    for key, what in (("columns_not_read", "columns"), ("files_not_read", "files")):
        names = source.get(key, [])
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            lines.append(f"{what} {', '.join(names[:MOST_NAMES])}{more}")
    return lines

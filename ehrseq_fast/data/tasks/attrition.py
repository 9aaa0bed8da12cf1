"""The attrition table: how many persons and outcomes are left after each rule of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What is left after one rule.

    Attributes:
        name: the rule.
        persons: persons left.
        outcomes: of them, those who have the outcome anywhere in their record.
        predictions: index dates left; as many as persons where each has one.
    """

    name: str
    persons: int
    outcomes: int
    predictions: int


@dataclass(frozen=True)
class Attrition:
    """Rules in the order in which they were applied, and how many outcomes fall into the time at
    risk of those left. ``str()`` lays the table out.

    Example:
        >>> table = Attrition((Rule("persons", 10, 4, 10), Rule("with a visit", 8, 4, 8)), events=3)
        >>> print(table)
        rule          persons  removed  outcomes
        persons            10                  4
        with a visit        8        2         4
        outcomes in the time at risk: 3
    """

    rules: tuple[Rule, ...]
    events: int

    def __str__(self) -> str:
        header, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in (header, *rows)
        ]
        return "\n".join([*lines, f"outcomes in the time at risk: {self.events:,}"])

    def to_markdown(self) -> str:
        """The table in Markdown.

        Example:
            >>> print(Attrition((Rule("persons", 10, 4, 10),), events=3).to_markdown())
            | rule | persons | removed | outcomes |
            | --- | ---: | ---: | ---: |
            | persons | 10 |  | 4 |
            <BLANKLINE>
            Outcomes in the time at risk: 3
        """
        header, *rows = self._cells()
        rule = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
        return f"{table}\n\nOutcomes in the time at risk: {self.events:,}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; :meth:`from_dict` reads it."""
        return {"rules": [rule._asdict() for rule in self.rules], "events": self.events}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attrition:
        """What :meth:`to_dict` has written."""
        return cls(tuple(Rule(**rule) for rule in values["rules"]), int(values["events"]))

    def _cells(self) -> list[list[str]]:
        repeated = any(rule.predictions != rule.persons for rule in self.rules)
        header = ["rule", "persons", "removed", "outcomes"]
        rows = []
        before: Rule | None = None
        for rule in self.rules:
            removed = "" if before is None else f"{before.persons - rule.persons:,}"
            cells = [rule.name, f"{rule.persons:,}", removed, f"{rule.outcomes:,}"]
            rows.append([*cells, f"{rule.predictions:,}"] if repeated else cells)
            before = rule
        return [[*header, "predictions"] if repeated else header, *rows]


class Funnel:
    """Adds up what each rule leaves, one chunk of patients after the other."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def add(self, name: str, persons: int, outcomes: int, predictions: int) -> None:
        counts = self._counts.setdefault(name, [0, 0, 0])
        for at, number in enumerate((persons, outcomes, predictions)):
            counts[at] += number

    def table(self, events: int) -> Attrition:
        return Attrition(
            tuple(Rule(name, *counts) for name, counts in self._counts.items()), events
        )

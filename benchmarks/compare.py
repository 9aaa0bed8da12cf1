"""``python -m benchmarks compare A.json B.json``: what changed by more than the spread of either.

Times of two runs differ with the state of the machine; ratios within one run are steadier, so both
are compared. Runs that timed their calls in different ways are refused (:mod:`.timing`). A figure's
interval is that of its quartiles (of a ratio: the quartiles that make it smallest and largest), and
at least ``LEAST_SPREAD`` to each side; a figure of fewer than three samples has no spread of its
own and gets ``FEW_SPREAD``. Two figures differ where their intervals do not meet.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from .cases import Row
from .report import ms, ours_in, table, times
from .results import Results, read
from .timing import Spread

SUMMARY = "compare two results files, flagging what changed beyond the spreads"

LEAST_SPREAD = 0.03
FEW_SPREAD = 0.2
ENOUGH = 3
# What of the machine has to be the same for times to be compared.
SAME = ("device", "gpu", "cores", "threads", "capability", "torch")


@dataclass(frozen=True)
class Interval:
    lower: float
    middle: float
    upper: float

    @classmethod
    def of(cls, spread: Spread) -> Interval:
        least = LEAST_SPREAD if spread.count >= ENOUGH else FEW_SPREAD
        return cls(
            min(spread.lower, spread.median * (1 - least)),
            spread.median,
            max(spread.upper, spread.median * (1 + least)),
        )

    def over(self, other: Interval) -> Interval:
        return Interval(
            self.lower / other.upper, self.middle / other.middle, self.upper / other.lower
        )

    def meets(self, other: Interval) -> bool:
        return self.lower <= other.upper and other.lower <= self.upper


@dataclass(frozen=True)
class Change:
    """One row in two runs: its time, and its ratio to this package's time in the same case."""

    row: Row
    before: Interval
    after: Interval
    ratio_before: Interval | None
    ratio_after: Interval | None

    @property
    def verdict(self) -> str:
        if self.before.meets(self.after):
            return ""
        return "faster" if self.after.middle < self.before.middle else "SLOWER"

    @property
    def ratio_changed(self) -> bool:
        if self.ratio_before is None or self.ratio_after is None:
            return False
        return not self.ratio_before.meets(self.ratio_after)


def changes(before: Results, after: Results) -> list[Change]:
    """All rows that were measured in both."""
    earlier = _intervals(before)
    later = _intervals(after)
    return [
        Change(row, earlier[key][1], after_, earlier[key][2], ratio)
        for key, (row, after_, ratio) in later.items()
        if key in earlier
    ]


def _intervals(results: Results) -> dict[tuple[object, ...], tuple[Row, Interval, Interval | None]]:
    found = {}
    for rows in results.cases():
        ours = ours_in(rows)
        base = Interval.of(ours.seconds) if ours and ours.seconds else None
        for row in rows:
            if row.seconds is None:
                continue
            interval = Interval.of(row.seconds)
            ratio = None if base is None or row is ours else interval.over(base)
            found[row.key] = (row, interval, ratio)
    return found


def text(found: list[Change], *, every: bool = False) -> str:
    shown = [change for change in found if every or change.verdict or change.ratio_changed]
    cells = [
        [
            ", ".join(str(part) for part in change.row.key),
            ms(change.before.middle),
            ms(change.after.middle),
            f"{change.after.middle / change.before.middle - 1:+.0%}",
            change.verdict,
            "" if change.ratio_before is None else times(change.ratio_before.middle),
            "" if change.ratio_after is None else times(change.ratio_after.middle),
            "RATIO" if change.ratio_changed else "",
        ]
        for change in shown
    ]
    header = ["row", "ms before", "ms after", "change", "", "ratio before", "after", ""]
    ratios = [change for change in found if change.ratio_before is not None]
    agree = sum(not change.ratio_changed for change in ratios)
    summary = (
        f"{len(found)} rows are in both: {sum(c.verdict == 'faster' for c in found)} faster, "
        f"{sum(c.verdict == 'SLOWER' for c in found)} slower beyond their spread; "
        f"{agree} of {len(ratios)} ratios to this package's time agree within theirs"
    )
    return "\n".join([*([table(header, cells)] if cells else []), summary])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--every", action="store_true", help="show unchanged rows too")


def run(args: argparse.Namespace) -> None:
    """Print what changed.

    Raises:
        SystemExit: if the runs timed their calls in different ways.
    """
    before, after = read(args.before), read(args.after)
    if before.method != after.method:
        raise SystemExit(
            f"python -m benchmarks compare: method: expected that of {args.before.name}, "
            f"{before.method}, got {after.method} in {args.after.name}; times of one cannot be "
            "compared with those of the other"
        )
    for name in SAME:
        was, is_ = (results.machine.get(name) for results in (before, after))
        if was != is_:
            print(f"not measured alike: {name} {was} before, {is_} after")
    print(text(changes(before, after), every=args.every))

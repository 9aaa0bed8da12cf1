"""The settings of a task that predicts a first event, checked."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ...arrays import integer
from ...checks import expect_option
from .dates import IndexDates

DEATH = "death"
EACH_VISIT, FIRST_VISIT = "each_visit", "first_visit"
MOST_DAYS = 365_250  # a thousand years
MOST_COMPETING = 100


@dataclass(frozen=True)
class Settings:
    """What :class:`~.first_event.FirstEvent`, which tells what each of them means, consists of."""

    codes: str | int | Sequence[str | int] | None = None
    _: KW_ONLY
    prefix: str | Sequence[str] | None = None
    index: Any = EACH_VISIT
    washout_days: int = 0
    prior_outcome: str = "exclude"
    gap_days: int = 0
    time_at_risk_days: int | None = None
    min_observation_days: int = 0
    end_of_observation: str | None = None
    prediction_day: str = "included"
    competing: Any = None

    def __post_init__(self) -> None:
        codes, prefix = _codes(self.codes), _prefixes(self.prefix)
        if codes is None and prefix is None:
            raise ValueError("codes: expected codes, a prefix or 'death', got none of them")
        if codes == DEATH and prefix is not None:
            raise ValueError("prefix: expected none beside codes='death'")
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "prefix", prefix)
        object.__setattr__(self, "competing", self._competing(self.competing))
        if isinstance(self.index, str):
            expect_option("index", self.index, (EACH_VISIT, FIRST_VISIT))
        else:
            object.__setattr__(self, "index", IndexDates.of(self.index))
        expect_option("prior_outcome", self.prior_outcome, ("exclude", "allow"))
        expect_option("prediction_day", self.prediction_day, ("included", "excluded"))
        if self.end_of_observation is not None:
            expect_option("end_of_observation", self.end_of_observation, ("period", "last_event"))
        for name in ("washout_days", "gap_days", "min_observation_days"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0, MOST_DAYS))
        if self.time_at_risk_days is not None:
            most = integer("time_at_risk_days", self.time_at_risk_days, 1, MOST_DAYS)
            object.__setattr__(self, "time_at_risk_days", most)
            if self.min_observation_days > most:
                raise ValueError(
                    f"min_observation_days: expected at most time_at_risk_days={most}, got "
                    f"{self.min_observation_days}"
                )
        if self.prediction_day == "excluded" and self.index == EACH_VISIT:
            raise ValueError(
                "prediction_day: expected 'included' with index='each_visit', where every visit "
                "is predicted from, and seen"
            )

    @property
    def is_death(self) -> bool:
        """Whether the outcome is death."""
        return self.codes == DEATH

    @property
    def name(self) -> str:
        """The outcome in a few words."""
        if self.is_death:
            return DEATH
        assert not isinstance(self.codes, (str, int))
        named = [str(code) for code in self.codes or ()]
        named += [f"{prefix}*" for prefix in self.prefix or ()]
        return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")

    @property
    def causes(self) -> tuple[str, ...]:
        """The names of the outcome and of those that compete with it; empty without such."""
        return () if self.competing is None else (self.name, *(name for name, _ in self.competing))

    def _competing(self, given: Any) -> tuple[tuple[str, str | tuple[str | int, ...]], ...] | None:
        """Names and codes of the outcomes that compete."""
        if given is None:
            return None
        if isinstance(given, (str, numbers.Integral)):
            given = [given]
        if isinstance(given, Mapping):
            pairs = list(given.items())
        elif isinstance(given, bytes) or not hasattr(given, "__iter__"):
            raise TypeError(
                f"competing: expected codes or a mapping of names to codes, got "
                f"{type(given).__name__}"
            )
        else:
            listed = list(given)
            named = all(isinstance(one, tuple) and len(one) == 2 for one in listed)
            pairs = listed if named else [(str(one), one) for one in listed]
        found = []
        for name, codes in pairs:
            of_it = _codes(codes)
            if of_it is None:
                raise ValueError(f"competing: expected codes of {name!r}, got none")
            found.append((str(name), of_it))
        names = [self.name, *(name for name, _ in found)]
        if not found or len(found) > MOST_COMPETING or len(set(names)) < len(names):
            raise ValueError(
                f"competing: expected 1 to {MOST_COMPETING} outcomes of other names than "
                f"{self.name!r} and than each other, got {names[1:]}"
            )
        if sum(codes == DEATH for codes in (self.codes, *(codes for _, codes in found))) > 1:
            raise ValueError("competing: expected death once, got it as two outcomes")
        return tuple(found)


def _codes(codes: Any) -> str | tuple[str | int, ...] | None:
    if codes is None or (isinstance(codes, str) and codes == DEATH):
        return codes
    listed = [codes] if isinstance(codes, (str, numbers.Integral)) else codes
    if isinstance(listed, (Mapping, bytes)) or not hasattr(listed, "__iter__"):
        raise TypeError(f"codes: expected codes or 'death', got {type(codes).__name__}")
    plain: list[str | int] = []
    for code in listed:
        if isinstance(code, bool) or not isinstance(code, (str, numbers.Integral)):
            raise TypeError(f"codes: expected strings or integers, got {type(code).__name__}")
        plain.append(code if isinstance(code, str) else int(code))
    if not plain:
        raise ValueError("codes: expected at least one code, got none")
    return tuple(plain)


def _prefixes(prefix: Any) -> tuple[str, ...] | None:
    if prefix is None:
        return None
    listed = (prefix,) if isinstance(prefix, str) else tuple(prefix)
    for one in listed:
        if not isinstance(one, str):
            raise TypeError(f"prefix: expected strings, got {type(one).__name__}")
    if not listed or "" in listed:
        raise ValueError(f"prefix: expected strings that are not empty, got {list(listed)}")
    return listed

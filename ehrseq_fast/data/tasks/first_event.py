"""The task of predicting somebody's first event: who is at risk, from when, until when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .dates import IndexDates
from .labels import labels
from .outcomes import Outcomes
from .population import study_population
from .settings import Settings

if TYPE_CHECKING:
    from ..store import EventStore


@dataclass(frozen=True)
class FirstEvent(Settings):
    """The first occurrence of a code, or death, within a time at risk.

    The settings are those of OHDSI's PatientLevelPrediction (``PopulationSettings``), in whole days
    of UTC. The index day is day 0; the risk window is days ``gap_days + 1`` to ``gap_days +
    time_at_risk_days`` after it. Outcomes of the index day itself are never in it: within a day the
    order is unknown.

    ``index="each_visit"`` follows a person from the first visit after ``washout_days`` of
    observation (the index) to the first outcome or the end of observation, and predicts at each
    visit on the way: the hazard at visit t, which sees the visits up to t, is that of the event at
    visit t + 1. Visits before the index are seen, but not at risk. ``"first_visit"`` and dates make
    one prediction, from the visits up to the index date.

    What is seen never holds a code recorded on the day of the outcome or later: the first visit
    with such a code, and all after it, are cut, also a stay that began long before. An outcome
    recorded in the course of a visit counts at its start.

    With ``competing`` outcomes the first of all of them counts, and ends the time at risk:
    ``event_types`` says which it was, 1 for ``codes``, 2, 3, ... for the others in their order.
    What is said of an outcome holds for each of them; so ``prior_outcome="exclude"`` removes who
    had any. Of several on one day, whose order is unknown, the first in that order counts.

    Args:
        codes: one or several codes of the store's dictionary, or ``"death"``. (A code of that name
            can be given in a list.)
        prefix: codes that begin with this, or with one of these; together with ``codes``, either.
        index: ``"each_visit"``, ``"first_visit"`` (the first within an observation period), a
            mapping of subject ids to dates (or a pandas ``Series`` with them as its index), MEDS
            label files (:func:`labels`), whose prediction times are taken, or datetime64
            ``[n_patients]``, NaT for whom there is none.
        washout_days: least observation before the index, in the same observation period.
        prior_outcome: ``"exclude"`` removes persons with an outcome at any time before the risk
            window, on the index day and in the gap too; ``"allow"`` keeps them, and predicts the
            first outcome in the window (but not of death: the dead are at risk of nothing).
        gap_days: the risk window begins so many days later.
        time_at_risk_days: its length, after which a person is censored; None: to the end of
            observation.
        min_observation_days: persons who are observed for fewer days of the risk window are removed
            unless the outcome was seen in it.
        end_of_observation: ``"period"``: the end of the observation period that holds the index, or
            death; ``"last_event"``: the last visit of the record, or death. Persons without an
            observation period are removed under ``"period"``. None: ``"period"`` where the store
            has observation periods, else ``"last_event"``, which ``Outcomes.warnings`` tells.
        prediction_day: whether what was recorded on the day of an index date is seen.
            ``"included"``: up to and including the very time (as MEDS has it), of a date without a
            time all of the day; ``"excluded"``: only days before. A visit with later codes is not
            seen, nor are those after it.
        competing: outcomes that compete with ``codes``: a mapping of names to codes, or to
            ``"death"``; a code, or a list of codes each of which is an outcome.

    Death, where it is not the outcome, ends observation; events recorded on later days are not
    used. Death as the outcome needs no visit: the last visit before its day is ``event_times``.

    Raises:
        ValueError, TypeError: settings that are not as above.

    Example:
        >>> FirstEvent("I21", time_at_risk_days=365, washout_days=180).to_dict()
        {'codes': ['I21'], 'washout_days': 180, 'time_at_risk_days': 365}
        >>> FirstEvent("I21", competing={"stroke": ["I63", "I64"], "death": "death"}).causes
        ('I21', 'stroke', 'death')
    """

    def apply(self, store: EventStore, split: str | None = None) -> Outcomes:
        """The study population of one split, or of the whole store, and its outcomes.

        Tells by :class:`SameDayWarning` where the order of an outcome and of other events of its
        day is unknown.

        Raises:
            ValueError: no such split, an outcome that nobody in the store has,
                ``end_of_observation="period"`` of a store without observation periods.
            LookupError: a code that the store's dictionary lacks, with near ones.
        """
        return study_population(self, store, split)

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not the defaults, as YAML and JSON hold them."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, IndexDates):
                value = value.to_dict()
            if field.name == "competing":
                value = {
                    name: list(codes) if isinstance(codes, tuple) else codes
                    for name, codes in value
                }
            chosen[field.name] = list(value) if isinstance(value, tuple) else value
        return chosen

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FirstEvent:
        """From a mapping such as :meth:`to_dict` gives. ``index`` may be ``{"labels": path}``.

        Raises:
            ValueError: a setting that there is not.

        Example:
            >>> FirstEvent.from_dict({"codes": "death", "gap_days": 30}).name
            'death'
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"task: expected settings of {', '.join(known)}, got {', '.join(map(str, unknown))}"
            )
        settings = dict(values)
        index = settings.get("index")
        if isinstance(index, Mapping) and set(index) == {"labels"}:
            settings["index"] = labels(index["labels"])
        return cls(**settings)

"""The options of the survival losses, as one object behind the public functions."""

from __future__ import annotations

from typing import NamedTuple

from ..checks import expect_option
from .operators import LINKS, REDUCTIONS

CENSORED_VISITS = ("excluded", "included")


class Options(NamedTuple):
    """What a loss computes; a new option is a field here, and an argument of the public functions.

    Attributes:
        link: what hazards are: ``"probabilities"``, or logits of ``"sigmoid"``, ``"softmax"`` or
            ``"cloglog"``.
        censored_visit: whether the visit of censoring counts as survived: ``"excluded"`` or
            ``"included"``.
        eps: probabilities are clamped to ``[eps, 1 - eps]``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over patients.
    """

    link: str = "probabilities"
    censored_visit: str = "excluded"
    eps: float = 1e-7
    reduction: str = "mean"

    @classmethod
    def of(cls, *, from_logits: bool = False, link: str = "sigmoid", **others: object) -> Options:
        """Those that the public functions are called with."""
        return cls(link if from_logits else "probabilities", **others)  # type: ignore[arg-type]

    def check(self) -> None:
        """``ValueError`` for unknown options."""
        if type(self.censored_visit) is not str or self.censored_visit not in CENSORED_VISITS:
            expect_option("censored_visit", self.censored_visit, CENSORED_VISITS)
        if type(self.reduction) is not str or self.reduction not in REDUCTIONS:
            expect_option("reduction", self.reduction, REDUCTIONS)
        if not 0 <= self.eps < 0.5:
            raise ValueError(f"eps: expected 0 <= eps < 0.5, got {self.eps}")

    def numbered(self) -> tuple[int, bool, float, int]:
        """As the operators take them."""
        included = self.censored_visit == "included"
        return LINKS[self.link], included, float(self.eps), REDUCTIONS[self.reduction]


DEFAULTS = Options()

"""What results of usual arguments do not show of a ``forward``: ``accelerate`` leaves a model that
draws random numbers, writes to arguments, drops elsewhere, or changes what is extreme; and goes
back to a model's own ``forward`` where its class or its file were changed since."""

from __future__ import annotations

import copy
import pickle
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from ehrseq_fast import accelerate, restore
from ehrseq_fast.models import fused_forward

from . import plain_models
from .dropin_models import Pool
from .model_cases import VOCAB
from .test_dropin import is_served
from .test_dropin_compared import Survival, assert_same, batch, made

SCALE = 1.0
GENERATOR = np.random.default_rng(0)


# Random numbers, arguments, codes -----------------------------------------------------------------


class Augmented(Survival):
    """Leaves out all codes of a batch now and then, which few trials would show."""

    draw = staticmethod(lambda: float(torch.rand(())))

    def forward(self, codes, visit_mask, sequence_mask):
        if self.training and self.draw() < 1e-6:
            visit_mask = visit_mask * 0
        return super().forward(codes, visit_mask, sequence_mask)


class AugmentedByPython(Augmented):
    draw = staticmethod(random.random)


class AugmentedByNumPy(Augmented):
    draw = staticmethod(np.random.random)


class AugmentedByOwn(Augmented):
    @staticmethod
    def draw():
        return GENERATOR.random()


class Writing(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        visit_mask[:, :, 0] = 0
        return super().forward(codes, visit_mask, sequence_mask)


class WithUnknown(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        known = (codes >= 0) & (codes < VOCAB)
        return super().forward(torch.where(known, codes, 1), visit_mask, sequence_mask)


class CutToLongest(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        longest = int(sequence_mask.sum(1).max())
        return super().forward(codes, visit_mask, sequence_mask)[:, :longest]


class FromOneSide(Survival):
    """As is written where a logarithm is taken."""

    least, most = 1e-12, 1.0

    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        return torch.where(sequence_mask != 0, hazards.clamp(self.least, self.most), 0)


class FromAbove(FromOneSide):
    least, most = 0.0, 1 - 1e-7


class OfClampedGradients(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        if states.requires_grad:
            states.register_hook(lambda gradient: gradient.clamp(-10, 10))
        return self.hazard_head(states)[..., 0] * sequence_mask


class OfOneVisit(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        return hazards.squeeze(1)


class ClampedTime(plain_models.SurvivalLSTMWithTime):
    def forward(self, codes, visit_mask, sequence_mask, time_features=None):
        if time_features is not None:
            time_features = time_features.clamp(max=3650)
        return super().forward(codes, visit_mask, sequence_mask, time_features)


class FilledTime(plain_models.SurvivalLSTMWithTime):
    def forward(self, codes, visit_mask, sequence_mask, time_features=None):
        if time_features is not None:
            time_features = torch.where(time_features.isnan(), 0, time_features)
        return super().forward(codes, visit_mask, sequence_mask, time_features)


def generators():
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


DRAWS = "draws random numbers of its own"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Augmented, DRAWS),
        (AugmentedByPython, DRAWS),
        (AugmentedByNumPy, DRAWS),
        (AugmentedByOwn, r"reads what may change unseen.* \(GENERATOR\)"),
        (Writing, "writes to its arguments"),
        (WithUnknown, "takes codes outside its embedding"),
        (CutToLongest, "something else of padding behind all visits"),
        (FromOneSide, "changes probabilities near 0 or 1|computes something else"),
        (FromAbove, "changes probabilities near 0 or 1|computes something else"),
        (OfClampedGradients, "its gradients are others"),
        (OfOneVisit, "something else of many visits or codes"),
        (ClampedTime, "changes time features"),
        (FilledTime, "changes time features"),
    ],
)
def test_what_is_left_for_what_usual_results_do_not_show(kind, reason):
    model = made(kind)
    before = generators()
    reasons = {entry.name: entry.reason for entry in accelerate(model).left}
    assert type(model) is kind
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons[""])
    assert generators() == before


def test_a_pool_that_takes_other_codes():
    class Clamped(Pool):
        def forward(self, codes, mask):
            return super().forward(codes.clamp(min=0), mask)

    (left,) = accelerate(Clamped("mean")).left
    assert "takes codes outside its embedding" in left.reason


# Dropout ------------------------------------------------------------------------------------------


class DroppingBefore(plain_models.LSTMBaseline):
    """Whose dropout is before the layer, and of as many numbers where V · E = H."""

    at = 0

    def forward(self, codes, visit_mask, sequence_mask, return_hidden=False):
        rows = self.embedding(codes).flatten(0, 1)
        vectors = self.visit_encoder(rows, visit_mask.flatten(0, 1)).unflatten(0, codes.shape[:2])
        vectors = self.dropout(vectors) if self.at == 0 else vectors
        states, _ = self.lstm(vectors)
        states = states * sequence_mask.unsqueeze(-1)
        last = (sequence_mask != 0).sum(1) - 1
        ends = states[torch.arange(len(codes)), last]
        for _ in range(self.at):
            ends = self.dropout(ends)
        logits = self.fc(ends)
        output = {"logits": logits, "predictions": self.activation(logits)}
        longest = int(last.max()) + 1
        return output | {"hidden_states": states[:, :longest]} if return_hidden else output


class DroppingOnce(DroppingBefore):
    at = 1


class DroppingTwice(DroppingBefore):
    at = 2


class EncoderOfDropped(plain_models.VisitEncoder):
    def forward(self, embeddings, mask=None):
        dropout, self._modules["dropout"] = self.dropout, nn.Identity()
        try:
            return super().forward(dropout(embeddings), mask)
        finally:
            self._modules["dropout"] = dropout


class Twice(plain_models.VisitEncoder):
    def forward(self, embeddings, mask=None):
        return self.dropout(super().forward(embeddings, mask))


@pytest.mark.parametrize("kind", [EncoderOfDropped, Twice])
def test_visit_encoders_that_drop_something_else(kind):
    (left,) = accelerate(kind(6)).left
    assert "drops something else in training" in left.reason


class HeadWithoutDropout(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        first, relu, _, last, sigmoid = self.hazard_head
        return sigmoid(last(relu(first(states))))[..., 0] * sequence_mask


class HeadOfDropped(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        first, relu, dropout, last, sigmoid = self.hazard_head
        return sigmoid(last(relu(first(dropout(states)))))[..., 0] * sequence_mask


@pytest.mark.parametrize("kind", [HeadWithoutDropout, HeadOfDropped, DroppingBefore, DroppingTwice])
def test_models_that_drop_something_else(kind):
    reasons = {entry.name: entry.reason for entry in accelerate(made(kind)).left}
    assert "drops something else in training" in reasons[""]


def test_a_model_that_drops_where_the_reference_does():
    model, plain = made(DroppingOnce), made(DroppingOnce)
    assert not accelerate(model).left
    assert_same(model, plain, *batch(fewest_codes=1))


# What is changed since, outside of the module -----------------------------------------------------


def scaled(hazards):
    return hazards * SCALE


def holding(power):
    """A function with a value of its own, and that value's cell."""

    def raised(hazards):
        return hazards**power

    return raised, raised.__closure__[0]


raised, POWER = holding(1.0)


class OfItsFile(Survival):
    factor = 1.0
    settings = types.SimpleNamespace(shift=0.0)

    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        return raised(scaled(hazards)) * self.factor + self.settings.shift


def without_codes(self, codes, visit_mask):
    return Survival.vectors(self, codes, visit_mask) * 0


HERE = __name__
CHANGES = {
    "forward": lambda patch: patch.setattr(
        OfItsFile, "forward", lambda self, *given: Survival.forward(self, *given) / 2
    ),
    "forward of a parent": lambda patch: patch.setattr(
        Survival, "forward", lambda self, codes, mask, real: real * 0.25
    ),
    "a method": lambda patch: patch.setattr(OfItsFile, "vectors", without_codes, raising=False),
    "a method of a parent": lambda patch: patch.setattr(
        Survival, "vectors", lambda self, codes, mask: self.embedding(codes).sum(2)
    ),
    "a value of the class": lambda patch: patch.setattr(OfItsFile, "factor", 0.5),
    "in an object of the class": lambda patch: patch.setattr(OfItsFile.settings, "shift", 1.0),
    "a value of the file": lambda patch: patch.setattr(f"{HERE}.SCALE", 3.0),
    "a function of the file": lambda patch: patch.setattr(f"{HERE}.scaled", lambda h: h * 5),
    "a value that a function holds": lambda patch: patch.setattr(POWER, "cell_contents", 2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_of_the_class_or_the_file(change, monkeypatch):
    model, plain = made(OfItsFile), made(OfItsFile)
    assert not accelerate(model).left
    before = plain(*batch())
    assert is_served(model, *batch())
    assert_same(model, plain, *batch())
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        assert not torch.allclose(plain(*batch()), before)
        assert torch.equal(model(*batch()), plain(*batch()))  # of its own forward: to the bit
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(*batch()), plain(*batch()))
        assert torch.equal(copy.deepcopy(model)(*batch()), plain(*batch()))
        assert "restore, then accelerate" in accelerate(model).left[0].reason
        other = made(OfItsFile)
        accelerate(other)  # compared with what it now is
        assert_same(other, plain, *batch())
    assert is_served(model, *batch())  # as it was
    assert_same(model, plain, *batch())


def test_a_file_of_a_class_that_was_edited_since(monkeypatch):
    model, plain = made(OfItsFile), made(OfItsFile)
    accelerate(model)
    saved = pickle.dumps(model)
    CHANGES["forward of a parent"](monkeypatch)
    monkeypatch.setattr(fused_forward, "_MADE", {})  # as in another process
    with pytest.warns(UserWarning, match="its class was changed since accelerate compared it"):
        loaded = pickle.loads(saved)
    assert torch.equal(loaded(*batch()), plain(*batch()))
    restore(loaded)
    assert type(loaded) is OfItsFile


def test_a_file_in_another_process(monkeypatch):
    model = made(OfItsFile)
    accelerate(model)
    saved = pickle.dumps(model)
    monkeypatch.setattr(fused_forward, "_MADE", {})
    loaded = pickle.loads(saved)
    assert is_served(loaded, *batch())
    assert torch.equal(loaded(*batch()), model(*batch()))

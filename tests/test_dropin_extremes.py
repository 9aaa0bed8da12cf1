"""Models that compute what the fused forward pass does on usual numbers alone: ``accelerate``
leaves those that do something else of visits without a code, of large numbers, in another
precision, or that keep something on a part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ehrseq_fast import accelerate

from . import plain_models
from .dropin_models import Pool
from .test_dropin import is_served, vectors_and_mask
from .test_dropin_compared import Survival, assert_same, batch, made


class OfWholeRecords(Survival):
    """A patient without any code is the row of code 1."""

    def vectors(self, codes, visit_mask):
        empty = (visit_mask == 0).flatten(1).all(1)[:, None, None]
        return torch.where(empty, self.embedding.weight[1], super().vectors(codes, visit_mask))


class OfFirstVisits(Survival):
    def vectors(self, codes, visit_mask):
        vectors = super().vectors(codes, visit_mask).clone()
        vectors[(visit_mask[:, 0] == 0).all(1), 0] = 1
        return vectors


class OfBoundedVectors(Survival):
    def vectors(self, codes, visit_mask):
        vectors = super().vectors(codes, visit_mask)
        return torch.where(vectors.isfinite(), vectors.clamp(-1e4, 1e4), vectors)


class OfBoundedUnits(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        first, relu, dropout, last, sigmoid = self.hazard_head
        units = relu(first(states)).clamp(max=500)
        return sigmoid(last(dropout(units)))[..., 0] * sequence_mask


class WithoutInfinity(Survival):
    def vectors(self, codes, visit_mask):
        vectors = super().vectors(codes, visit_mask)
        return vectors.masked_fill(vectors.isinf(), 0)


class OnAutocast(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(codes, visit_mask, sequence_mask.float())


class OffAutocast(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        with torch.autocast("cpu", enabled=False):
            return super().forward(codes, visit_mask, sequence_mask)


class KeepingOnPart(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        states, self.lstm.final = self.lstm(self.vectors(codes, visit_mask))
        return self.hazard_head(states)[..., 0] * sequence_mask


class OfOptionOnPart(Survival):
    def vectors(self, codes, visit_mask):
        scale = getattr(self.embedding, "scale", 1.0)
        return super().vectors(codes, visit_mask) * scale


WITHOUT = "something else, or nothing, of visits without a code"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OfWholeRecords, WITHOUT),
        (OfFirstVisits, WITHOUT),
        (OfBoundedVectors, "changes large or small numbers"),
        (OfBoundedUnits, "changes large or small numbers"),
        (WithoutInfinity, "hides an infinity"),
        (OnAutocast, "something else in float32"),
        (OffAutocast, "turns autocast off"),
        (KeepingOnPart, r"sets attributes \(lstm.final\)"),
        (OfOptionOnPart, r"reads what may change unseen, .* \(embedding.scale\)"),
    ],
)
def test_models_that_are_left(kind, reason):
    reasons = {entry.name: entry.reason for entry in accelerate(made(kind)).left}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons[""])


class ForEmpty(Pool):
    def forward(self, codes, mask):
        empty = (mask == 0).all(-1, keepdim=True)
        return torch.where(empty, self.codes.weight[1], super().forward(codes, mask))


class LeastOfEmpty(Pool):
    def forward(self, codes, mask):
        return self.codes(codes).masked_fill(mask.unsqueeze(-1) == 0, -1e9).max(-2).values


class RefusingEmpty(Pool):
    def forward(self, codes, mask):
        assert (mask != 0).any(-1).all()
        return super().forward(codes, mask)


class DividingTies(Pool):
    def forward(self, codes, mask):
        return self.codes(codes).masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(-2)


class OfOneVisit(Pool):
    def forward(self, codes, mask):
        pooled = super().forward(codes, mask)
        return pooled.squeeze(1) if codes.dim() == 3 else pooled


class Bounded(Pool):
    def forward(self, codes, mask):
        return super().forward(codes, mask).clamp(-1e4, 1e4)


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        (ForEmpty, "mean", WITHOUT),
        (ForEmpty, "max", WITHOUT),
        (LeastOfEmpty, "max", WITHOUT),
        (RefusingEmpty, "mean", WITHOUT),
        (DividingTies, "max", "gradient of equal codes"),
        (OfOneVisit, "mean", "of many codes, or of few"),
        (Bounded, "sum", "changes large or small numbers"),
    ],
)
def test_pools_that_are_left(kind, how, reason):
    (left,) = accelerate(kind(how)).left
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(left.reason)


def test_what_is_zeros_by_intention_is_told():
    (replaced,) = accelerate(Pool("max")).replaced
    assert replaced.note == "a visit without a code gives zeros"
    assert accelerate(Pool("mean")).replaced[0].note == ""


class EncoderThatKeeps(plain_models.VisitEncoder):
    def forward(self, embeddings, mask=None):
        self.last = embeddings.detach()
        return super().forward(embeddings, mask)


def test_a_visit_encoder_that_keeps_something():
    model = made(plain_models.LSTMBaseline)
    model.visit_encoder.__class__ = EncoderThatKeeps
    reasons = {entry.name: entry.reason for entry in accelerate(model).left}
    assert "sets attributes (visit_encoder.last)" in reasons[""]
    model(*batch())
    assert model.visit_encoder.last.dim() == 3


# Sparse gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
def test_rows_of_sparse_gradients(padding):
    """SparseAdam changes every row that is listed, those of padded slots too."""
    codes, visit_mask, sequence_mask = batch()
    codes = codes.masked_fill(~(visit_mask & sequence_mask[..., None]), padding)
    for plain, given in (
        (made(Survival), (codes, visit_mask, sequence_mask)),
        (Pool("mean"), (codes, visit_mask & sequence_mask[..., None])),
    ):
        next(plain.children()).sparse = True
        model = copy.deepcopy(plain)
        assert not accelerate(model).left
        assert is_served(model, *given) is (padding == 0)
        tables = [next(each.children()).weight for each in (model, plain)]
        for each, table in zip((model, plain), tables, strict=True):
            optimizer = torch.optim.SparseAdam([table], 0.1)
            for mask in (given[1], given[1] & (codes != 3)):  # row 3 has moments by then
                each.zero_grad()
                each(codes, mask, *given[2:]).sum().backward()
                optimizer.step()
        torch.testing.assert_close(*tables)


# Exact classes ------------------------------------------------------------------------------------


class OfExactClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, vectors, mask):
        _, final = self.rnn(vectors)
        return self.last(final)

    def last(self, final):
        return (final[0] if type(self.rnn) is nn.LSTM else final)[-1]


class OfItsName(OfExactClass):
    def last(self, final):
        return (final[0] if self.rnn.__class__.__name__ == "LSTM" else final)[-1]


KINDS = {nn.LSTM: 0, nn.GRU: slice(None)}


class OfKinds(OfExactClass):
    def last(self, final):
        return final[KINDS[type(self.rnn)]][-1]


@pytest.mark.parametrize("kind", [OfExactClass, OfItsName, OfKinds])
def test_layers_of_whose_exact_class_a_forward_asks(kind):
    model = nn.Sequential(kind())
    plain = copy.deepcopy(model)
    report = accelerate(model)
    assert "asks for its exact class" in report.left[0].reason
    given = vectors_and_mask()
    assert_same(model[0], plain[0], *given)

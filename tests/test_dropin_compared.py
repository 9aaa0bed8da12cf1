"""Models that differ from what ``accelerate`` puts in their place in one thing alone: left as they
are, or served by their own ``forward`` where the difference is."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ehrseq_fast import PackedVisits, accelerate, restore

from . import plain_models
from .dropin_models import Pool
from .model_cases import SIZE, VOCAB, build_plain, ragged_batch
from .test_dropin import is_served


def batch(**options):
    codes, visit_mask, sequence_mask = ragged_batch(**options)
    return codes, visit_mask, sequence_mask


def made(kind, **options):
    torch.manual_seed(0)
    return kind(VOCAB, **SIZE, **options).eval()


def assert_same(model, plain, *given, **options):
    ours, theirs = model(*given, **options), plain(*given, **options)
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
    for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        torch.testing.assert_close(one, other)


def tensors_of(output):
    return list(output.values()) if isinstance(output, dict) else [output]


class Survival(plain_models.SurvivalLSTM):
    least = 1.0

    def vectors(self, codes, visit_mask):
        weights = visit_mask.unsqueeze(-1)
        count = visit_mask.sum(2, keepdim=True).clamp(min=self.least)
        return (self.embedding(codes) * weights).sum(2) / count

    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        return self.hazard_head(states)[..., 0] * sequence_mask


# What the model is left for ----------------------------------------------------------------------


class WithoutCode(Survival):
    code = 1

    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes, visit_mask * (codes != self.code), sequence_mask)


class OfFirstCodes(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes[..., :512], visit_mask[..., :512], sequence_mask)


class WithOldStates(Survival):
    """Whose hazards do not change from visit 256 on."""

    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        rest = hazards[:, 255:256].expand(-1, max(hazards.shape[1] - 256, 0))
        return torch.cat([hazards[:, :256], rest], 1) * sequence_mask


class Collecting(Survival):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.collected = {}

    def forward(self, codes, visit_mask, sequence_mask):
        hazards = super().forward(codes, visit_mask, sequence_mask)
        self.collected["hazards"] = hazards
        return hazards


class WithTensor(Survival):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = torch.ones(())

    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes, visit_mask, sequence_mask) * self.scale


class WithArray(Survival):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = np.ones(())

    def forward(self, codes, visit_mask, sequence_mask):
        return super().forward(codes, visit_mask, sequence_mask) * float(self.scale)


class OtherWithoutStates(plain_models.LSTMBaseline):
    def forward(self, codes, visit_mask=None, sequence_mask=None, return_hidden=False):
        output = super().forward(codes, visit_mask, sequence_mask, return_hidden)
        return output if return_hidden else {"logits": output["logits"]}


@pytest.mark.parametrize("code", [0, 1, 2, 7, VOCAB // 2, VOCAB - 1])
def test_a_model_that_leaves_a_code_out(code):
    kind = type(f"Without{code}", (WithoutCode,), {"code": code})
    (left,) = accelerate(made(kind)).left
    assert "computes something else" in left.reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OfFirstCodes, "computes something else of many visits or codes"),
        (WithOldStates, "computes something else of many visits or codes"),
        (Collecting, r"sets attributes \(collected\)"),
        (WithTensor, r"reads what may change unseen, as a tensor or an array \(scale\)"),
        (WithArray, r"reads what may change unseen, as a tensor or an array \(scale\)"),
        (OtherWithoutStates, "returns something else without hidden states"),
    ],
)
def test_models_that_are_left(kind, reason):
    reasons = {entry.name: entry.reason for entry in accelerate(made(kind)).left}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reasons[""])


def test_a_pool_that_cuts_codes_off():
    class OfFirst(Pool):
        def forward(self, codes, mask):
            return super().forward(codes[..., :100], mask[..., :100])

    (left,) = accelerate(OfFirst("mean")).left
    assert "something else of many codes" in left.reason


# What only some arguments are served for ---------------------------------------------------------


class AnyWeights(Survival):
    least = 1e-9


class Rounded(Survival):
    def vectors(self, codes, visit_mask):
        return super().vectors(codes, visit_mask.bool())


@pytest.mark.parametrize("kind", [AnyWeights, Rounded])
def test_fractional_masks_that_mean_something_else(kind):
    model, plain = made(kind), made(kind)
    accelerate(model)
    codes, visit_mask, sequence_mask = batch()
    for mask in (visit_mask, visit_mask.float(), visit_mask.long()):
        assert is_served(model, codes, mask, sequence_mask)
        assert_same(model, plain, codes, mask, sequence_mask)
    for mask in (visit_mask * 0.1, visit_mask * torch.rand(visit_mask.shape), visit_mask * 2):
        mask[0, 0, 0] = 1
        assert not is_served(model, codes, mask, sequence_mask)
        assert_same(model, plain, codes, mask, sequence_mask)


class WithBool(Survival):
    """As many are written: ``~mask`` of anything but bool is not its negation."""

    def forward(self, codes, visit_mask, sequence_mask):
        rows = self.embedding(codes).masked_fill(~visit_mask.unsqueeze(-1), 0)
        vectors = rows.sum(2) / visit_mask.sum(2, keepdim=True).clamp(min=1)
        hazards = self.hazard_head(self.lstm(vectors)[0])[..., 0]
        return hazards.masked_fill(~sequence_mask, 0)


class WithNumbers(Survival):
    def forward(self, codes, visit_mask, sequence_mask):
        padded = 1 - sequence_mask  # refused for bool
        return super().forward(codes, visit_mask, 1 - padded)


def test_masks_of_the_kind_that_a_model_takes():
    codes, visit_mask, sequence_mask = batch()
    for kind, takes_bool in ((WithBool, True), (WithNumbers, False)):
        model, plain = made(kind), made(kind)
        assert not accelerate(model).left
        masks = visit_mask, sequence_mask
        numbers = visit_mask.int(), sequence_mask.float()
        assert is_served(model, codes, *masks) is takes_bool
        assert is_served(model, codes, *numbers) is not takes_bool
        assert_same(model, plain, codes, *(masks if takes_bool else numbers))
        if not takes_bool:
            wide = visit_mask.long(), sequence_mask.double()  # of which hazards are float64
            assert_same(model, plain, codes, *wide)


class MasksOfCodes(plain_models.LSTMBaseline):
    def forward(self, codes, visit_mask=None, sequence_mask=None, return_hidden=True):
        if visit_mask is None:
            visit_mask = codes != 0
        if sequence_mask is None:
            sequence_mask = visit_mask.any(2)
        return super().forward(codes, visit_mask, sequence_mask, return_hidden)


def test_arguments_left_out():
    model, plain = made(MasksOfCodes), made(MasksOfCodes)
    accelerate(model)
    codes, visit_mask, sequence_mask = batch(fewest_codes=1)
    codes = codes.clamp(min=1) * visit_mask
    assert is_served(model, codes, visit_mask, sequence_mask)
    for given in ((codes,), (codes, visit_mask), (codes, None, sequence_mask)):
        assert not is_served(model, *given)
        assert_same(model, plain, *given)
    assert "hidden_states" in model(codes, visit_mask, sequence_mask)  # its own default
    assert_same(model, plain, codes, visit_mask, sequence_mask)


class ByIndex(plain_models.SurvivalLSTMWithTime):
    def forward(self, codes, visit_mask, sequence_mask, time_features=None):
        if time_features is None:
            index = torch.arange(codes.shape[1]).expand(codes.shape[:2])
            time_features = index[..., None].expand(-1, -1, 3).to(self.embedding.weight.dtype)
        return super().forward(codes, visit_mask, sequence_mask, time_features)


def test_time_features_left_out():
    model, plain = made(ByIndex), made(ByIndex)
    accelerate(model)
    assert not is_served(model, *batch())
    assert_same(model, plain, *batch())
    features = torch.randn(*batch()[0].shape[:2], 3)
    assert is_served(model, *batch(), features)
    assert_same(model, plain, *batch(), features)


# What is changed since ----------------------------------------------------------------------------


class WithOptions(Survival):
    scale = 1.0  # of the class

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.temperature = 1.0
        self.flags = {"doubled": [False]}
        self.settings = SimpleNamespace(shift=0)
        self.epoch = 0  # not read

    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(self.vectors(codes, visit_mask))
        if self.flags["doubled"][0]:
            states = states * 2
        hazards = self.hazard_head(states / self.temperature + self.settings.shift)[..., 0]
        return hazards * sequence_mask * self.scale


CHANGES = {
    "an attribute": lambda model: setattr(model, "temperature", 2.0),
    "in a dict": lambda model: model.flags.update(doubled=[True]),
    "in a list": lambda model: model.flags["doubled"].__setitem__(0, True),
    "of an object": lambda model: setattr(model.settings, "shift", 1),
    "over the class": lambda model: setattr(model, "scale", 0.5),
    "a method": lambda model: setattr(model, "vectors", lambda c, m: model.embedding(c).sum(2)),
    "the layer": lambda model: setattr(
        model, "lstm", nn.LSTM(6, SIZE["hidden_dim"], batch_first=True, bidirectional=True)
    ),
}


def changed(model, change):
    torch.manual_seed(3)
    CHANGES[change](model)
    if change == "the layer":
        width = 2 * SIZE["hidden_dim"]
        model.hazard_head[0] = nn.Linear(width, SIZE["hidden_dim"])


@pytest.mark.parametrize("change", CHANGES)
def test_options_that_are_changed_later(change):
    model, plain = made(WithOptions), made(WithOptions)
    before = made(WithOptions)(*batch())
    accelerate(model)
    model.epoch = 3
    torch.testing.assert_close(model(*batch()), before)
    for each in (model, plain):
        changed(each, change)
    assert not torch.allclose(plain(*batch()), before)
    assert torch.equal(model(*batch()), plain(*batch()))  # of its own forward: to the bit
    with pytest.raises(TypeError, match=r"expected padded tensors .* an option was changed since"):
        model(PackedVisits.from_padded(*batch()))


def test_copies_stay_accelerated():
    model = made(WithOptions)
    kept = set(model.__dict__)
    accelerate(model)
    codes, visit_mask, sequence_mask = batch()
    codes = torch.where(visit_mask, codes, -1)  # which its own forward refuses
    expected = model(codes, visit_mask, sequence_mask)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(codes, visit_mask, sequence_mask), expected)
        assert restore(copied) == ("", "lstm")
        assert set(copied.__dict__) == kept
        with pytest.raises(IndexError):
            copied(codes, visit_mask, sequence_mask)


# Models that are nearly of a known structure -----------------------------------------------------


def test_a_model_that_is_nearly_known_is_told_of():
    for change, reason in (
        (lambda m: setattr(m, "decoder", nn.Linear(5, 2)), "no structure that is known"),
        (lambda m: m.register_buffer("shift", torch.zeros(1)), "of its own: shift"),
        (lambda m: setattr(m.embedding, "max_norm", 1.0), "its embedding has hooks"),
        (lambda m: m.hazard_head.__setitem__(1, nn.GELU()), "of other classes"),
    ):
        model = build_plain("survival")
        change(model)
        (left,) = accelerate(model).left
        assert reason in left.reason

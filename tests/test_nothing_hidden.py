"""A NaN or an infinity in a weight or a feature shows wherever plain PyTorch shows it.

The oracle is the padded path on one patient at a time, whose visits hold equally many codes: then
there is no padding that it could read.
"""

from __future__ import annotations

import math

import pytest
import torch

from .batches import from_lists
from .test_packed_models import VOCABULARY, build, reads_features

MODELS = ["survival, two layers", "with time", "competing risks", "baseline, sum", "baseline, max"]
MODELS += ["baseline, attention", "survival, GRU", "horizons"]
RECORDS = [
    [[1, 2], [3, 4], [5, 4]],
    [[6], [2]],
    [[7, 8, 9], [1, 10, 11], [3, 3, 5], [2, 2, 2]],
]
# what is planted, and at which end of a parameter
PLANTS = ((math.nan, 0), (math.inf, -1), (-math.inf, 0))


def batch(of=None):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return from_lists(
        RECORDS,
        vocab_size=VOCABULARY,
        visit_features=[torch.rand(len(visits), 3, generator=generator) for visits in RECORDS]
        if reads_features(of)
        else None,
        event_times=[2, 0, 1],
        event_indicators=[1, 0, 1],
        event_types=[2, 0, 1],
        targets={"labels": torch.tensor([1, 0, 1])},
        visit_targets={"days_to_end": [torch.arange(len(v), 0.0, -1) * 45 for v in RECORDS]},
    )


def outputs(model, packed):
    """What a model says of each patient: tensors by name, patients first."""
    if hasattr(model, "predict"):
        out = model(packed, return_hidden=True)
        return {"predictions": out["predictions"], "last state": out["hidden_states"].last()}
    found = {"hazards": model(packed).last()}
    if hasattr(model, "predict_survival"):
        survival, cumulative = model.predict_survival(packed)
        found |= {"survival": survival.last(), "cumulative": cumulative.last()}
    return found


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


def grown(model, packed):
    """The last visit's answer for each patient, by one step per visit."""
    answers = []
    for patient, visits in enumerate(RECORDS):
        state, rows = model.start(), packed.rows_of(patient)
        for codes, row in zip(visits, rows, strict=True):
            features = packed.visit_features[row : row + 1] if model._n_visit_features else None
            answer, state = model.step(state, codes, features)
        answers.append(answer["logits"] if isinstance(answer, dict) else answer)
    return torch.cat(answers)


def check(name, plant):
    """``plant(model, batch)`` gives the batch to run on."""
    fused, plain = build(name), build(name, path="padded")
    packed = plant(fused, batch(name))
    plant(plain, batch(name))
    alone = [packed[[patient]] for patient in range(len(RECORDS))]
    expected = {"loss": sum(plain.loss(one) for one in alone) / len(alone)}
    expected |= gradients(plain, expected["loss"])
    found = {"loss": fused.loss(packed)}
    found |= gradients(fused, found["loss"])
    with torch.no_grad():
        parts = [outputs(plain, one) for one in alone]
        expected |= {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        found |= outputs(fused, packed)
        answers = grown(fused, packed)
        is_baseline = hasattr(plain, "predict")
        expected["step"] = expected["predictions" if is_baseline else "hazards"]
        found["step"] = answers.sigmoid() if is_baseline else answers
    for key, wanted in expected.items():
        assert torch.equal(found[key].isnan(), wanted.isnan()), (
            f"{key}: NaN in {found[key].isnan().sum()} of {wanted.numel()} elements, and in "
            f"{wanted.isnan().sum()} in plain PyTorch"
        )
        torch.testing.assert_close(
            found[key], wanted.to(found[key].dtype), rtol=1e-4, atol=1e-6, equal_nan=True, msg=key
        )


def parameters():
    for name in MODELS:
        for key, _ in build(name).named_parameters():
            if not key.startswith(("hazard_heads.0", "hazard_heads.2")):
                yield pytest.param(name, key, id=f"{name}-{key}")


@pytest.mark.parametrize(("name", "key"), parameters())
def test_in_a_parameter(name, key):
    for value, place in PLANTS:

        def plant(model, packed, value=value, place=place):
            parameter = dict(model.named_parameters())[key]
            with torch.no_grad():
                if key == "embedding.weight":  # a code of one patient, one that stands twice
                    parameter[6 if place == 0 else 4, 1] = value
                else:
                    parameter.view(-1)[place] = value
            return packed

        check(name, plant)


@pytest.mark.parametrize("patient", range(3))
def test_in_a_feature(patient):
    for value, _ in PLANTS:

        def plant(model, packed, value=value):
            features = packed.visit_features.clone()
            features[packed.rows_of(patient)[-1], 1] = value
            return packed.with_features(features)

        check("with time", plant)


@pytest.mark.parametrize("name", ["survival", "competing risks", "baseline, max"])
def test_another_patients_numbers_stay(unemulated, name):
    """A code's NaN reaches the patients that have the code, and no other."""
    model = build(name)
    with torch.no_grad():
        model.embedding.weight[6] = math.nan
    out = model(batch(model))
    out = out["logits"] if isinstance(out, dict) else out.to_padded().flatten(1)
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()

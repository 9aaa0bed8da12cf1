"""The models that are tested, the plain models, and batches for both."""

from __future__ import annotations

import torch

from ehrseq_fast.models import (
    CompetingRisksSurvivalLSTM,
    DiscreteTimeSurvivalLSTM,
    DiscreteTimeSurvivalLSTMWithTime,
    LSTMBaseline,
)

from . import plain_models

VOCAB = 23
SIZE = {"embedding_dim": 6, "hidden_dim": 5}
AGGREGATIONS = ("mean", "sum", "max", "attention")

# name: (model, plain, constructor arguments)
VARIANTS = {
    "survival": (DiscreteTimeSurvivalLSTM, plain_models.SurvivalLSTM, {}),
    "survival-2-layers": (DiscreteTimeSurvivalLSTM, plain_models.SurvivalLSTM, {"num_layers": 2}),
    "survival-bidirectional": (
        DiscreteTimeSurvivalLSTM,
        plain_models.SurvivalLSTM,
        {"bidirectional": True, "num_layers": 2},
    ),
    "survival-gru": (
        DiscreteTimeSurvivalLSTM,
        plain_models.SurvivalLSTM,
        {"cell": "gru", "num_layers": 2},
    ),
    "with-time-gru": (
        DiscreteTimeSurvivalLSTMWithTime,
        plain_models.SurvivalLSTMWithTime,
        {"cell": "gru"},
    ),
    "baseline-gru": (LSTMBaseline, plain_models.LSTMBaseline, {"cell": "gru"}),
    "with-time": (
        DiscreteTimeSurvivalLSTMWithTime,
        plain_models.SurvivalLSTMWithTime,
        {"time_encoding_dim": 4},
    ),
    "with-time-2-layers": (
        DiscreteTimeSurvivalLSTMWithTime,
        plain_models.SurvivalLSTMWithTime,
        {"num_layers": 2},
    ),
    "competing-risks": (
        CompetingRisksSurvivalLSTM,
        plain_models.CompetingRisksLSTM,
        {"num_event_types": 3},
    ),
    "competing-risks-softmax": (
        CompetingRisksSurvivalLSTM,
        plain_models.CompetingRisksLSTM,
        {"num_event_types": 2, "link": "softmax"},
    ),
    "baseline-bidirectional": (
        LSTMBaseline,
        plain_models.LSTMBaseline,
        {"bidirectional": True, "task": "multi_class", "output_dim": 3},
    ),
    "baseline-1-layer": (
        LSTMBaseline,
        plain_models.LSTMBaseline,
        {"num_layers": 1, "task": "regression", "padding_idx": 2},
    ),
    **{
        f"baseline-{how}": (LSTMBaseline, plain_models.LSTMBaseline, {"visit_aggregation": how})
        for how in AGGREGATIONS
    },
}
# Padding before the last real visit of a backward LSTM is read by these paths and plain_models.
READS_PADDING = {
    ("survival-bidirectional", "padded"),
    ("baseline-bidirectional", "padded"),
}


def build(variant, path="fused", seed=0, **changes):
    kind, _, options = VARIANTS[variant]
    torch.manual_seed(seed)
    return kind(VOCAB, **SIZE, **(options | changes), path=path)


def build_plain(variant, seed=0, **changes):
    _, kind, options = VARIANTS[variant]
    torch.manual_seed(seed)
    return kind(VOCAB, **SIZE, **(options | changes))


def ragged_batch(lengths=(4, 1, 6, 3), visits=7, width=5, seed=1, fewest_codes=0):
    """Codes, masks: patients of these lengths, visits of ``fewest_codes`` to ``width`` codes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    lengths = torch.tensor(lengths)
    sequence_mask = torch.arange(visits) < lengths[:, None]
    counts = torch.randint(fewest_codes, width + 1, (len(lengths), visits), generator=generator)
    visit_mask = (torch.arange(width) < counts[..., None]) & sequence_mask[..., None]
    codes = torch.randint(1, VOCAB, visit_mask.shape, generator=generator) * visit_mask
    return codes, visit_mask, sequence_mask


def for_plain(variant, batch):
    """Without empty visits (padded ones too), where the reference gives NaN for them."""
    codes, visit_mask, sequence_mask = batch
    if variant in ("baseline-max", "baseline-attention"):
        visit_mask = visit_mask.clone()
        visit_mask[..., 0] = True
    return codes, visit_mask, sequence_mask


def output_of(model, batch, **more):
    """The model's output as one tensor, padded."""
    out = model(*batch, **more)
    return torch.cat([out["logits"], out["predictions"]], 1) if isinstance(out, dict) else out


def gradients(model, batch, **more):
    model.zero_grad()
    out = output_of(model, batch, **more)
    torch.manual_seed(5)
    (out * torch.rand(out.shape).to(out)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_close(actual, expected, relative=1e-5):
    assert actual.keys() == expected.keys()
    # The floor is for gradients that are 0 but for rounding, such as that of the last bias of the
    # attention, which moves all scores of a visit alike.
    floor = 1e-2 * torch.stack([wanted.norm() for wanted in expected.values()]).norm()
    for name, wanted in expected.items():
        error = (actual[name] - wanted).norm()
        assert error <= relative * torch.maximum(wanted.norm(), floor), (name, float(error))

"""Every parallel loop of the compiled CPU kernels on one to four threads, torch's and this
package's: the same bits. Under ``python -m tests.sanitized thread`` the same calls are searched for
races."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast import (
    PackedVisits,
    competing_risks_nll,
    discrete_time_survival_nll,
    masked_pool,
    packed_competing_risks_nll,
    packed_survival_nll,
    packed_visit_pool,
    visit_mean_pool,
)
from ehrseq_fast.hazard_head.op import hazard_head
from ehrseq_fast.linear.op import linear_layer
from tests.recurrent_layers import CELLS, flat
from tests.teams import team

pytestmark = pytest.mark.usefixtures("compiled")

VOCABULARY, WIDTH = 60, 24


@pytest.fixture(scope="module")
def batch():
    """Enough for each loop to be cut into several shares, and some codes that nearly all have."""
    generator = torch.Generator().manual_seed(0)
    patients = []
    for patient in range(300):
        length = 1 + int(40 * torch.rand(1, generator=generator) ** 3) + 30 * (patient % 50 == 0)
        visits = []
        for _ in range(length):
            count = int(torch.randint(0, 12, (1,), generator=generator))
            skewed = torch.rand(count, generator=generator) ** 3
            visits.append([0, 1, *(skewed * VOCABULARY).long().tolist()][: count + 1])
        patients.append(visits)
    times = [len(visits) - 1 for visits in patients]
    return PackedVisits.from_lists(
        patients,
        vocab_size=VOCABULARY,
        event_times=times,
        event_indicators=[patient % 2 for patient in range(300)],
        event_types=[patient % 4 for patient in range(300)],
    )


RUNS = ((1, "torch"), (2, "torch"), (3, "helpers"), (4, "torch"), (4, "helpers"))


def on_threads(compute):
    """Values and gradients on so many threads, which must be the same bits."""
    before, results = torch.get_num_threads(), []
    try:
        for count, name in RUNS:
            torch.set_num_threads(count)
            with team(name):
                results.append(compute())
    finally:
        torch.set_num_threads(before)
    for run, result in zip(RUNS[1:], results[1:], strict=True):
        for at, (one, other) in enumerate(zip(results[0], result, strict=True)):
            assert torch.equal(one, other), f"result {at} on {run[0]} threads ({run[1]})"


def both(value, *leaves):
    scale = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, scale)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("mode", ["mean", "sum", "max", "attention"])
def test_packed_pooling(batch, mode, dtype):
    table = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    scores = torch.randn(VOCABULARY).to(dtype).requires_grad_()
    given = {"scores": scores} if mode == "attention" else {}
    leaves = [table, scores] if given else [table]
    on_threads(lambda: both(packed_visit_pool(batch, table, mode=mode, **given), *leaves))
    if not given:
        on_threads(
            lambda: [
                x.to_dense() if x.is_sparse else x
                for x in both(packed_visit_pool(batch, table, mode=mode, sparse_grad=True), table)
            ]
        )


@DTYPES
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_padded_pooling(batch, mode, dtype):
    # so many slots that several threads build the index
    codes, mask = (torch.nn.functional.pad(tensor, (0, 24)) for tensor in batch.to_padded()[:2])
    table = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    for given in (mask, mask * 0.5):
        on_threads(lambda given=given: both(visit_mean_pool(codes, table, given, mode=mode), table))
    on_threads(
        lambda: [
            x.to_dense() if x.is_sparse else x
            for x in both(visit_mean_pool(codes, table, mask, mode=mode, sparse_grad=True), table)
        ]
    )
    embeddings = table.detach()[codes[:60]].requires_grad_()
    on_threads(lambda: both(masked_pool(embeddings, mask[:60], mode=mode), embeddings))


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("causes", [1, 3])
def test_losses(causes, reduction, dtype):
    patients, slots = 2000, 90
    lengths = torch.arange(patients) * 7 % slots + 1
    mask = torch.arange(slots) < lengths[:, None]
    batch = PackedVisits.from_lists([[[]] * int(n) for n in lengths])
    x = torch.randn(patients, slots, *([causes] if causes > 1 else [])).to(dtype).requires_grad_()
    rows = batch.pack(x.detach()).requires_grad_()
    types = torch.arange(patients) % (causes + 1)
    padded = competing_risks_nll if causes > 1 else discrete_time_survival_nll
    packed = packed_competing_risks_nll if causes > 1 else packed_survival_nll
    kinds = {"event_types" if causes > 1 else "event_indicators": types}
    options = {"from_logits": True, "reduction": reduction}
    for given in (mask, mask.float()):
        on_threads(lambda given=given: both(padded(x, lengths - 1, types, given, **options), x))
    on_threads(lambda: both(packed(rows, batch, event_times=lengths - 1, **kinds, **options), rows))


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keep_gates", [0.3, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [[120] * 4 + [40] * 10 + [3] * 40, [2] * 150, [200, 1]],
    ids=["groups, then in step", "in step alone", "groups alone"],
)
def test_packed_recurrent(sizes, reverse, keep_gates, dtype, cell):
    """Patients apart while there are many, and the tail of few long records in step (team.h)."""
    inputs, hidden = 32, 50
    rows = torch.randn(sum(sizes), inputs).to(dtype).requires_grad_()
    weights = [
        [weight.requires_grad_() for weight in cell.weights(inputs, hidden, dtype=dtype, scale=0.2)]
        for _ in range(2 if reverse else 1)
    ]
    leaves = [rows, *(weight for layer in weights for weight in layer)]

    def compute():
        sequence = PackedSequence(rows, torch.tensor(sizes))
        output, final = cell.function(
            sequence, weights, bidirectional=reverse, keep_gates=keep_gates
        )
        finals = flat(final)
        total = output.data.sum() + torch.stack(finals).prod(0).sum()
        return output.data.detach(), finals[0].detach(), *torch.autograd.grad(total, leaves)

    on_threads(compute)


@pytest.mark.parametrize("dropout", [False, True])
def test_hazard_head(dropout):
    inputs, units = 40, 37
    rows = torch.randn(3000, inputs, requires_grad=True)
    shapes = [(units, inputs), (units,), (1, units), (1,)]
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kept = torch.rand(len(rows), units) < 0.7 if dropout else None
    scale = 1 / 0.7 if dropout else 1.0
    leaves = [rows, *weights]
    on_threads(lambda: both(hazard_head(rows, *weights, kept, scale), *leaves))


@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "sigmoid"])
def test_linear(activation):
    rows = torch.randn(3000, 40, requires_grad=True)
    weights = [torch.randn(shape, requires_grad=True) for shape in [(37, 40), (37,)]]
    on_threads(lambda: both(linear_layer(rows, *weights, activation), rows, *weights))

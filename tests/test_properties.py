"""Each operation on each backend against its reference in float64, on what hypothesis thinks of:
shapes, dtypes, layouts, masks of every dtype, codes that come twice, values at the limits, NaN and
infinities in what is real and in what is padding.

Short and the same every time; ``pytest tests/test_properties*.py --hypothesis-profile long`` tries
some thousand cases of each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
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
from ehrseq_fast import backend as backends
from ehrseq_fast.visit_pool import reference as pool_reference

from . import strategies as draws
from .conftest import is_emulated
from .recurrent_layers import CELLS, flat
from .survival_cases import definition
from .tolerances import assert_matches

MODES = st.sampled_from(("mean", "sum", "max"))
NAN = float("nan")
LARGEST = torch.finfo(torch.float64).max

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")


def cases(test):
    """Run under the chosen profile; a backend that is emulated is a thousand times slower, and has
    a tenth of the cases."""
    checked = settings(suppress_health_check=list(HealthCheck))(test)
    return pytest.mark.usefixtures("backend")(checked)


def served(dtype, backend):
    """Leave out what a backend does not serve here, and most cases of an emulated one."""
    name = backend
    if name != "reference":
        assume(dtype in backends.kernels(name).dtypes)


@pytest.fixture
def few(backend, request):
    """Fewer cases for an emulated backend."""
    if is_emulated(backend):
        test = request.function
        before = test._hypothesis_internal_use_settings
        # to find the smallest failing case would take it minutes
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        few = settings(before, max_examples=max(2, before.max_examples // 15), phases=phases)
        test._hypothesis_internal_use_settings = few
        yield
        test._hypothesis_internal_use_settings = before
    else:
        yield


def gradients(result, leaves, incoming):
    return torch.autograd.grad(result, leaves, incoming)


def pooled_both_ways(ours, oracle, given_value, incoming, layout, terms):
    """Value and gradient of a pooling, ours and the oracle's, with the sizes of what they sum."""
    leaf = draws.laid_out(given_value, layout).detach().requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    result, expected = ours(leaf), oracle(exact)
    grad_in = draws.laid_out(incoming, layout)
    (grad,) = gradients(result, [leaf], grad_in.to(result.dtype))
    (exact_grad,) = gradients(expected, [exact], grad_in.double())
    size = oracle(exact.detach().abs().nan_to_num(0, 0, 0))
    sized = exact.detach().clone().requires_grad_()
    (grad_size,) = gradients(oracle(sized), [sized], grad_in.double().abs())
    assert_matches(result, expected, scale=size.abs(), terms=terms)
    assert_matches(grad, exact_grad, scale=grad_size.abs(), terms=terms)


# Pooling ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
@cases
@given(data=st.data(), dtype=draws.floating, mode=MODES, layout=draws.layouts)
def test_visit_mean_pool(backend, data, dtype, mode, layout):
    served(dtype, backend)
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    vocabulary, width = data.draw(st.integers(1, 7)), data.draw(draws.widths)
    weight = data.draw(draws.values((vocabulary, width), dtype))
    random = draws.generator(data.draw(draws.seeds))
    codes = torch.randint(0, vocabulary, shape, generator=random)
    codes = draws.laid_out(codes.to(data.draw(st.sampled_from((torch.int64, torch.int32)))), layout)
    mask = data.draw(draws.masks(shape, weights=mode != "max"))
    mask = None if mask is None else draws.laid_out(mask, layout)
    if mask is not None:  # padding may hold any number
        codes = torch.where(mask != 0, codes, data.draw(st.integers(-(2**31), 2**31 - 1)))
    padding = data.draw(st.sampled_from((None, 0, -1)))
    incoming = torch.randn((*shape[:-1], width), generator=random).to(dtype)

    def ours(table):
        return visit_mean_pool(codes, table, mask, mode=mode, padding_idx=padding)

    def oracle(table):
        return pool_reference.visit_mean_pool(codes, table, mask, mode=mode, padding_idx=padding)

    pooled_both_ways(ours, oracle, weight, incoming, layout, terms=max(1, codes.numel()))


@pytest.mark.usefixtures("few")
@cases
@given(data=st.data(), dtype=draws.floating, mode=MODES, layout=draws.layouts)
def test_masked_pool(backend, data, dtype, mode, layout):
    served(dtype, backend)
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    width = data.draw(draws.widths)
    embeddings = data.draw(draws.values((*shape, width), dtype))
    mask = data.draw(draws.masks(shape, weights=mode != "max"))
    mask = None if mask is None else draws.laid_out(mask, layout)
    if mask is not None and layout != "expanded":  # what padding holds is never read
        embeddings = embeddings.masked_fill((mask == 0)[..., None], NAN)
    random = draws.generator(data.draw(draws.seeds))
    incoming = torch.randn((*shape[:-1], width), generator=random).to(dtype)
    pooled_both_ways(
        lambda x: masked_pool(x, mask, mode=mode),
        lambda x: pool_reference.masked_pool(x, mask, mode=mode),
        *(embeddings, incoming, layout),
        terms=max(1, shape[-1]),
    )


@pytest.mark.usefixtures("few")
@cases
@given(
    data=st.data(),
    lists=draws.records(),
    dtype=draws.floating,
    mode=MODES,
    layout=st.sampled_from(draws.LAYOUTS[:-1]),
    sparse=st.booleans(),
)
def test_packed_visit_pool(backend, data, lists, dtype, mode, layout, sparse):
    served(dtype, backend)
    batch = PackedVisits.from_lists(lists.patients, vocab_size=lists.vocabulary)
    batch = batch.to(torch.get_default_device())
    width = data.draw(draws.widths)
    weight = data.draw(draws.values((lists.vocabulary, width), dtype))
    random = draws.generator(data.draw(draws.seeds))
    incoming = torch.randn((batch.n_visits, width), generator=random).to(dtype)
    padding = data.draw(st.sampled_from((None, 0, -1)))

    def ours(table):
        return packed_visit_pool(
            batch, table, mode=mode, padding_idx=padding, sparse_grad=sparse and not table.is_leaf
        )

    def oracle(table):
        return pool_reference.packed_visit_pool(
            *(batch.codes, batch.code_offsets, table), mode=mode, padding_idx=padding
        )

    pooled_both_ways(ours, oracle, weight, incoming, layout, terms=max(1, batch.n_codes))
    if sparse:
        leaf = weight.detach().clone().requires_grad_()
        dense, sparse_grad = (
            torch.autograd.grad(
                packed_visit_pool(batch, leaf, mode=mode, padding_idx=padding, sparse_grad=kind),
                *(leaf, incoming),
            )[0]
            for kind in (False, True)
        )
        assert torch.equal(sparse_grad.to_dense().nan_to_num(7), dense.nan_to_num(7))


@pytest.mark.usefixtures("few")
@cases
@given(data=st.data(), lists=draws.records(), dtype=draws.floating)
def test_attention(backend, data, lists, dtype):
    served(dtype, backend)
    batch = PackedVisits.from_lists(lists.patients, vocab_size=lists.vocabulary)
    batch = batch.to(torch.get_default_device())
    width = data.draw(draws.widths)
    weight = data.draw(draws.values((lists.vocabulary, width), dtype, not_finite=False))
    scores = data.draw(draws.values((lists.vocabulary,), dtype, not_finite=False))
    random = draws.generator(data.draw(draws.seeds))
    incoming = torch.randn((batch.n_visits, width), generator=random).to(dtype)
    leaves = [weight.clone().requires_grad_(), scores.clone().requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    result = packed_visit_pool(batch, leaves[0], mode="attention", scores=leaves[1])

    def oracle(table, of_codes):
        return pool_reference.packed_visit_pool(
            *(batch.codes, batch.code_offsets, table), mode="attention", scores=of_codes
        )

    expected = oracle(*exact)
    size = oracle(exact[0].detach().abs(), exact[1].detach())
    # an error of a score is one of the exponent
    terms = 4 * max(1, batch.n_codes)
    spread = max(1.0, min(float(exact[1].detach().abs().max()), 1e3))
    assert_matches(result, expected, scale=size * spread, terms=terms)
    grads = gradients(result, leaves, incoming)
    exact_grads = gradients(expected, exact, incoming.double())
    # gradients of scores are differences of what is of this size
    largest = float(
        (incoming.double().abs().sum(1).max() * weight.double().abs().max()).nan_to_num()
    )
    for grad, exact_grad, scale in zip(grads, exact_grads, (1.0, largest), strict=True):
        scale = max(scale, float(exact_grad.abs().max())) * spread  # noqa: PLW2901
        assert_matches(grad, exact_grad, scale=min(scale * 4, LARGEST), terms=terms)


# Losses -------------------------------------------------------------------------------------------


@st.composite
def outcomes(draw, causes):
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    times = [draw(st.integers(0, length - 1)) for length in lengths]
    entries = [draw(st.integers(0, time)) for time in times]
    types = [draw(st.integers(0, causes)) for _ in lengths]
    return lengths, *(torch.tensor(x) for x in (times, types, entries))


@pytest.mark.usefixtures("few")
@cases
@given(data=st.data(), dtype=draws.floating, layout=st.sampled_from(draws.LAYOUTS[:-1]))
def test_survival_losses(backend, data, dtype, layout):
    served(dtype, backend)
    link = data.draw(st.sampled_from(("probabilities", "sigmoid", "softmax")))
    competing = link == "softmax" or data.draw(st.booleans())
    causes = data.draw(st.integers(1, 3)) if competing else 1
    lengths, times, types, entries = data.draw(outcomes(causes))
    extra = data.draw(st.integers(0, 2))
    slots = max(lengths) + extra
    mask = torch.arange(slots) < torch.tensor(lengths)[:, None]
    shape = (len(lengths), slots, *((causes + (link == "softmax"),) if competing else ()))
    random = draws.generator(data.draw(draws.seeds))
    x = torch.randn(shape, generator=random, dtype=torch.float64) * data.draw(
        st.sampled_from((1.0, 3.0, 30.0))
    )
    # away from 1, to which 16 bits would round: 1 - eps is another number in float64
    hazards = (x.sigmoid().clamp(1e-3, 0.99) if link == "probabilities" else x).to(dtype)
    real_nan = data.draw(st.booleans()) and data.draw(st.booleans())
    if real_nan:
        hazards[0, 0] = NAN
    fill = data.draw(st.sampled_from((0.0, NAN, float("inf"))))
    padded = torch.where(mask.reshape(*mask.shape, *[1] * competing), hazards, fill)
    mask_dtype = data.draw(st.sampled_from(draws.MASKS))
    options = {
        "from_logits": link != "probabilities",
        "censored_visit": data.draw(st.sampled_from(("excluded", "included"))),
        "entry_times": entries if data.draw(st.booleans()) else None,
        "sample_weight": torch.rand(len(lengths), generator=random)
        if data.draw(st.booleans())
        else None,
        "reduction": data.draw(st.sampled_from(("none", "mean", "sum"))),
    }
    if competing:
        options["link"] = "softmax" if link == "softmax" else "sigmoid"
    ours = competing_risks_nll if competing else discrete_time_survival_nll
    packed = packed_competing_risks_nll if competing else packed_survival_nll
    exact = padded.double().requires_grad_()
    weight = options["sample_weight"]
    expected = definition(
        *(exact, times, types, mask),
        **{**options, "sample_weight": None if weight is None else weight.double()},
    )
    incoming = torch.rand(expected.shape, generator=random).to(expected) + 0.5
    (exact_grad,) = gradients(expected, [exact], incoming)
    # No sum cancels: all terms have one sign. A gradient p - 1 does, by itself.
    grad_size = exact_grad.abs().clamp(min=2)
    checks = {"terms": 8 * slots * causes, "accumulated_in": dtype}
    leaf = draws.laid_out(padded, layout).detach().requires_grad_()
    given_mask = draws.laid_out(mask.to(mask_dtype), layout)
    result = ours(leaf, times, types, given_mask, **options)
    (grad,) = gradients(result, [leaf], incoming.to(result.dtype))
    assert_matches(result, expected.detach(), **checks)
    assert_matches(grad, exact_grad, scale=grad_size, **checks)

    codes = [[[] for _ in range(length)] for length in lengths]
    batch = PackedVisits.from_lists(codes).to(torch.get_default_device())
    rows = draws.laid_out(batch.pack(padded), layout).detach().requires_grad_()
    kinds = {"event_types" if competing else "event_indicators": types}
    result = packed(rows, batch, event_times=times, **kinds, **options)
    (grad,) = gradients(result, [rows], incoming.to(result.dtype))
    assert_matches(result, expected.detach(), **checks)
    assert_matches(grad, batch.pack(exact_grad), scale=batch.pack(grad_size), **checks)


# LSTM and GRU -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unemulated")
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@settings(suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    dtype=draws.floating,
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    inputs=st.integers(1, 9),
    hidden=st.sampled_from((1, 3, 7, 8, 16, 17, 25, 33)),
    bias=st.booleans(),
    reverse=st.booleans(),
    keep=st.sampled_from((0.0, 0.5, 1.0)),
    layout=st.sampled_from(draws.LAYOUTS[:-1]),
)
def test_packed_recurrent(
    cell, unemulated, data, dtype, sizes, inputs, hidden, bias, reverse, keep, layout
):
    sizes = torch.tensor(sorted(sizes, reverse=True), device="cpu")
    random = draws.generator(data.draw(draws.seeds))

    def drawn(*shape):
        drawn = torch.randn(shape, generator=random, dtype=torch.float64) * 0.4
        return draws.laid_out(drawn.to(dtype), layout)

    leaves = [drawn(int(sizes.sum()), inputs)]
    directions = 2 if reverse else 1
    per_layer = 4 if bias else 2
    for _ in range(directions):
        leaves += [drawn(cell.gates * hidden, inputs), drawn(cell.gates * hidden, hidden)]
        leaves += [drawn(cell.gates * hidden) for _ in range(per_layer - 2)]
    if layout == "contiguous" and data.draw(st.booleans()):
        leaves[data.draw(st.integers(0, len(leaves) - 1))].view(-1)[0] = NAN
    exact = [x.detach().double().requires_grad_() for x in leaves]
    leaves = [x.detach().requires_grad_() for x in leaves]

    def weights(of):
        return [of[1 + i * per_layer : 1 + (i + 1) * per_layer] for i in range(directions)]

    output, final = cell.function(
        PackedSequence(leaves[0], sizes), weights(leaves), bidirectional=reverse, keep_gates=keep
    )
    outs = [
        cell.definition(exact[0], sizes, *w, *[None] * (4 - len(w)), *[None] * cell.states, i > 0)
        for i, w in enumerate(weights(exact))
    ]
    expected = [
        torch.cat([out[0] for out in outs], 1),
        *(torch.stack(states) for states in zip(*(out[1:] for out in outs), strict=True)),
    ]
    results = [output.data, *flat(final)]
    terms = 16 * (inputs + hidden) * len(sizes)
    for result, wanted in zip(results, expected, strict=True):
        assert_matches(result, wanted.detach(), terms=terms)
    incoming = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in expected]
    grads = torch.autograd.grad(results, leaves, [x.to(dtype) for x in incoming])
    exact_grads = torch.autograd.grad(expected, exact, [x.to(dtype).double() for x in incoming])
    for grad, wanted in zip(grads, exact_grads, strict=True):
        size = max(1.0, float(wanted.abs().nan_to_num().max()))
        assert_matches(grad, wanted, scale=4 * size, terms=terms)

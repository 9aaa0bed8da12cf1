"""The raw operators of visit pooling refuse what they would follow out of bounds."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import packed_visit_pool, use_backend
from ehrseq_fast.backend import operators
from ehrseq_fast.visit_pool import PackedCodes, codes_in_use

from .batches import from_lists

pytestmark = pytest.mark.operation("visit_pool")

N, C, K, E = 6, 4, 5, 8
ERRORS = (ValueError, TypeError, IndexError)


def arguments(ops, name, mode=2):
    """A valid call, by name of its arguments."""
    codes = torch.arange(N * C).reshape(N, C) % K
    mask = codes != 0
    weight = torch.randn(K, E)
    batch = from_lists([[[1, 2], [], [3, 3, 4]], [[0], [1], [2]]])
    offsets, *index = batch.code_offsets, batch.index_codes, batch.index_offsets, batch.index_visits
    grad, scores = torch.randn(N, E), torch.randn(K)
    packed = {"codes": batch.codes, "code_offsets": offsets}
    transposed = dict(zip(("index_codes", "index_offsets", "index_visits"), index, strict=True))
    last = {"arg_max": torch.zeros(N, E, dtype=torch.int32), "mode": mode, "padding_idx": 0}
    padded = {"grad": grad, "codes": codes, "vocabulary": K, "visit_mask": mask, **last}
    given = {"grad": grad, "code_offsets": offsets, **transposed, "vocabulary": K, **last}
    attention = {**packed, "weight": weight, "scores": scores}
    if name == "packed_attention_pool_backward":
        pooled, highest, inverse = ops.packed_attention_pool(*attention.values())
        return {
            "grad": grad,
            "pooled": pooled,
            "highest": highest,
            "inverse": inverse,
            **transposed,
            "weight": weight,
            "scores": scores,
            "padding_idx": 0,
        }
    if "weighted" in name:
        return weighted_arguments(ops, name, batch, weight, grad)
    return {
        "visit_pool": {"codes": codes, "weight": weight, "visit_mask": mask, "mode": mode},
        "visit_pool_backward": padded,
        "visit_pool_backward_sparse": padded,
        "masked_pool": {"embeddings": torch.randn(N, C, E), "mask": mask, "mode": mode},
        "masked_pool_backward": {
            "grad": grad,
            "mask": mask,
            "arg_max": last["arg_max"],
            "n_slots": C,
            "mode": mode,
        },
        "packed_visit_pool": {**packed, "weight": weight, "mode": mode},
        "packed_visit_pool_backward": given,
        "packed_visit_pool_backward_sparse": given,
        "packed_attention_pool": attention,
    }[name]


def weighted_arguments(ops, name, batch, weight, grad):
    codes = {"codes": batch.codes, "code_offsets": batch.code_offsets}
    code_weights = torch.rand(batch.n_codes)
    forward = {**codes, "weight": weight, "code_weights": code_weights, "mode": 0}
    if name == "packed_weighted_pool":
        return forward
    pooled, totals = ops.packed_weighted_pool(*forward.values())
    if name == "packed_weighted_pool_backward_weights":
        kept = {"grad": grad, "pooled": pooled, "totals": totals}
        return {**kept, **codes, "weight": weight, "mode": 0}
    return {
        "grad": grad,
        **codes,
        "code_weights": code_weights,
        "totals": totals,
        "index_codes": batch.index_codes,
        "index_offsets": batch.index_offsets,
        "index_visits": batch.index_visits,
        "index_positions": torch.sort(batch.codes, stable=True).indices.int(),
        "vocabulary": K,
        "mode": 0,
        "padding_idx": 0,
    }


OPERATORS = (
    "visit_pool",
    "visit_pool_backward",
    "visit_pool_backward_sparse",
    "masked_pool",
    "masked_pool_backward",
    "packed_visit_pool",
    "packed_visit_pool_backward",
    "packed_visit_pool_backward_sparse",
    "packed_weighted_pool",
    "packed_weighted_pool_backward",
    "packed_weighted_pool_backward_sparse",
    "packed_weighted_pool_backward_weights",
    "packed_attention_pool",
    "packed_attention_pool_backward",
)

# Whatever a call needs of its arguments, taken from it.
CHANGES = {
    "one element less": lambda x: x[:-1],
    "one column less": lambda x: x[..., :-1] if x.dim() > 1 else x[:-1],
    "no element": lambda x: x[:0],
    "no dimension": lambda x: x.flatten()[0],
    "one dimension more": lambda x: x.unsqueeze(0),
    "one dimension less": lambda x: x.flatten() if x.dim() > 1 else x.unsqueeze(-1),
    "another dtype": lambda x: x.long() if x.dtype == torch.int32 else x.to(torch.int16),
    "complex": lambda x: x.to(torch.complex64),
}
NUMBERS = {
    "mode": (-1, 3, 2**40),
    "padding_idx": (-2, K, 2**40),
    "vocabulary": (-1, 2**31, 2**40),
    "n_slots": (-1, C + 1, 2**40),
}
# Shapes that still fit together, so that the call is another valid one.
VALID = {
    ("visit_pool", "weight", "one column less"),
    ("visit_pool", "weight", "one element less"),
    ("packed_visit_pool", "weight", "one column less"),
    ("packed_attention_pool", "weight", "one column less"),
    ("packed_weighted_pool", "weight", "one column less"),
    ("packed_weighted_pool_backward", "grad", "one column less"),
    ("packed_weighted_pool_backward_sparse", "grad", "one column less"),
    ("masked_pool", "embeddings", "one column less"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_inconsistent_arguments_are_refused(kernels, name):
    """Each tensor with a size, a number of dimensions or a dtype that does not fit the others."""
    ops = operators(kernels)
    call = getattr(ops, name)
    valid = arguments(ops, name)
    call(*valid.values())
    refused, accepted = 0, []
    for argument, value in valid.items():
        for other in NUMBERS.get(argument, ()):
            with pytest.raises((*ERRORS, RuntimeError)):
                call(*{**valid, argument: other}.values())
            refused += 1
        if not isinstance(value, torch.Tensor):
            continue
        for change, changed in CHANGES.items():
            try:
                call(*{**valid, argument: changed(value)}.values())
            except ERRORS:
                refused += 1
            except RuntimeError as error:  # a GPU's kernel that finds a value out of range
                if "__trap" not in str(error):
                    raise
                refused += 1
            else:
                accepted.append((argument, change))
    assert refused > 5
    assert [a for a in accepted if not may_be_called(kernels, name, *a)] == []


def may_be_called(kernels, name, argument, change):
    """Another valid call; or, on a GPU, one that reads nothing out of bounds: what stands in its
    memory is not looked at before the kernels do, and they stop at a length that is known."""
    shorter = change in ("one element less", "one column less", "no element")
    in_memory = ("codes", "code_offsets", "index_visits", "weight")
    if (name, argument, change) in VALID:
        return True
    if kernels == "cpu" or not shorter or argument not in in_memory:
        return False
    return name.startswith("packed") or (kernels == "triton" and argument == "weight")


@pytest.mark.parametrize("name", OPERATORS)
def test_without_winners_a_maximum_has_no_gradient(kernels, name):
    ops = operators(kernels)
    valid = arguments(ops, name)
    if "arg_max" not in valid:
        return
    with pytest.raises(ValueError, match="arg_max"):
        getattr(ops, name)(*{**valid, "arg_max": None}.values())
    for mode in (0, 1):
        getattr(ops, name)(*{**valid, "arg_max": None, "mode": mode}.values())


@pytest.mark.parametrize("name", [name for name in OPERATORS if "weighted" in name])
def test_of_a_mean_and_on_a_gpu_more_is_needed(kernels, name):
    ops = operators(kernels)
    valid = arguments(ops, name)
    needed = {"pooled", "totals"} | (set() if kernels == "cpu" else {"index_positions"})
    for argument in needed & set(valid):
        with pytest.raises(ValueError, match=argument):
            getattr(ops, name)(*{**valid, argument: None}.values())
    of_a_sum = dict.fromkeys(valid.keys() & {"pooled", "totals"})
    getattr(ops, name)(*{**valid, **of_a_sum, "mode": 1}.values())


@pytest.mark.parametrize("name", [name for name in OPERATORS if "backward" in name])
def test_strided_arguments_are_read_as_they_are(kernels, name):
    """A gradient, winners and whatever was saved may come with any stride."""
    ops = operators(kernels)
    valid = arguments(ops, name)

    def strided(x):
        if not isinstance(x, torch.Tensor):
            return x
        spread = torch.zeros(*x.shape, 2, dtype=x.dtype)
        spread[..., 1] = x
        return spread[..., 1]

    call = getattr(ops, name)
    expected, actual = call(*valid.values()), call(*map(strided, valid.values()))
    if isinstance(expected, torch.Tensor):
        expected, actual = [expected], [actual]
    assert all(map(torch.equal, expected, actual))


TAMPERED = {
    "offsets that fall": ("code_offsets", [0, 3, 2, 4]),
    "offsets past the end": ("code_offsets", [0, 2, 3, 9]),
    "offsets that start late": ("code_offsets", [1, 2, 3, 4]),
    "negative offsets": ("code_offsets", [0, -7, 3, 4]),
    "offsets that end early": ("code_offsets", [0, 2, 3, 3]),
}


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "attention"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("what", TAMPERED)
def test_offsets_that_were_edited_are_refused(compiled, name, mode, what):
    batch = from_lists([[[1, 2], [0]], [[2]]])
    field, values = TAMPERED[what]
    fields = {f: getattr(batch, f) for f in PackedCodes._fields}
    changed = PackedCodes(**{**fields, field: torch.tensor(values, dtype=torch.int32)})
    given = {"scores": torch.zeros(3)} if mode == "attention" else {}
    with use_backend(name), pytest.raises(ValueError, match=r"code_offsets.* rise from 0"):
        packed_visit_pool(changed, torch.ones(3, 4), mode=mode, **given)


def test_codes_in_use_of_codes_that_the_index_lacks():
    batch = from_lists([[[10, 20], [20]], [[40]]])
    assert codes_in_use(batch).codes.tolist() == [0, 1, 2, 1]
    fields = {f: getattr(batch, f) for f in PackedCodes._fields}
    for code in (15, 50, -1):
        codes = batch.codes.clone()
        codes[0] = code
        with pytest.raises(ValueError, match=rf"got none for {code} \(codes\[0\]\)"):
            codes_in_use(PackedCodes(**{**fields, "codes": codes}))

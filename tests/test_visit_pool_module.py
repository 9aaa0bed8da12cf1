"""``VisitPool``: tables, domains and modes, padded and packed, against the functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ehrseq_fast import PackedVisits, VisitPool, packed_visit_pool, visit_mean_pool
from ehrseq_fast.models import VisitEncoder
from ehrseq_fast.models.pooling import attend
from ehrseq_fast.visit_pool.packed import PACKED_MODES

from .model_cases import ragged_batch
from .watched import Shifted

ROWS, WIDTH = 23, 6


def embedding(padding_idx=0, dtype=torch.float32, **options):
    return nn.Embedding(ROWS, WIDTH, padding_idx=padding_idx, dtype=dtype, **options)


def padded_and_packed():
    codes, mask, sequence_mask = ragged_batch()
    batch = PackedVisits.from_padded(codes, mask, sequence_mask)
    # padding holds what no table has
    return codes.masked_fill(~mask, ROWS + 7), mask, batch


def weight_of(pool):
    return pool.embedding.weight if "embedding" in pool._modules else pool.weight


@pytest.mark.operation("visit_pool")
@pytest.mark.parametrize("mode", PACKED_MODES)
def test_against_the_definition_in_float64(backend, mode):
    torch.manual_seed(0)
    pool = VisitPool(embedding(padding_idx=3), mode)
    codes, mask, batch = padded_and_packed()
    exact = copy.deepcopy(pool).double()
    rows = exact.embedding(codes.masked_fill(~mask, 0))
    if mode == "attention":
        expected = attend(rows, mask, exact.attention)
    elif mode == "max":
        largest = rows.masked_fill(~mask[..., None], -torch.inf).amax(-2)
        expected = torch.where(mask.any(-1, keepdim=True), largest, 0.0)
    else:
        expected = (rows * mask[..., None]).sum(-2)
        if mode == "mean":
            expected = expected / mask.sum(-1, keepdim=True).clamp(min=1)
    upstream = torch.randn(expected.shape).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    (expected * upstream.double()).sum().backward()
    for given, scale in (((codes, mask), upstream), ((batch,), batch.pack(upstream))):
        pool.zero_grad()
        found = pool(*given)
        want = expected if len(given) == 2 else batch.pack(expected.detach())
        torch.testing.assert_close(found, want.detach().float(), rtol=1e-5, atol=1e-6)
        (found * scale).sum().backward()
        for parameter, other in zip(pool.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad.float(), rtol=1e-4, atol=1e-5)
        assert not weight_of(pool).grad[3].any()  # padding_idx


@pytest.mark.parametrize("mode", PACKED_MODES)
def test_tensors_parameters_and_embeddings_are_the_same_to_the_bit(mode):
    codes, mask, batch = padded_and_packed()
    table, row = torch.randn(ROWS, WIDTH), int(batch.codes[0])
    score = nn.Linear(WIDTH, 1) if mode == "attention" else None
    parameter = nn.Parameter(table.clone())
    pools = [
        VisitPool(nn.Embedding.from_pretrained(table, padding_idx=row), mode, score=score),
        VisitPool(table, mode, score=score, padding_idx=row),
        VisitPool(parameter, mode, score=score, padding_idx=row),
    ]
    assert pools[2].weight is parameter
    assert [len(list(pool.buffers())) for pool in pools] == [0, 1, 0]
    outputs = [(pool(codes, mask), pool(batch)) for pool in pools]
    for padded, packed in outputs:
        assert torch.equal(padded, outputs[0][0])
        assert torch.equal(packed, outputs[0][1])
        torch.testing.assert_close(packed, batch.pack(padded))
    if mode != "attention":
        assert torch.equal(outputs[0][0], visit_mean_pool(codes, table, mask, mode=mode))
        assert torch.equal(outputs[0][1], packed_visit_pool(batch, table, mode=mode))
    for output in outputs[2]:
        parameter.grad = None
        output.sum().backward()
        assert parameter.grad.any(1).sum() > 5
        assert not parameter.grad[row].any()


def test_attention_is_a_visit_encoders():
    encoder = VisitEncoder(WIDTH, "attention").eval()
    pool = VisitPool(embedding(), "attention")
    assert list(pool.state_dict())[1:] == list(encoder.state_dict())
    pool.attention.load_state_dict(encoder.attention.state_dict())
    codes, mask, _ = padded_and_packed()
    rows = pool.embedding(codes.masked_fill(~mask, 0))
    torch.testing.assert_close(pool(codes, mask), encoder(rows, mask))
    every = codes.masked_fill(~mask, 0)  # without a mask every slot counts
    torch.testing.assert_close(pool(every), encoder(rows))
    one_code = pool(torch.tensor([5]))  # [C] -> [E]
    assert torch.equal(one_code, pool.embedding.weight[5])


def test_attention_holds_nothing_of_every_slot():
    """Nor does it read padding: 2^24 slots of 6 floats would be 400 MB, in the graph twice."""
    pool = VisitPool(embedding(), "attention")
    codes = torch.zeros(2**14, 2**10, dtype=torch.int32)
    mask = torch.zeros(codes.shape, dtype=torch.bool)
    codes[5, :3], mask[5, :3] = torch.tensor([1, 2, 3], dtype=torch.int32), True
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vectors = pool(codes, mask)
    assert max(saved) <= 2**14 * WIDTH
    assert vectors[5].any()
    assert not vectors[6:].any()


def test_sparse_gradients_max_norm_hooks_and_wrappers():
    """What an embedding does beyond looking up is done: it is called where that matters."""
    codes, mask, batch = padded_and_packed()
    for mode in ("mean", "attention"):
        pool = VisitPool(embedding(sparse=True), mode)
        for given in ((codes, mask), (batch,)):
            pool.zero_grad()
            pool(*given).sum().backward()
            assert pool.embedding.weight.grad.is_sparse
        seen = []
        pool.embedding.register_forward_hook(lambda module, given, out, s=seen: s.append(1))
        torch.testing.assert_close(pool(batch), batch.pack(pool(codes, mask)))
        assert len(seen) == 2
        moved = VisitPool(Shifted(ROWS, WIDTH), mode)
        bare = VisitPool(
            moved.embedding.weight.detach() + 1, mode, score=getattr(moved, "attention", None)
        )
        torch.testing.assert_close(moved(codes, mask), bare(codes, mask))
        torch.testing.assert_close(moved(batch), bare(batch))
        wrapped = VisitPool(
            nn.Sequential(nn.Embedding(ROWS, 2), nn.Linear(2, WIDTH)),
            mode,
            score=getattr(moved, "attention", None),
        )
        torch.testing.assert_close(wrapped(batch), batch.pack(wrapped(codes, mask)))
    short = VisitPool(embedding(max_norm=0.5))
    assert short(batch).norm(dim=1).max() <= 0.5 + 1e-6


def test_several_tables():
    codes, mask, batch = padded_and_packed()
    tables = {
        "dx": embedding(),
        "lab values": nn.Parameter(torch.randn(ROWS, 3)),
        "rx.": embedding(),
    }
    modes = {"dx": "mean", "lab values": "max", "rx.": "attention"}
    pool = VisitPool(tables, modes)
    alone = {name: VisitPool(tables[name], modes[name]) for name in ("dx", "lab values")}
    given, masks = dict.fromkeys(tables, codes), dict.fromkeys(tables, mask)
    padded, packed = pool(given, masks), pool(dict.fromkeys(tables, batch))
    assert padded.shape[-1] == 2 * WIDTH + 3
    assert torch.equal(padded[..., :WIDTH], alone["dx"](codes, mask))
    assert torch.equal(padded[..., WIDTH:-WIDTH], alone["lab values"](codes, mask))
    torch.testing.assert_close(packed, batch.pack(padded))
    assert list(pool.state_dict())[:2] == ["pools.0.embedding.weight", "pools.1.weight"]
    assert "domains=['dx', 'lab values', 'rx.']" in repr(pool)
    added = VisitPool({"dx": tables["dx"], "rx.": tables["rx."]}, join="sum")
    given = {"dx": codes, "rx.": codes.masked_fill(~mask, 0)}
    both = added(given, {"dx": mask})  # without a mask every slot counts
    torch.testing.assert_close(
        both, alone["dx"](codes, mask) + visit_mean_pool(given["rx."], tables["rx."].weight)
    )


def test_copies_pickles_dtypes_and_state():
    codes, mask, batch = padded_and_packed()
    pool = VisitPool({"a": embedding(), "b": torch.randn(ROWS, 2)}, "attention")
    given = {"a": batch, "b": batch}
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert torch.equal(other(given), pool(given))
    assert pool.double()(given).dtype == torch.float64
    table = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)
    assert VisitPool(table, "attention")(batch).dtype == torch.bfloat16
    assert VisitPool(embedding())(codes[:0], mask[:0]).shape == (0, 7, WIDTH)
    assert VisitPool(embedding(), "attention")(codes[:0], mask[:0]).shape == (0, 7, WIDTH)
    no_slots = VisitPool(embedding(), "attention")(codes[..., :0], mask[..., :0])
    assert torch.equal(no_slots, torch.zeros(4, 7, WIDTH))


@pytest.mark.parametrize("mode", PACKED_MODES)
def test_transforms_and_compile(mode):
    pool = VisitPool(embedding(dtype=torch.float64), mode)
    codes, mask, _ = padded_and_packed()
    torch.testing.assert_close(torch.func.vmap(pool)(codes, mask), pool(codes, mask))
    weights = {name: value.detach() for name, value in pool.named_parameters()}

    def total(weights):
        return torch.func.functional_call(pool, weights, (codes, mask)).square().sum()

    found = torch.func.grad(total)(weights)
    total(dict(pool.named_parameters())).backward()
    for name, value in pool.named_parameters():
        torch.testing.assert_close(found[name], value.grad)
    if mode in ("mean", "attention"):
        compiled = torch.compile(pool, backend="eager")
        torch.testing.assert_close(compiled(codes, mask), pool(codes, mask))
    if mode == "attention":
        torch.autograd.gradcheck(
            lambda w: torch.func.functional_call(
                pool, weights | {"embedding.weight": w}, (codes, mask)
            ),
            (weights["embedding.weight"][:ROWS].clone().requires_grad_(),),
            fast_mode=True,
        )


CODES = torch.tensor([[1, 2], [3, 0]])
ALL = torch.ones(2, 2)
ONE = PackedVisits.from_lists([[[1], [2]], [[3]]])
OTHER = PackedVisits.from_lists([[[1]], [[3]]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VisitPool(embedding(), "median"), ValueError, "mode: expected one of 'mean'"),
        (
            lambda: VisitPool([1.0]),
            TypeError,
            r"table: expected an nn.Embedding, a tensor or a dict",
        ),
        (lambda: VisitPool(torch.ones(3)), ValueError, r"table: expected \[K, E\], got \[3\]"),
        (lambda: VisitPool(torch.ones(3, 2, dtype=torch.long)), TypeError, "table: expected float"),
        (
            lambda: VisitPool(torch.ones(3, 2), padding_idx=3),
            IndexError,
            "padding_idx: expected -3",
        ),
        (lambda: VisitPool(embedding(), padding_idx=0), ValueError, "beside an embedding"),
        (lambda: VisitPool(embedding(), score=nn.Linear(6, 1)), ValueError, "score: expected None"),
        (
            lambda: VisitPool(nn.Sequential(embedding()), "attention"),
            ValueError,
            "an embedding_dim",
        ),
        (
            lambda: VisitPool(embedding(), "attention", score=3),
            TypeError,
            "score: expected a module",
        ),
        (lambda: VisitPool({}), ValueError, "got an empty dict"),
        (lambda: VisitPool({"a": embedding()}, join="max"), ValueError, "join: expected one of"),
        (
            lambda: VisitPool({"a": embedding(), "b": torch.ones(3, 2)}, join="sum"),
            ValueError,
            "expected tables of one width, got {'a': 6, 'b': 2}",
        ),
        (
            lambda: VisitPool({"a": embedding()}, {"b": "max"}),
            ValueError,
            r"mode: .* none for \['a'\]",
        ),
        (
            lambda: VisitPool({"a": embedding()})({"b": ONE}),
            ValueError,
            r"codes: .* none for \['a'\]",
        ),
        (
            lambda: VisitPool({"a": embedding()})(CODES),
            TypeError,
            "codes: expected a dict by domain",
        ),
        (
            lambda: VisitPool({"a": embedding()})({"a": CODES}, {"b": ALL}),
            ValueError,
            r"mask: expected domains of \['a'\], got \['b'\]",
        ),
        (
            lambda: VisitPool({"a": embedding(), "b": embedding()})({"a": ONE, "b": OTHER}),
            ValueError,
            r"codes\['b'\]: expected patients .* got patient 0: 1 visits, not 2",
        ),
        (
            lambda: VisitPool({"a": embedding(), "b": embedding()})({"a": ONE, "b": CODES}),
            ValueError,
            "packed batches or padded tensors alike",
        ),
        (
            lambda: VisitPool({"a": embedding(), "b": embedding()})({"a": CODES, "b": CODES[:1]}),
            ValueError,
            r"codes\['b'\]: expected visits \[2\] as codes\['a'\], got \[1\]",
        ),
        (
            lambda: VisitPool(embedding())(ONE, ALL),
            ValueError,
            "mask: expected None beside a Packed",
        ),
        (
            lambda: VisitPool(embedding())(CODES.float()),
            TypeError,
            "codes: expected int32 or int64",
        ),
        (lambda: VisitPool(embedding(), "attention")(CODES.float()), TypeError, "expected int32"),
        (
            lambda: VisitPool(embedding(), "attention")(CODES, ALL[:1]),
            ValueError,
            r"mask: expected \[2, 2\]",
        ),
        (
            lambda: VisitPool(embedding(), "attention")(CODES, ALL * 0.5),
            ValueError,
            "0 and 1|0 or 1",
        ),
        (
            lambda: VisitPool(embedding(), "attention")(CODES + 21, ALL),
            IndexError,
            r"expected 0 <= code < 23. The first is 23: codes\[0, 1\]",
        ),
        (
            lambda: VisitPool(embedding(), "attention", score=nn.Linear(6, 2))(CODES),
            ValueError,
            r"score: expected a module that gives \[n, 1\]",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

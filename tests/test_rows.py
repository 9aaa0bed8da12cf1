"""What models return beside tensors: it moves, is saved and is taken apart as tensors are."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree

from ehrseq_fast import PackedRows
from ehrseq_fast.rows import VisitState

from .test_packed_models import batch, build


def rows(dtype=torch.float32):
    return build("survival").to(dtype)(batch())


def state():
    model = build("survival")
    return model.step(model.start(), [1, 2])[1]


def test_rows_move_with_their_batch():
    values = rows()
    there = values.to("meta")
    assert there.device.type == there.values.device.type == there.batch.device.type == "meta"
    assert values.device.type == values.batch.device.type == "cpu"
    wide = values.to(torch.float64)
    assert (wide.dtype, wide.values.dtype) == (torch.float64, torch.float64)
    assert wide.batch is values.batch
    both = values.to("meta", torch.float16, non_blocking=True)
    assert (both.device.type, both.dtype) == ("meta", torch.float16)
    assert values.to(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for same in (values.cpu(), values.to("cpu"), values.to(torch.float32)):
        assert torch.equal(same.to_padded(), values.to_padded())
    assert values.values.requires_grad
    assert not values.detach().values.requires_grad
    assert values.detach().batch is values.batch


@pytest.mark.parametrize("method", ["cuda", "pin_memory"])
@pytest.mark.parametrize("make", [rows, state])
def test_on_a_gpu(make, method):
    value = make()
    if torch.cuda.is_available():
        moved = getattr(value, method)()
        assert moved.device.type == ("cuda" if method == "cuda" else "cpu")
    else:  # torch's own words
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA|accelerator"):
            getattr(value, method)()


def test_states_move():
    before = state()
    there = before.to("meta")
    assert there.h.device.type == there.c.device.type == there.device.type == "meta"
    assert there.n_visits == 1
    wide = before.to(torch.float64)
    assert wide.h.dtype == wide.c.dtype == wide.dtype == torch.float64
    assert before.cpu().detach().h.equal(before.h)
    assert VisitState(torch.ones(1, 1, 2), None, 3).to(torch.float16).c is None


def test_a_state_on_the_way_to_another_device_and_back_goes_on():
    model = build("survival")
    expected, _ = model.step(state(), [3])
    ours, _ = model.step(state().to(torch.float64).to(torch.float32).cpu(), [3])
    torch.testing.assert_close(ours, expected)


def test_h_and_c_are_two_tensors():
    start = build("survival").start(2)
    start.h.fill_(1.0)
    assert not start.c.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_numpy(dtype):
    values = rows(dtype)
    array = values.numpy()
    assert array.dtype == ("float32" if dtype == torch.bfloat16 else str(dtype)[6:])
    np.testing.assert_array_equal(
        array, values.values.detach().double().numpy().astype(array.dtype)
    )
    np.testing.assert_array_equal(np.asarray(values), array)
    assert np.asarray(values, np.float64).dtype == np.float64
    copied = np.array(values)
    copied[0] = 5
    assert values.values[0] != 5
    assert float(np.mean(values)) == pytest.approx(float(values.values.float().mean()), rel=1e-2)


@pytest.mark.parametrize("way", ["torch", "pickle", "copy"])
def test_saved_and_copied(way):
    given = {"rows": rows().detach(), "state": state()}
    if way == "torch":
        file = io.BytesIO()
        torch.save(given, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    elif way == "pickle":
        loaded = pickle.loads(pickle.dumps(given))
    else:
        loaded = copy.deepcopy(given)
    assert torch.equal(loaded["rows"].to_padded(), given["rows"].to_padded())
    assert loaded["state"].n_visits == 1
    assert torch.equal(loaded["state"].h, given["state"].h)
    assert torch.equal(loaded["state"].c, given["state"].c)


def test_pytree():
    values = rows()
    leaves, spec = _pytree.tree_flatten({"hazards": values, "state": state()})
    assert leaves[0] is values.values
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again["hazards"], PackedRows)
    assert again["hazards"].values is values.values
    assert again["state"].n_visits == 1
    assert again["hazards"].batch is values.batch
    detached = _pytree.tree_map(lambda tensor: tensor.detach(), values)
    assert values.values.requires_grad
    assert not detached.values.requires_grad
    assert detached.batch is values.batch
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(values)[0]]
    assert paths[0] == ".values"
    dumped = _pytree.treespec_dumps(_pytree.tree_flatten(state())[1])
    assert _pytree.treespec_loads(dumped) == _pytree.tree_flatten(state())[1]


def test_rows_of_several_models_at_once():
    """torch.func takes what a model returns apart, and puts it together again."""
    model, visits = build("survival"), batch()
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, visits))(
        stacked
    )
    assert isinstance(found, PackedRows)
    assert found.batch is visits
    for i in range(2):
        weights = {name: p[i] for name, p in stacked.items()}
        expected = torch.func.functional_call(model, weights, visits)
        torch.testing.assert_close(found.values[i], expected.values)


def test_an_exported_model_takes_padded_tensors():
    model, visits = build("survival").eval(), batch()
    model.path = "padded"
    with pytest.raises(ValueError, match=r"Unsupported input type .*PackedVisits"):
        torch.export.export(model, (visits,))
    padded = visits.to_padded()
    exported = torch.export.export(model, padded).module()
    torch.testing.assert_close(exported(*padded), model(*padded))


def as_lightning_moves(value, device):
    """What Trainer.predict does to outputs: whatever has ``to`` is asked; frozen dataclasses that
    have not are refused; containers are gone through."""
    if isinstance(value, dict):
        return {name: as_lightning_moves(part, device) for name, part in value.items()}
    if callable(getattr(value, "to", None)):
        return value.to(device)
    raise TypeError(type(value))


@pytest.mark.parametrize("name", ["survival", "competing risks", "baseline, mean"])
def test_a_trainer_can_keep_predictions_on_the_host(name):
    model = build(name)
    out = model(batch(), return_hidden=True) if name.startswith("base") else model(batch())
    moved = as_lightning_moves(out, torch.device("cpu"))
    kept = moved["hidden_states"] if isinstance(moved, dict) else moved
    assert isinstance(kept, PackedRows)


def test_identity_not_elementwise_comparison():
    first, second = rows(), rows()
    assert first == first  # noqa: PLR0124
    assert first != second
    assert len({first, second}) == 2

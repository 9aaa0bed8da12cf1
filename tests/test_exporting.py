"""``torch.export`` of models on packed batches, for batches of other sizes than the example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jacrev

from ehrseq_fast import accelerate
from ehrseq_fast.exporting import batch_tensors, export_model
from ehrseq_fast.models import ModelWithLoss

from .model_cases import build_plain
from .test_compiled_models import batch, batch_for, build

# without the compiled kernels the layers are PyTorch's, whose decomposition unrolls over the visits
pytestmark = pytest.mark.usefixtures("compiled")

EXPORTED = ("survival", "gru", "own", "own, attention")
SIZES = ((3, 4), (1, 5), (6, 1), (1, 1), (9, 9))

# in a process of its own, which knows the program and the batches from files alone
RUN = """
import sys, torch, ehrseq_fast
from ehrseq_fast.exporting import batch_tensors
folder = sys.argv[1]
batches = torch.load(f"{folder}/batches.pt", weights_only=True)
found = {}
for name in sys.argv[2:]:
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    found[name] = [program(batch_tensors(batch)) for batch in batches]
torch.save(found, f"{folder}/found.pt")
"""


@torch.no_grad()
def test_in_a_fresh_process(tmp_path):
    batches = [batch(*sizes, seed=seed) for seed, sizes in enumerate(SIZES)]
    torch.save(batches, tmp_path / "batches.pt")
    wanted = {}
    for name in EXPORTED:
        model = build(name).eval()
        program = export_model(model, batch(4, 3, seed=9))
        torch.export.save(program, tmp_path / f"{name}.pt2")
        wanted[name] = [model(visits).values for visits in batches]
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *EXPORTED], check=True, cwd=root, timeout=300
    )
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["with time"])
def test_features_and_weights_of_codes_are_inputs(name):
    model = build(name).eval()
    example = batch_for(model, 4, 3, weighted=True)
    program = export_model(model, example).module()
    assert {"code_weights"} <= batch_tensors(example).keys()
    for sizes in SIZES[:2]:
        visits = batch_for(model, *sizes, weighted=True)
        torch.testing.assert_close(program(batch_tensors(visits)), model(visits).values)
        assert not torch.equal(model(visits).values, model(visits.with_code_weights(None)).values)


def test_rows_in_a_dictionary_are_their_values():
    model = build("baseline, attention").eval()
    visits = batch(5, 2)
    found = export_model(model, batch(4, 3)).module()(batch_tensors(visits))
    wanted = model(visits)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found["logits"], wanted["logits"])


def test_a_code_outside_the_table_is_refused():
    model = build("survival").eval()
    program = export_model(model, batch(4, 3)).module()
    tensors = batch_tensors(batch(3, 2))
    codes = tensors["codes"].clone()
    codes[2] = 23
    with pytest.raises(IndexError, match="23"):
        program({**tensors, "codes": codes})


@pytest.mark.parametrize("variant", ["survival", "baseline-attention"])
def test_accelerated_models(variant):
    model = build_plain(variant).eval()
    accelerate(model)
    program = export_model(model, batch(4, 3)).module()
    visits = batch(6, 5)
    found, wanted = program(batch_tensors(visits)), model(visits)
    if variant == "survival":
        torch.testing.assert_close(found, wanted.values)
    else:
        torch.testing.assert_close(found["predictions"], wanted["predictions"])


@pytest.mark.parametrize("name", ["survival", "gru", "competing risks"])
def test_gradients_of_single_patients(name):
    """Those of batches of one, as a Jacobian and by a batched backward pass."""
    training, visits = ModelWithLoss(build(name), reduction="none"), batch(4, 5)
    weights = dict(training.named_parameters())
    loop = [torch.autograd.grad(training(visits[i]).sum(), weights.values()) for i in range(4)]
    wanted = {
        name: torch.stack(of_each)
        for name, of_each in zip(weights, zip(*loop, strict=True), strict=True)
    }
    frozen = {name: weight.detach() for name, weight in weights.items()}
    by_patient = jacrev(lambda weights: functional_call(training, weights, (visits,)))(frozen)
    torch.testing.assert_close(by_patient, wanted)
    batched = torch.autograd.grad(
        training(visits), list(weights.values()), torch.eye(4), is_grads_batched=True
    )
    torch.testing.assert_close(dict(zip(weights, batched, strict=True)), wanted)
    with pytest.raises(ValueError, match="cannot vmap over non-Tensor arguments"):
        torch.func.vmap(training)(visits)


def test_refusals():
    model, visits = build("survival"), batch(3, 2)
    with pytest.raises(ValueError, match=r"model: expected one in eval\(\)"):
        export_model(model, visits)
    with pytest.raises(TypeError, match="batch: expected a PackedVisits, got"):
        export_model(model.eval(), visits.to_padded())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        export_model(torch.relu, visits)

"""From batch to loss through ``forward``: in one process, and in two that share their gradients."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ehrseq_fast import PackedRows
from ehrseq_fast.models import LSTMBaseline, ModelWithLoss
from tests.test_packed_models import MODELS, VOCABULARY, batch, build

NAMES = ("survival", "competing risks", "baseline, attention")
WAYS = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
}
SHARDS = ([0], [1, 2, 3])  # of unequal size
STEPS = 3


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def tasks():
    """Losses whose mean divides by something else than the number of patients."""
    torch.manual_seed(3)
    classes = LSTMBaseline(VOCABULARY, 6, 7, task="multi_class", output_dim=3).eval()
    targets = {
        "kind": torch.tensor([2, 0, -100, 1]),
        "pair": torch.tensor([[0.5, 1], [1, -1], [2, 0], [0, 3]]),
    }
    weight = torch.tensor([1.0, 5.0, 0.5])
    torch.manual_seed(3)
    pairs = LSTMBaseline(VOCABULARY, 6, 7, task="regression", output_dim=2).eval()
    whole = batch(targets=targets)
    return whole, {
        "weighted classes": (classes, {"target": "kind", "weight": weight}),
        "classes": (classes, {"target": "kind"}),
        "pairs": (pairs, {"target": "pair"}),
    }


def of_one_process():
    """Models and options where one process has all patients, and the other an empty shard."""
    whole, models = tasks()
    nobody = whole[[]]
    diverged = build("survival")
    with torch.no_grad():
        diverged.embedding.weight[1] = float("nan")
    sparse = build("survival")
    sparse.embedding.sparse = True
    frozen = build("survival")
    frozen.embedding.requires_grad_(False)
    return {
        **{name: (build(name), {}, batch()[[]]) for name in NAMES[:2]},
        **{name: (model, options, nobody) for name, (model, options) in models.items()},
        "frozen": (frozen, {}, nobody),
        "diverged": (diverged, {}, nobody),
        "sparse": (sparse, {}, nobody),
    }


def wrapped(model, way="plain", **options):
    training = ModelWithLoss(model, across_processes=True, **options)
    training.train()
    model.eval()  # no dropout
    return DistributedDataParallel(training, **WAYS[way])


def train(rank):
    """What one process of two finds: gradients and losses, by what was tried."""
    whole, found = batch(), {}
    shard = whole[SHARDS[rank]]
    for name in NAMES:
        for way in WAYS:
            ddp = wrapped(build(name), way)
            for _ in range(STEPS):
                ddp.zero_grad()
                loss = ddp(shard)
                loss.backward()
            found[name, way] = gradients(ddp), loss.detach()
    # An output that is no tensor: rows, and a dictionary that holds rows.
    for way, options in WAYS.items():
        for name in ("survival", "baseline, attention"):
            ddp = DistributedDataParallel(build(name), **options)
            for _ in range(STEPS):
                ddp.zero_grad()
                out = ddp(shard) if name == "survival" else ddp(shard, return_hidden=True)
                rows = out if name == "survival" else out["hidden_states"]
                assert isinstance(rows, PackedRows)
                loss = rows.values.sum() + (0 if name == "survival" else out["logits"].sum())
                loss.backward()
            found["rows", name, way] = gradients(ddp), loss.detach()
    whole, models = tasks()
    for task, (model, options) in models.items():
        ddp = wrapped(model, **options)
        ddp.zero_grad()
        loss = ddp(whole[SHARDS[rank]])
        loss.backward()
        found[task] = gradients(ddp), loss.detach()
    for name, (model, options, nobody) in of_one_process().items():
        ddp = wrapped(model, **options)
        for _ in range(2):
            ddp.zero_grad()
            loss = ddp(whole if rank == 0 else nobody)
            loss.backward()
        found["nobody", name] = gradients(ddp), loss.detach()
    try:
        ddp(nobody)
    except ValueError as error:
        found["nobody anywhere"] = str(error)
    evaluated = ModelWithLoss(build("survival"), across_processes=True)
    with torch.no_grad():
        found["no gradient"] = [], evaluated(shard) if rank == 0 else torch.zeros(())
    if rank == 0:  # asks nobody, or it would wait for ever
        found["no gradient"] = [], evaluated.eval()(shard).detach()
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two processes found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    place = tmp_path_factory.mktemp("processes")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
    }
    running = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(place)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return [pickle.loads((place / f"{rank}.pkl").read_bytes()) for rank in range(2)]


def check(found, loss, model):
    """Both processes hold the whole batch's gradients; their losses average to its loss."""
    model.zero_grad()
    loss.backward()
    expected = gradients(model)
    for ours, _ in found:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    for first, second in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(first, second)
    mean = sum(value for _, value in found) / 2
    torch.testing.assert_close(mean, loss.detach())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradients_of_one(processes, name, way):
    model = build(name)
    check([found[name, way] for found in processes], model.loss(batch()), model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["survival", "baseline, attention"])
def test_rows_are_seen_as_outputs(processes, name, way):
    model = build(name)
    if name == "survival":
        loss = model(batch()).values.sum() / 2
    else:
        out = model(batch(), return_hidden=True)
        loss = (out["logits"].sum() + out["hidden_states"].values.sum()) / 2
    check([found["rows", name, way] for found in processes], loss, model)


@pytest.mark.parametrize("task", ["weighted classes", "classes", "pairs"])
def test_means_over_anything_else_than_patients(processes, task):
    whole, models = tasks()
    model, options = models[task]
    check([found[task] for found in processes], model.loss(whole, **options), model)


@pytest.mark.parametrize("name", of_one_process())
def test_a_process_without_patients_adds_nothing(processes, name):
    model, options, _ = of_one_process()[name]
    loss = model.loss(tasks()[0], **options)
    loss.backward()
    expected = gradients(model)
    for found in processes:
        for ours, wanted in zip(found["nobody", name][0], expected, strict=True):
            dense = [g if g is None or not g.is_sparse else g.to_dense() for g in (ours, wanted)]
            torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-7, equal_nan=True)
    (_, mine), (_, nobodys) = (found["nobody", name] for found in processes)
    torch.testing.assert_close(mine / 2, loss.detach(), equal_nan=True)
    assert nobodys == 0


def test_nobody_anywhere_is_refused_in_every_process(processes):
    for found in processes:
        assert found["nobody anywhere"] == (
            "batch: expected a patient in at least one process, got none"
        )


def test_without_gradients_nobody_is_asked(processes):
    expected = build("survival").loss(batch()[SHARDS[0]])
    torch.testing.assert_close(processes[0]["no gradient"][1], expected.detach())


@pytest.mark.parametrize("across_processes", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_in_one_process_it_is_the_models_loss(name, across_processes):
    model = build(name)
    training = ModelWithLoss(model, across_processes=across_processes)
    assert torch.equal(training(batch(name)), model.loss(batch(name)))
    seen = []
    model.register_forward_hook(lambda *call: seen.append(call))
    training(batch(name))
    assert len(seen) == 1


def test_options_of_the_constructor_and_of_the_call():
    model, weight = build("survival"), torch.tensor([1.0, 0.0, 2.0, 0.5])
    training = ModelWithLoss(model, censored_visit="included")
    expected = model.loss(batch(), censored_visit="included", sample_weight=weight)
    assert torch.equal(training(batch(), sample_weight=weight), expected)
    assert torch.equal(
        training(batch(), censored_visit="excluded"), model.loss(batch(), censored_visit="excluded")
    )
    assert repr(training).splitlines()[1].strip() == (
        "across_processes=False, censored_visit='included'"
    )


def test_what_is_refused():
    with pytest.raises(TypeError, match="model: expected one with a method loss, got Linear"):
        ModelWithLoss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"reduction: expected 'mean' with .*, got 'sum'"):
        ModelWithLoss(build("survival"), across_processes=True, reduction="sum")
    training = ModelWithLoss(build("survival"), across_processes=True)
    with pytest.raises(ValueError, match="got 'none'"):
        training(batch(), reduction="none")

    class Other(torch.nn.Module):
        def loss(self, batch):
            return F.relu(batch)

    assert ModelWithLoss(Other())(torch.ones(())) == 1
    with pytest.raises(TypeError, match="expected one of this package"):
        ModelWithLoss(Other(), across_processes=True)


if __name__ == "__main__":
    process, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=process, world_size=2)
    results = train(process)
    (directory / f"{process}.pkl").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()

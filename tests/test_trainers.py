"""Every trainer of docs/trainers.md ends with the weights of the plain loop, on every feature."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ehrseq_fast import PackedVisits
from ehrseq_fast.models import ModelWithLoss
from tests.extras import needs
from tests.trainers import ways
from tests.trainers.features import (
    EXACT,
    FEATURES,
    visit_budget,
    weights,
)
from tests.trainers.page import PAGE, definitions
from tests.trainers.ways import ONE, TWO, cells, plain, reset_accelerate, table

pytestmark = [
    needs("trainers"),
    pytest.mark.skipif(
        bool(os.environ.get("EHRSEQ_FAST_NO_COMPILED")), reason="trainers do not know the kernels"
    ),
]

ROOT = Path(__file__).parent.parent
SECONDS = 180  # for two processes, which take 25
two_processes = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@cache
def expected(feature):
    return plain(FEATURES[feature])


def check(found, feature):
    torch.testing.assert_close(found, expected(feature), **FEATURES[feature].tolerance)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_plain_loop_moves_weights_further_than_is_tolerated(feature):
    """Or no cell could fail."""
    start = weights(FEATURES[feature].model())
    with pytest.raises(AssertionError):
        check(start, feature)
    moved = [float((a - b).abs().max()) for a, b in zip(start, expected(feature), strict=True)]
    assert min(moved) > 5 * FEATURES[feature].tolerance["atol"]


@pytest.mark.parametrize(("trainer", "feature"), cells(ONE))
def test_a_trainer_ends_with_the_weights_of_the_plain_loop(trainer, feature):
    check(ONE[trainer](FEATURES[feature]), feature)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two processes found; they run once, for all of pytest-xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder, said = folder / "trainers", folder / "trainers.log"
    try:
        folder.mkdir()
    except FileExistsError:
        until = time.monotonic() + 2 * SECONDS
        while not said.exists() and time.monotonic() < until:
            time.sleep(0.2)
    else:
        output = b""
        try:
            output = run_processes(folder)
        finally:
            said.with_suffix(".part").write_bytes(output)
            said.with_suffix(".part").rename(said)
    files = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), said.read_text()
    return [torch.load(file, weights_only=True) for file in files]


def run_processes(folder):
    """Both processes' results in a folder; what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.trainers.processes", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        try:
            return running.communicate(timeout=SECONDS)[0]
        finally:
            running.terminate()  # and with it its processes


@two_processes
@pytest.mark.parametrize(("trainer", "feature"), cells(TWO))
def test_two_processes_end_with_the_weights_of_the_plain_loop(processes, trainer, feature):
    for found in processes:
        check(found[trainer, feature], feature)


@two_processes
def test_local_means_of_unequal_shares_do_not(processes):
    with pytest.raises(AssertionError):
        check(processes[0]["DDP of local means"], "LSTM")


def test_means_of_unequal_micro_batches_do_not():
    training = FEATURES["LSTM"].training()
    means = ModelWithLoss(training.model)
    means.forward = lambda batch, reduction: len(batch) * training(batch) / 2  # not / 4
    unequal = FEATURES["LSTM"].loader([[0, 1, 2], [3], [4, 5, 6], [7]])
    definitions().accumulated(means, unequal)
    with pytest.raises(AssertionError):
        check(weights(training.model), "LSTM")


@pytest.mark.parametrize("name", ["LSTM", "horizons"])  # of which one has a buffer
def test_averaged_weights_are_those_of_each_step(name):
    feature, steps = FEATURES[name], []
    training = feature.training()
    average = definitions().averaged(training, feature.loader())
    again = feature.training()

    def loss(batch):
        steps.append(weights(again.model))
        return again(batch)

    definitions().plain(again, feature.loader(), loss)
    wanted, *later = [*steps, weights(again.model)]
    for step in later:
        wanted = [0.9 * mean + 0.1 * weight for mean, weight in zip(wanted, step, strict=True)]
    torch.testing.assert_close(weights(average.module), wanted)
    model = copy.deepcopy(training.model)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), wanted, strict=True):
            parameter.copy_(weight)
    losses = [module.loss(feature.patients) for module in (average.module, model)]
    torch.testing.assert_close(*losses)


# Batches of about as many visits each, in another order in each epoch


def by_visits(epochs, together=1):
    """The plain loop over those epochs' batches, so many of them a step."""
    training = FEATURES["LSTM"].training()
    optimizer = torch.optim.SGD(training.parameters(), lr=0.5)
    sampler, loader = visit_budget()
    for epoch in epochs:
        sampler.set_epoch(epoch)
        batches = list(loader)
        batches += batches[: -len(batches) % together]
        for at in range(0, len(batches), together):
            optimizer.zero_grad()
            training(PackedVisits.cat(batches[at : at + together])).backward()
            optimizer.step()
    return weights(training.model)


def test_the_order_of_an_epoch_tells():
    with pytest.raises(AssertionError):
        torch.testing.assert_close(by_visits([0, 0]), by_visits([0, 1]), **EXACT)


@pytest.mark.parametrize("trainer", ["with_lightning", "with_accelerate"])
def test_trainers_tell_the_sampler_of_each_epoch(trainer):
    """Where they look for it; the first epoch's order, again and again, would be no error."""
    reset_accelerate()
    training = FEATURES["LSTM"].training()
    getattr(definitions(), trainer)(training, visit_budget()[1])
    torch.testing.assert_close(weights(training.model), by_visits([0, 1]), **EXACT)


@two_processes
def test_samplers_that_divide_batches(processes):
    for found in processes:
        torch.testing.assert_close(found["by visits"], by_visits([0, 1]), **EXACT)
        assert "use_distributed_sampler=False" in found["divided again by Lightning"]
        # nobody tells the sampler of a loader that is not prepared
        torch.testing.assert_close(found["by visits", True], by_visits([0, 0]), **EXACT)


@two_processes
def test_accelerate_divides_batches_of_visits(processes):
    """Two to a step; an odd last one goes with the epoch's first."""
    expected = by_visits([0, 1], together=2)
    for found in processes:
        torch.testing.assert_close(found["by visits", False], expected, **EXACT)


def test_lightning_predicts_batches_of_visits():
    model, (_, loader) = FEATURES["LSTM"].training(), visit_budget()
    rows = definitions().lightning_trainer().predict(definitions().Module(model), loader)
    for ours, batch in zip(rows, loader, strict=True):
        torch.testing.assert_close(ours.values, model.model(batch).values)


# Validation and predictions


def test_lightning_validates_and_predicts():
    """Batches of three, three and two: the mean is that of patients, and the order the loader's."""
    feature = FEATURES["LSTM"]
    training, trainer = feature.training(), definitions().lightning_trainer()
    module = definitions().Module(training)
    (logged,) = trainer.validate(module, feature.loader(3), verbose=False)
    assert logged["loss"] == pytest.approx(training(feature.patients).item(), rel=1e-6)
    rows = trainer.predict(module, feature.loader(3))
    risks = torch.cat([of_batch.last() for of_batch in rows])
    torch.testing.assert_close(risks, training.model(feature.patients).last())


def test_lightning_is_told_the_batch_size():
    """It looks for tensors of one size, which no batch could show it; nothing is guessed."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    class Untold(definitions().Module):
        def validation_step(self, batch, number):
            self.log("loss", self.with_loss(batch))

    feature = FEATURES["LSTM"]
    with pytest.raises(MisconfigurationException, match=r"self\.log\(\.\.\., batch_size"):
        definitions().lightning_trainer().validate(Untold(feature.training()), feature.loader(3))


@two_processes
def test_lightning_validates_and_predicts_in_two_processes(processes):
    feature = FEATURES["LSTM"]
    model = feature.model()
    loss, risks = model.loss(feature.patients), model(feature.patients).last()
    for rank, found in enumerate(processes):
        assert found["validated"][0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(found["predicted"], risks[rank::2])


@two_processes
def test_accelerate_gathers_patients_once_and_in_order(processes):
    feature = FEATURES["LSTM"]
    risks = feature.model()(feature.patients[:7]).last()
    for found in processes:
        torch.testing.assert_close(found["gathered"], risks)


def test_accelerate_dispatches_no_batches():
    """It cuts tensors alone, and says so."""
    from accelerate import Accelerator, DataLoaderConfiguration

    reset_accelerate()
    dispatching = DataLoaderConfiguration(dispatch_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=dispatching)
    with pytest.raises(TypeError, match=r"tensors but got .*PackedVisits"):
        list(accelerator.prepare(FEATURES["LSTM"].loader()))
    reset_accelerate()


@two_processes
def test_accelerate_dispatches_padded_tensors(processes):
    for found in processes:
        check(found["dispatched"], "LSTM")


def test_the_page_has_the_table():
    """`python -m tests.trainers.ways` prints it."""
    begin, end = "<!-- trainers -->\n", "\n<!-- end trainers -->"
    assert PAGE.read_text().split(begin)[1].split(end)[0] == table()
    assert set(ways.OF_LABELS) < set(FEATURES)


def test_the_tests_that_the_page_names_are_there():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert len(named) > 10
    assert named <= set(globals())

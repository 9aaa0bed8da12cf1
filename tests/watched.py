"""A change made to the same model three times, once per path: losses, gradients and one step must
agree, and must not be those of the model as it was built."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ehrseq_fast.models.base import PATHS

from .test_packed_models import batch, build

BASELINES = [f"baseline, {aggregation}" for aggregation in ("mean", "max", "attention")]
MODELS = ["survival", "with time", "competing risks", *BASELINES]
WHOLE = ["survival", "with time", "competing risks", "baseline, attention"]  # every kind of module


def scaled(output):
    if isinstance(output, PackedSequence):
        return output._replace(data=1.5 * output.data)
    if isinstance(output, tuple):
        return tuple(scaled(part) for part in output)
    return 1.5 * output


def results(model, **options):
    """Loss, gradients by name (dense), and what the model says after one step."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(batch(model), **options)
    loss.backward()
    gradients = {
        name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()
    }
    state = model.start(2)
    features = torch.ones(2, 3) if model._n_visit_features else None
    answer, state = model.step(state, [[1, 2, 2], [3]], features)
    answer = answer["logits"] if isinstance(answer, dict) else answer
    return loss.detach(), gradients, answer, state.h


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)


def differs(ours, theirs):
    try:
        assert_same(ours[:2], theirs[:2])
    except AssertionError:
        return True
    return ours[1].keys() != theirs[1].keys()


def check(name, change, *, called=None, effect=True):
    """``change(model)`` on all paths; ``called`` is a list that grows where something is called."""
    before, found = results(build(name)), {}
    for path in PATHS:
        model = build(name, path=path)
        seen = len(called) if called is not None else 0
        with contextlib.ExitStack() as stack:
            undo = change(model)
            if callable(undo):
                stack.callback(undo)
            found[path] = results(model)
        assert called is None or len(called) > seen, f"nothing was called on path {path}"
        assert not effect or differs(found[path], before), f"no effect on path {path}"
    assert_same(found["fused"], found["padded"])
    assert_same(found["packed"], found["padded"])


class Shifted(nn.Embedding):
    def forward(self, codes):
        return super().forward(codes) + 1

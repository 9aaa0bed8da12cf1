"""Weights, arguments and precisions at which a ``forward`` may compute something else than what the
fused forward pass does, though both agree on usual ones."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .examples import in_32_bits, without_codes
from .fused_forward import Fused, run_fused
from .trials import difference, end_alike, is_same, tensors_of

_LARGE = 2.0**20  # as features of visits that are seconds of some days
_END = 600.0  # a logit of which the probability is 1, and nearly 0
_USUAL = 8.0  # times an embedding's small random rows, for numbers near 1
# relative and absolute: ten times what rounding in float32 is, a hundredth of that in bfloat16
_IN_32_BITS = (2e-5, 1e-5)
_MORE_ROUNDED = 8  # errors of two ways to round as many sums are seldom so far apart


def at_extremes(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what the two differ there; empty where they do not."""
    found = visits_without_codes(fused, twin, inputs)
    if not found and not is_same_of_sizes(fused, twin, inputs):
        found = "its forward changes large or small numbers"
    if not found:
        found = _of_precision(fused, twin, inputs)
    if found or fused.form in ("encoder", "pool"):
        return found
    if fused.form == "with_time" and not _reads_features(fused, twin, inputs):
        return "its forward changes time features"
    at_ends = _reaches_ends(fused, twin, inputs)
    return "" if at_ends else "its forward changes probabilities near 0 or 1"


# Visits without a code ----------------------------------------------------------------------------


def visits_without_codes(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """Zeros are the vector of a visit without a code, which to some is another vector. Where they
    are -inf or NaN to a model, results are not compared."""
    for given in without_codes(fused.form, inputs, _padding_of(fused)):
        if not is_same(fused, twin, given, or_no_number=True):
            return "its forward computes something else, or nothing, of visits without a code"
    return ""


def gives_zeros(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a visit without a code is zeros to the module's own forward too."""
    given = without_codes(fused.form, inputs, _padding_of(fused))
    return all(is_same(fused, twin, one) for one in given)


def _padding_of(fused: Fused) -> int | None:
    return None if fused.pooling is None else fused.pooling.padding


# Sizes of numbers ---------------------------------------------------------------------------------


@torch.no_grad()
def is_same_of_sizes(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether the outputs are the same where numbers between layers are large, and small, and the
    weights that read them as much smaller, and larger."""
    for factor in (_LARGE, 1 / _LARGE):
        if fused.form == "encoder":
            scaled = (inputs[0] * factor, *inputs[1:])
            same = twin.aggregation == "attention" or is_same(fused, twin, scaled)
        else:
            with _between_layers(fused.form, twin, factor):
                same = is_same(fused, twin, inputs)
        if not same:
            return False
    return True


@contextlib.contextmanager
def _between_layers(form: str, twin: Any, factor: float) -> Iterator[None]:
    """Numbers between layers times ``factor``, a power of two, which rounds nothing."""
    larger, smaller = _weights_between(form, twin)
    for tensors, by in ((larger, factor), (smaller, 1 / factor)):
        for tensor in tensors:
            tensor.mul_(by)
    try:
        yield
    finally:
        for tensors, by in ((larger, 1 / factor), (smaller, factor)):
            for tensor in tensors:
                tensor.mul_(by)


def _weights_between(form: str, twin: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of what gives numbers, and of what reads them; a ReLU between both scales likewise."""
    if form == "pool":
        return [next(iter(twin.children())).weight], []
    width = twin.embedding.embedding_dim
    readers = [w for name, w in twin.lstm.named_parameters() if name.startswith("weight_ih_l0")]
    larger, smaller = [twin.embedding.weight], [w[:, :width] for w in readers]
    heads = list(getattr(twin, "hazard_heads", []))
    if hasattr(twin, "hazard_head"):
        heads.append(twin.hazard_head)
    for head in heads:
        larger += _parameters(head[0])
        smaller.append(head[3].weight)
    if form == "with_time":
        first, _, last = twin.time_encoder
        larger += [*_parameters(first), last.bias] if last.bias is not None else _parameters(first)
        smaller += [w[:, width:] for w in readers]
    attention = getattr(getattr(twin, "visit_encoder", None), "attention", None)
    if attention is not None:
        smaller.append(attention[0].weight)
    return larger, smaller


def _parameters(layer: nn.Module) -> list[Tensor]:
    return list(layer.parameters())


# Precision ----------------------------------------------------------------------------------------


@torch.no_grad()
def _of_precision(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what results differ in float32, of which autocast changes the dtype or the digits as it
    does not of float64: turned on within ``forward``, or off there while it is on outside."""
    kind: Any = fused.kind
    single = copy.deepcopy(twin).float()
    for part in single.children():
        if isinstance(part, nn.Embedding):
            part.weight.mul_(_USUAL)
    given = in_32_bits(tuple(v.detach() if isinstance(v, Tensor) else v for v in inputs))
    if not is_same(fused, single, given, tolerance=_IN_32_BITS):
        return "its forward computes something else in float32"
    exact = tensors_of(kind.forward(single.eval(), *given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = tensors_of(kind.forward(single, *given))
        ours = tensors_of(run_fused(fused, single, list(given)))
    for one, other, value in zip(ours, theirs, exact, strict=True):
        error, allowed = _largest(one - value), _largest(other - value)
        if error > _MORE_ROUNDED * allowed + _IN_32_BITS[1]:
            return "its forward turns autocast off"
    return ""


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


# Time features, probabilities ---------------------------------------------------------------------


@torch.no_grad()
def _reads_features(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether time features are taken as they are: large ones, to weights as much smaller, and NaN,
    which has to show."""
    kind: Any = fused.kind
    weight = twin.time_encoder[0].weight
    *others, features = inputs
    weight.div_(_LARGE)
    same = is_same(fused, twin, (*others, features * _LARGE))
    weight.mul_(_LARGE)
    first = torch.zeros_like(features)
    first[0, 0] = torch.nan
    for training in (False, True):
        output = kind.forward(twin.train(training), *others, features + first)
        same = same and bool(output[0, 0].isnan())
    return same


@torch.no_grad()
def _reaches_ends(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether probabilities are the same where all are nearly 0, or 1."""
    heads = [twin.fc] if fused.form == "baseline" else getattr(twin, "hazard_heads", None)
    last = [twin.hazard_head[3]] if heads is None else [getattr(h, "3", h) for h in heads]
    kind: Any = fused.kind
    twin.eval()
    for logit in (-_END, _END):
        for layer in last:
            if layer.bias is not None:
                layer.bias[:1] += logit
        theirs, ours = kind.forward(twin, *inputs), run_fused(fused, twin, list(inputs))
        for layer in last:
            if layer.bias is not None:
                layer.bias[:1] -= logit
        if not end_alike(tensors_of(ours), tensors_of(theirs)):
            return False
    return True


# Ties ---------------------------------------------------------------------------------------------


DIVIDED = "its forward sends the gradient of equal codes to others of them"


def divides_ties(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a maximum of several codes sends its gradient to others of them than here."""
    values: Any = inputs[0] if fused.form == "encoder" else None
    tables = [part.weight for part in twin.children() if isinstance(part, nn.Embedding)]
    rounded: list[Tensor] = [values] if values is not None else tables
    kept = [tensor.detach().clone() for tensor in rounded]
    with torch.no_grad():
        for tensor in rounded:
            tensor.sign_()
    try:
        return bool(difference(fused, twin, inputs))
    finally:
        with torch.no_grad():
            for tensor, before in zip(rounded, kept, strict=True):
                tensor.copy_(before)

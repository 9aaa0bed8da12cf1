"""Whether a module of a known form computes what the fused forward pass does.

Both are run, in float64, on a copy of the module with random weights and a short table, and their
outputs and gradients compared: in ``eval()``, and in training with every dropout set to 0, where a
dropout of the ``forward``'s own would show; with weights of usual size, and with large ones, where
a clamp would. The module itself is neither called nor changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fused_forward import NOT_SERVED, Fused, Pooling, describe, run_fused

_ROWS = 48
_LENGTHS = (2, 4, 3)
_CODES = 5
_LARGE = 64  # times the weights, where clamps show; a power of two, which rounds nothing
_MASKS = (torch.bool, torch.int64, torch.float32)


def compare(module: nn.Module, form: str) -> tuple[Fused | None, str]:
    """The description to fuse ``module`` by, or None and the reason against it."""
    fused = describe(module, form)
    if fused is None:
        return None, "its forward takes other arguments"
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
            twin = _twin(module)
            if form == "pool":
                return _compare_pool(fused, twin)
            found = _difference(fused, twin, _inputs(form, twin))
            return (None, found) if found else (fused, "")
    except Exception as error:  # of a forward that is not known, on a batch that it did not ask for
        return None, f"it could not be compared: {type(error).__name__}: {error}"


def _twin(module: nn.Module) -> Any:
    """A copy with other weights, in float64 on the CPU, without the module's own hooks."""
    memo: dict[int, Any] = {}
    for table in module._modules.values():
        if isinstance(table, nn.Embedding):
            rows = max(_ROWS, (table.padding_idx or 0) + 1)
            memo[id(table.weight)] = nn.Parameter(table.weight.detach()[:rows].clone())
    twin = copy.deepcopy(module, memo).to("cpu", torch.float64)
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in twin.parameters():
        scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        with torch.no_grad():
            parameter.normal_(0, scale, generator=generator)
        parameter.requires_grad_(True)
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.RNNBase):
            part.dropout = 0.0
    return twin


def _inputs(form: str, twin: Any) -> tuple[Any, ...]:
    """Arguments whose padded slots hold numbers too, and whose padded visits codes."""
    generator = torch.Generator("cpu").manual_seed(1)
    patients, visits = len(_LENGTHS), max(_LENGTHS)
    shape = (patients, visits, _CODES)
    visit_mask = (torch.rand(shape, generator=generator) < 0.5).long()
    aggregation = getattr(getattr(twin, "visit_encoder", twin), "aggregation", "mean")
    if aggregation in ("max", "attention"):
        visit_mask[..., 1] = 1  # a visit without a code is -inf or NaN to some, and zeros here
    else:
        visit_mask[0, 1] = 0
    if form == "encoder":
        weight = next(twin.parameters(), None)
        width = 6 if weight is None else weight.shape[-1]
        embeddings = torch.randn(
            patients * visits, _CODES, width, dtype=torch.float64, generator=generator
        )
        return embeddings.requires_grad_(), visit_mask.flatten(0, 1)
    codes = torch.randint(len(twin.embedding.weight), shape, generator=generator)
    sequence_mask = (torch.arange(visits) < torch.tensor(_LENGTHS)[:, None]).long()
    masks = (visit_mask, sequence_mask)
    if form == "with_time":
        features = torch.randn(patients, visits, 3, dtype=torch.float64, generator=generator)
        return codes, *masks, features
    return (codes, *masks, True) if form == "baseline" else (codes, *masks)


def _difference(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what the two differ; empty where they do not."""
    for factor in (1, _LARGE):
        _scale(twin, factor)
        try:
            found = _difference_as_it_is(fused, twin, inputs)
        finally:
            _scale(twin, 1 / factor)
        if found:
            return found
    return "its forward hides a NaN" if _hides_nan(fused, twin, inputs) else ""


@torch.no_grad()
def _hides_nan(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a NaN in the row of a real code reaches no output of the module's own forward."""
    real = _real(fused, inputs)
    given = inputs[0].detach().clone()
    pool: Any = next(iter(twin.children()), None)
    table = given if fused.form == "encoder" else getattr(twin, "embedding", pool).weight
    row = real.nonzero()[0].tolist() if fused.form == "encoder" else [int(given[real][0])]
    kept = table[tuple(row)].clone()
    table[tuple(row)] = torch.nan
    try:
        kind: Any = fused.kind
        output = kind.forward(twin.eval(), given, *inputs[1:])
    finally:
        table[tuple(row)] = kept
    values = output.values() if isinstance(output, dict) else [output]
    return not any(bool(value.isnan().any()) for value in values)


def _real(fused: Fused, inputs: tuple[Any, ...]) -> Tensor:
    """Slots that hold codes, of what :func:`_inputs` or :func:`_compare_pool` made."""
    if len(inputs) == 1:
        padding = None if fused.pooling is None else fused.pooling.padding
        return torch.ones_like(inputs[0]).bool() if padding is None else inputs[0] != padding
    real = inputs[1] != 0
    return real if fused.form in ("encoder", "pool") else real & (inputs[2] != 0).unsqueeze(-1)


def _scale(twin: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(factor)


def _difference_as_it_is(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    kind: Any = fused.kind
    for training in (False, True):
        twin.train(training)
        before = dict(twin.__dict__)
        theirs = _results(twin, kind.forward(twin, *inputs), inputs)
        changed = [name for name, value in twin.__dict__.items() if before.get(name) is not value]
        if changed:
            return f"its forward sets attributes ({', '.join(sorted(changed))})"
        output = run_fused(fused, twin, list(inputs))
        if output is NOT_SERVED:
            return "the fused forward pass does not take its arguments"
        ours = _results(twin, output, inputs)
        if not _are_close(ours[0], theirs[0]):
            is_both_ways = getattr(getattr(twin, "lstm", None), "bidirectional", False)
            why = ", as a bidirectional layer that reads padding does" if is_both_ways else ""
            return f"its forward computes something else{why}"
        if not _are_close(ours[1], theirs[1]):
            return "its gradients are others"
    return ""


def _results(
    twin: nn.Module, output: Any, inputs: tuple[Any, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    values = output if isinstance(output, dict) else {"": output}
    outputs = [values[name] for name in sorted(values)]
    if not all(isinstance(value, Tensor) for value in outputs):
        raise TypeError(f"expected a tensor or a dict of them, got {type(output).__name__}")
    sources = [*twin.parameters(), *(i for i in inputs if _asks_gradient(i))]
    generator = torch.Generator("cpu").manual_seed(2)
    total = sum(
        (value * torch.randn(value.shape, dtype=torch.float64, generator=generator)).sum()
        for value in outputs
    )
    gradients = torch.autograd.grad(total, sources, allow_unused=True)
    dense = [g.to_dense() if g is not None else torch.zeros(()) for g in gradients]
    return [value.detach() for value in outputs], dense


def _asks_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _are_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.allclose(one, other, rtol=1e-6, atol=1e-9)
        for one, other in zip(ours, theirs, strict=True)
    )


# Modules that pool an embedding's rows ------------------------------------------------------------


def _compare_pool(fused: Fused, twin: Any) -> tuple[Fused | None, str]:
    embedding = next(iter(twin.children()))
    generator = torch.Generator("cpu").manual_seed(1)
    rows = embedding.weight.shape[0]
    codes = torch.randint(rows, (2, 4, _CODES), generator=generator)
    mask = torch.rand(codes.shape, generator=generator) < 0.5
    mask[..., 1] = True
    padding = 0 if embedding.padding_idx is None else embedding.padding_idx
    codes[..., 1:3] = torch.where(mask[..., 1:3], codes[..., 1:3], padding)
    codes[..., 1] = (padding + 1 + torch.arange(8).view(2, 4)) % rows
    takes_mask = len(fused.arguments) == 2
    for mode in ("mean", "sum", "max"):
        for own in (padding,) if takes_mask else (padding, None):
            found = _pooling(fused, twin, codes, mask if takes_mask else None, mode, own)
            if found is not None:
                made = Fused(fused.kind, "pool", fused.arguments, pooling=found)
                return made, ""
    return None, "its forward computes no masked mean, sum or maximum of its embedding's rows"


def _pooling(
    fused: Fused, twin: Any, codes: Tensor, mask: Tensor | None, mode: str, padding: int | None
) -> Pooling | None:
    def agrees(codes: Tensor, mask: Tensor | None, weighted: bool = False) -> bool:
        dtypes = () if mask is None else (mask.dtype,)
        pooling = Pooling(mode, padding, (codes.dim(),), dtypes, weighted)
        made = Fused(fused.kind, "pool", fused.arguments, pooling=pooling)
        inputs = (codes,) if mask is None else (codes, mask)
        try:
            return _difference(made, twin, inputs) == ""
        except Exception:  # it takes no such codes or masks
            return False

    if mask is None:
        dimensions = tuple(given.dim() for given in (codes, codes[0]) if agrees(given, None))
        return Pooling(mode, padding, dimensions, (), False) if dimensions else None
    kinds = tuple(kind for kind in _MASKS if agrees(codes, mask.to(kind)))
    flat = tuple(kind for kind in _MASKS if agrees(codes[0], mask[0].to(kind)))
    dimensions = tuple(d for d, fits in ((3, kinds), (2, flat)) if fits)
    both = tuple(kind for kind in _MASKS if all(kind in fits for fits in (kinds, flat) if fits))
    if not dimensions or not both:
        return None
    like = codes if kinds else codes[0]
    light = (mask if kinds else mask[0]).float() * 0.1
    weighted = torch.float32 in both and agrees(like, light, True)
    return Pooling(mode, None, dimensions, both, weighted)

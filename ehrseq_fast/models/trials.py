"""One comparison of a module's own forward with the fused forward pass: outputs and gradients on
given arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import contents_of
from .fused_forward import NOT_SERVED, Fused, run_fused

SETS = "its forward sets attributes"
_LARGE_GRADIENT = 2.0**30
_LARGE = 64  # times the weights, where clamps show; a power of two, which rounds nothing
_TOLERANCES = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-4, 1e-5)}  # relative, absolute


@torch.no_grad()
def is_same(
    fused: Fused,
    twin: Any,
    inputs: tuple[Any, ...],
    *,
    or_refused: bool = False,
    or_no_number: bool = False,
    tolerance: tuple[float, float] | None = None,
) -> bool:
    """Whether the outputs are the same, of weights as they are; or the module's own forward does
    not take the arguments, where that does as well; but for those that are NaN or infinite by its
    own forward, where these do not count."""
    kind: Any = fused.kind
    try:
        for training in (False, True):
            twin.train(training)
            try:
                theirs = kind.forward(twin, *inputs)
            except Exception:
                return or_refused
            ours = run_fused(fused, twin, list(inputs))
            if ours is NOT_SERVED:
                return False
            found, expected = tensors_of(ours), tensors_of(theirs)
            if or_no_number:
                expected = [
                    _or_else(one, other) for one, other in zip(expected, found, strict=True)
                ]
            if not are_close(found, expected, tolerance):
                return False
    except Exception:  # it takes no such arguments
        return False
    return True


def _or_else(value: Tensor, other: Tensor) -> Tensor:
    """``value`` where it is finite, ``other`` elsewhere."""
    return torch.where(value.isfinite(), value, other) if value.shape == other.shape else value


def tensors_of(output: Any) -> list[Tensor]:
    values = output if isinstance(output, dict) else {"": output}
    found = [values[name] for name in sorted(values)]
    if not all(isinstance(value, Tensor) for value in found):
        raise TypeError(f"expected a tensor or a dict of them, got {type(output).__name__}")
    return found


def difference(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what the two differ; empty where they do not."""
    for factor in (1, _LARGE):
        _scale(twin, factor)
        try:
            found = _difference_as_it_is(fused, twin, inputs)
        finally:
            _scale(twin, 1 / factor)
        if found:
            return found
    return _hides(fused, twin, inputs)


@torch.no_grad()
def _hides(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """What of a NaN or an infinity in the row of a real code does not show in the outputs of the
    module's own forward where it does here; empty for nothing."""
    real = real_slots(fused, inputs)
    given = inputs[0].detach().clone()
    pool: Any = next(iter(twin.children()), None)
    table = given if fused.form == "encoder" else getattr(twin, "embedding", pool).weight
    row = real.nonzero()[0].tolist() if fused.form == "encoder" else [int(given[real][0])]
    kept = table[tuple(row)].clone()
    twin.eval()
    try:
        for value, name in ((torch.nan, "a NaN"), (torch.inf, "an infinity")):
            table[tuple(row)] = value
            kind: Any = fused.kind
            theirs = tensors_of(kind.forward(twin, given, *inputs[1:]))
            ours = tensors_of(run_fused(fused, twin, [given, *inputs[1:]]))
            for one, other in zip(ours, theirs, strict=True):
                if bool((other.isfinite() & ~one.isfinite()).any()):
                    return f"its forward hides {name}"
            if name == "a NaN" and not any(bool(other.isnan().any()) for other in theirs):
                return f"its forward hides {name}"
    finally:
        table[tuple(row)] = kept
    return ""


def real_slots(fused: Fused, inputs: tuple[Any, ...]) -> Tensor:
    """Slots that hold codes, of the arguments that models are compared on."""
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
        before = _contents(twin)
        theirs = _results(twin, kind.forward(twin, *inputs), inputs)
        after = _contents(twin)
        changed = [name for name, value in after.items() if before.get(name) != value]
        if changed:
            return f"{SETS} ({', '.join(sorted(changed))})"
        output = run_fused(fused, twin, list(inputs))
        if output is NOT_SERVED:
            return "the fused forward pass does not take its arguments"
        ours = _results(twin, output, inputs)
        same = are_close(ours[0], theirs[0]) and (
            fused.form in ("pool", "encoder") or end_alike(ours[0], theirs[0])
        )
        if not same:
            is_both_ways = getattr(getattr(twin, "lstm", None), "bidirectional", False)
            why = ", as a bidirectional layer that reads padding does" if is_both_ways else ""
            return f"its forward computes something else{why}"
        if not are_close(ours[1], theirs[1]):
            return "its gradients are others"
    return ""


def _contents(twin: nn.Module) -> dict[str, Any]:
    """What can be compared of the attributes of a module and of its parts."""
    return {
        f"{part}.{name}" if part else name: value
        for part, module in twin.named_modules()
        for name, value in contents_of(module).items()
    }


def _results(
    twin: nn.Module, output: Any, inputs: tuple[Any, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = tensors_of(output)
    sources = [*twin.parameters(), *(i for i in inputs if _asks_gradient(i))]
    generator = torch.Generator("cpu").manual_seed(2)
    total: Any = sum(
        (value * torch.randn(value.shape, dtype=torch.float64, generator=generator)).sum()
        for value in outputs
    )
    # large ones, which a hook within ``forward`` may clamp
    gradients = torch.autograd.grad(total * _LARGE_GRADIENT, sources, allow_unused=True)
    dense = [
        g.to_dense() / _LARGE_GRADIENT if g is not None else torch.zeros(()) for g in gradients
    ]
    return [value.detach() for value in outputs], dense


def _asks_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def are_close(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: tuple[float, float] | None = None
) -> bool:
    return len(ours) == len(theirs) and all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.allclose(one, other, *(tolerance or _TOLERANCES[one.dtype]))
        for one, other in zip(ours, theirs, strict=True)
    )


def end_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether probabilities near 0 and 1, of which logarithms are taken, are the same in relation
    to what they are and lack."""
    for one, other in zip(ours, theirs, strict=True):
        if one.dtype != torch.float64 or not ((other >= 0) & (other <= 1)).all():
            continue
        near_0 = torch.allclose(one, other, rtol=1e-6, atol=1e-290)
        if not near_0 or not torch.allclose(1 - one, 1 - other, rtol=1e-6, atol=1e-15):
            return False
    return True

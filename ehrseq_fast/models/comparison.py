"""Whether a module of a known form computes what the fused forward pass does.

Both are run, in float64, on a copy of the module with random weights, and their outputs and
gradients compared: in ``eval()``, and in training with every dropout set to 0, where a dropout of
the ``forward``'s own would show; with weights of usual size, and with large ones, where a clamp
would. Each of the first and of the last codes is among the real ones, where a code that is treated
in another way would show, and a batch of many visits and of many codes shows that none are cut off.
For which masks and which arguments left out both agree is found out for each. The module itself is
neither called nor changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import MayChange, contents_of, options_among, reads_of
from .fused_forward import NOT_SERVED, Fused, Pooling, Served, describe, run_fused, state_of

_TABLE = 2**21  # numbers of an embedding that are copied, which more of them would make slow
_LENGTHS = (2, 4, 3)
_CODES = 32
_LONG = 600  # visits, and codes of a visit: more than most models cut records to
_WORK = 10**9  # products of visits and weights of a layer: a large one reads fewer visits
_LARGE = 64  # times the weights, where clamps show; a power of two, which rounds nothing
_MASKS = (torch.bool, torch.int64, torch.float32)
_SETS = "its forward sets attributes"
_TOLERANCES = {torch.float64: (1e-6, 1e-9), torch.float32: (1e-4, 1e-5)}  # relative, absolute


def compare(module: nn.Module, form: str) -> tuple[Fused | None, str]:
    """The description to fuse ``module`` by, or None and the reason against it."""
    fused = describe(module, form)
    if fused is None:
        return None, "its forward takes other arguments"
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
            twin = _twin(module)
            found, reason = (_compare_pool if form == "pool" else _compare_model)(fused, twin)
            if found is None:
                return None, reason
            found = _with_reads(found, twin)
            state_of(found, module)
            return found, ""
    except MayChange as name:
        return None, f"its forward reads what may change unseen, as a tensor or an array ({name})"
    except Exception as error:  # of a forward that is not known, on a batch that it did not ask for
        return None, f"it could not be compared: {_told(error)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_reads(fused: Fused, twin: Any) -> Fused:
    """With the names of the attributes that its own forward reads."""
    twin = copy.deepcopy(twin).float()
    encoder = twin.visit_encoder if fused.form == "baseline" else nn.Module()
    names: set[str] = set()
    of_encoder: set[str] = set()
    kind: Any = fused.kind
    for training in (False, True):
        twin.train(training)
        for inputs in _examples(fused, twin):
            with torch.no_grad(), reads_of(twin) as read, reads_of(encoder) as read_inside:
                kind.forward(twin, *_in_32_bits(inputs))
            names |= read
            of_encoder |= read_inside
    return replace(
        fused,
        reads=options_among(names, twin),
        encoder_reads=options_among(of_encoder, encoder),
    )


def _examples(fused: Fused, twin: Any) -> list[tuple[Any, ...]]:
    """Arguments of every kind that is served."""
    if fused.pooling is not None:
        masks = fused.pooling.masks
        codes = torch.zeros((1,) * fused.pooling.dimensions[0], dtype=torch.int64)
        return [(codes, torch.ones(codes.shape, dtype=kind)) for kind in masks] or [(codes,)]
    assert fused.served is not None
    examples = [_inputs(fused.form, twin, kind) for kind in fused.served.masks]
    return examples + [_without(examples[0], lacking) for lacking in fused.served.lacking]


def _in_32_bits(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """As most models are run: where an argument is left out, some make one in float32."""
    is_double = [isinstance(value, Tensor) and value.dtype == torch.float64 for value in inputs]
    return tuple(v.float() if double else v for v, double in zip(inputs, is_double, strict=True))


def _without(inputs: tuple[Any, ...], lacking: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(None if place in lacking else value for place, value in enumerate(inputs))


# Models and visit encoders ------------------------------------------------------------------------


_LACKING: dict[str, tuple[tuple[int, ...], ...]] = {
    "baseline": ((1,), (2,), (1, 2)),
    "with_time": ((3,),),
    "encoder": ((1,),),
}


def _compare_model(fused: Fused, twin: Any) -> tuple[Fused | None, str]:
    form = fused.form
    everything = Served(_MASKS, True, _LACKING.get(form, ()))
    trial = replace(fused, served=everything)
    masks: list[torch.dtype] = []
    reasons: list[str] = []
    for dtype in _MASKS:
        inputs = _inputs(form, twin, dtype)
        try:
            found = "" if masks and _is_same(trial, twin, inputs) else None
            found = _difference(trial, twin, inputs) if found is None else found
        except Exception as error:  # as of ~ with numbers, or - with bool
            reasons.append(f"it could not be compared: {_told(error)}")
            continue
        if not found:
            masks.append(dtype)
        elif found.startswith(_SETS):
            return None, found
        else:
            reasons.insert(0, found)
    if not masks:
        return None, reasons[0]
    inputs = _inputs(form, twin, masks[0])
    for longer in _long_inputs(form, twin, masks[0]):
        if not _is_same(trial, twin, longer):
            return None, "its forward computes something else of many visits or codes"
    if form == "baseline" and not _is_same(trial, twin, (*inputs[:3], False)):
        return None, "its forward returns something else without hidden states"
    light = [_inputs(form, twin, torch.float32, weight) for weight in (0.01, 1.7)]
    single, inputs = copy.deepcopy(twin).float(), _in_32_bits(inputs)
    served = Served(
        masks=tuple(masks),
        weighted=torch.float32 in masks and all(_is_same(trial, twin, one) for one in light),
        lacking=tuple(
            lacking
            for lacking in everything.lacking
            if _is_same(trial, single, _without(inputs, lacking))
        ),
    )
    return replace(fused, served=served), ""


@torch.no_grad()
def _is_same(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether the outputs are the same, of weights as they are."""
    kind: Any = fused.kind
    try:
        for training in (False, True):
            twin.train(training)
            theirs, ours = kind.forward(twin, *inputs), run_fused(fused, twin, list(inputs))
            if ours is NOT_SERVED or not _are_close(_outputs(ours), _outputs(theirs)):
                return False
    except Exception:  # it takes no such arguments
        return False
    return True


def _outputs(output: Any) -> list[Tensor]:
    values = output if isinstance(output, dict) else {"": output}
    outputs = [values[name] for name in sorted(values)]
    if not all(isinstance(value, Tensor) for value in outputs):
        raise TypeError(f"expected a tensor or a dict of them, got {type(output).__name__}")
    return outputs


def _twin(module: nn.Module) -> Any:
    """A copy with other weights, in float64 on the CPU, without the module's own hooks."""
    memo: dict[int, Any] = {}
    for table in module._modules.values():
        if isinstance(table, nn.Embedding):
            rows = max(_TABLE // table.embedding_dim, (table.padding_idx or 0) + 1)
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


def _inputs(form: str, twin: Any, dtype: torch.dtype, weight: float = 1.0) -> tuple[Any, ...]:
    """Arguments whose padded slots hold numbers too, and whose padded visits codes; with masks of
    a dtype, and of codes that weigh up to ``weight``."""
    generator = torch.Generator("cpu").manual_seed(1)
    patients, visits = len(_LENGTHS), max(_LENGTHS)
    shape = (patients, visits, _CODES)
    real = torch.rand(shape, generator=generator) < 0.5
    aggregation = getattr(getattr(twin, "visit_encoder", twin), "aggregation", "mean")
    if aggregation in ("max", "attention"):
        real[..., 1] = True  # a visit without a code is -inf or NaN to some, and zeros here
    else:
        real[0, 1] = False
    visit_mask = real.to(dtype)
    if weight != 1:
        visit_mask = visit_mask * weight * torch.rand(shape, generator=generator)
    if form == "encoder":
        parameter = next(twin.parameters(), None)
        width = 6 if parameter is None else parameter.shape[-1]
        embeddings = torch.randn(
            patients * visits, _CODES, width, dtype=torch.float64, generator=generator
        )
        return embeddings.requires_grad_(), visit_mask.flatten(0, 1)
    is_visit = torch.arange(visits) < torch.tensor(_LENGTHS)[:, None]
    codes = torch.randint(len(twin.embedding.weight), shape, generator=generator)
    seen = real & is_visit.unsqueeze(-1)
    codes[seen] = _first_and_last(len(twin.embedding.weight), int(seen.sum()))
    return _arguments(form, codes, visit_mask, is_visit.to(dtype), generator)


def _first_and_last(rows: int, n: int) -> Tensor:
    """n codes of ``rows``, the first and the last of them in turns."""
    half = torch.arange((n + 1) // 2) % rows
    return torch.stack([half, rows - 1 - half], 1).flatten()[:n]


def _long_inputs(form: str, twin: Any, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """A patient of visits with many codes, and one with many visits."""
    generator = torch.Generator("cpu").manual_seed(3)
    if form == "encoder":
        embeddings = _inputs(form, twin, dtype)[0].detach()
        many = embeddings.flatten(0, 1).repeat(3, 1).unsqueeze(0)
        return [(many, torch.ones(many.shape[:2], dtype=dtype))]
    layer = sum(parameter.numel() for parameter in twin.lstm.parameters())
    found = []
    for visits, width in ((2, _LONG), (min(_LONG, _WORK // layer + 1), 1)):
        codes = torch.randint(len(twin.embedding.weight), (1, visits, width), generator=generator)
        masks = torch.ones(codes.shape, dtype=dtype), torch.ones(1, visits, dtype=dtype)
        found.append(_arguments(form, codes, *masks, generator))
    return found


def _arguments(
    form: str, codes: Tensor, visit_mask: Tensor, sequence_mask: Tensor, generator: torch.Generator
) -> tuple[Any, ...]:
    if form == "with_time":
        shape = (*codes.shape[:2], 3)
        features = torch.randn(shape, dtype=torch.float64, generator=generator)
        return codes, visit_mask, sequence_mask, features
    inputs = (codes, visit_mask, sequence_mask)
    return (*inputs, True) if form == "baseline" else inputs


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
    return not any(bool(value.isnan().any()) for value in _outputs(output))


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
        before = contents_of(twin)
        theirs = _results(twin, kind.forward(twin, *inputs), inputs)
        after = contents_of(twin)
        changed = [name for name, value in after.items() if before.get(name) != value]
        if changed:
            return f"{_SETS} ({', '.join(sorted(changed))})"
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
    outputs = _outputs(output)
    sources = [*twin.parameters(), *(i for i in inputs if _asks_gradient(i))]
    generator = torch.Generator("cpu").manual_seed(2)
    total: Any = sum(
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
        and torch.allclose(one, other, *_TOLERANCES[one.dtype])
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
    codes[mask] = _first_and_last(rows, int(mask.sum()))
    padding = 0 if embedding.padding_idx is None else embedding.padding_idx
    codes[..., 1:3] = torch.where(mask[..., 1:3], codes[..., 1:3], padding)
    codes[..., 1] = (padding + 1 + torch.arange(8).view(2, 4)) % rows
    takes_mask = len(fused.arguments) == 2
    for mode in ("mean", "sum", "max"):
        for own in (padding,) if takes_mask else (padding, None):
            found = _pooling(fused, twin, codes, mask if takes_mask else None, mode, own)
            if found is not None:
                made = replace(fused, pooling=found)
                return _of_many_codes(made, twin)
    return None, "its forward computes no masked mean, sum or maximum of its embedding's rows"


def _of_many_codes(fused: Fused, twin: Any) -> tuple[Fused | None, str]:
    pooling: Any = fused.pooling
    rows = next(iter(twin.children())).weight.shape[0]
    codes = torch.randint(rows, (2, _LONG), generator=torch.Generator("cpu").manual_seed(3))
    given = [codes if pooling.dimensions[0] == 2 else codes.unsqueeze(0)]
    given += [torch.ones(given[0].shape, dtype=dtype) for dtype in pooling.masks[:1]]
    if _is_same(fused, twin, tuple(given)):
        return fused, ""
    return None, "its forward computes something else of many codes"


def _pooling(
    fused: Fused, twin: Any, codes: Tensor, mask: Tensor | None, mode: str, padding: int | None
) -> Pooling | None:
    def agrees(codes: Tensor, mask: Tensor | None, weighted: bool = False) -> bool:
        dtypes = () if mask is None else (mask.dtype,)
        pooling = Pooling(mode, padding, (codes.dim(),), dtypes, weighted)
        made = replace(fused, pooling=pooling)
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
    real = (mask if kinds else mask[0]).float()
    light = [real * 0.01, real * torch.linspace(0.1, 1.7, _CODES)]
    weighted = torch.float32 in both and all(agrees(like, weights, True) for weights in light)
    return Pooling(mode, None, dimensions, both, weighted)

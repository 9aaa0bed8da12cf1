"""Whether a module of a known form computes what the fused forward pass does.

Both are run, in float64, on a copy of the module with random weights, and their outputs and
gradients compared: in ``eval()``, and in training with every dropout set to 0, where a dropout of
the ``forward``'s own would show; with weights of usual size, and with large ones, where a clamp
would. Each of the first and of the last codes is among the real ones, where a code that is treated
in another way would show, and a batch of many visits and of many codes shows that none are cut off.
What results do not show is looked for besides (:mod:`~ehrseq_fast.models.effects`): random numbers,
arguments that are written to, and dropouts at another place, each of which leaves nothing in turn.
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
from .effects import all_dropped, dropouts_of, effect_of, random_numbers_kept
from .examples import (
    CODES,
    LONG,
    first_and_last,
    in_32_bits,
    inputs_of,
    long_inputs,
    with_padding,
    without,
)
from .fused_forward import (
    NOT_SERVED,
    Fused,
    Pooling,
    Served,
    definitions_of,
    describe,
    run_fused,
    state_of,
)

_TABLE = 2**21  # numbers of an embedding that are copied, which more of them would make slow
_LARGE_FEATURE = 2.0**20  # times the features of visits: seconds of some days
_LARGE_GRADIENT = 2.0**30
_END = 600.0  # a logit of which the probability is 1, and nearly 0
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
        with random_numbers_kept(), torch.enable_grad(), torch.inference_mode(False):
            twin = _twin(module)
            found, reason = (_compare_pool if form == "pool" else _compare_model)(fused, twin)
            if found is None:
                return None, reason
            if reason := _beside_results(found, twin):
                return None, reason
            found = _with_reads(found, twin)
            state_of(found, module)
            definitions_of(found)
            return found, ""
    except MayChange as name:
        return None, f"its forward reads what may change unseen, as a tensor or an array ({name})"
    except Exception as error:  # of a forward that is not known, on a batch that it did not ask for
        return None, f"it could not be compared: {_told(error)}"


def _beside_results(fused: Fused, twin: Any) -> str:
    """What the module's own forward does that results of usual arguments do not show."""
    kind: Any = fused.kind
    single = copy.deepcopy(twin).float()
    for inputs in _examples(fused, twin):
        if reason := effect_of(kind.forward, single, in_32_bits(inputs)):
            return reason
    inputs = _examples(fused, twin)[0]
    if fused.form != "encoder" and _takes_other_codes(fused, twin, inputs):
        return "its forward takes codes outside its embedding"
    if fused.form == "pool":
        return ""
    if _drops_elsewhere(fused, twin, inputs):
        return "its forward drops something else in training"
    return ""


def _takes_other_codes(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a real code that the embedding does not have is no error in ``forward``."""
    kind: Any = fused.kind
    at = _real(fused, inputs).nonzero()
    place = tuple(at[0].tolist()) if len(at) else (0,) * inputs[0].dim()
    embedding = next(part for part in twin.children() if isinstance(part, nn.Embedding))
    for code in (-1, embedding.num_embeddings):
        codes = inputs[0].clone()
        codes[place] = code
        try:
            with torch.no_grad():
                kind.forward(twin.eval(), codes, *inputs[1:])
        except Exception:
            continue
        return True
    return False


def _drops_elsewhere(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether dropouts drop other things than in the fused forward pass. They draw nothing here, as
    they keep or drop all."""
    kind: Any = fused.kind
    mask = inputs[1] if fused.form == "encoder" else inputs[2]
    rows = {mask.shape[0] if fused.form == "encoder" else mask.numel(), int((mask != 0).sum())}
    for name, calls in dropouts_of(kind.forward, twin, inputs).items():
        allowed = {len(mask)} if name == "dropout" and fused.form == "baseline" else rows
        if len(calls) != 1 or calls[0][0] not in allowed:
            return True
    for part in twin.modules():
        between = isinstance(part, nn.RNNBase) and part.num_layers > 1
        if between or isinstance(part, nn.Dropout):
            with all_dropped(part):
                if not _is_same(fused, twin, inputs):
                    return True
    return False


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
                kind.forward(twin, *in_32_bits(inputs))
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
    examples = [inputs_of(fused.form, twin, kind) for kind in fused.served.masks]
    return examples + [without(examples[0], lacking) for lacking in fused.served.lacking]


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
        inputs = inputs_of(form, twin, dtype)
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
    inputs = inputs_of(form, twin, masks[0])
    if reason := _other_batches(trial, twin, inputs):
        return None, reason
    light = [inputs_of(form, twin, torch.float32, weight) for weight in (0.01, 1.7)]
    single, inputs = copy.deepcopy(twin).float(), in_32_bits(inputs)
    served = Served(
        masks=tuple(masks),
        weighted=torch.float32 in masks and all(_is_same(trial, twin, one) for one in light),
        lacking=tuple(
            lacking
            for lacking in everything.lacking
            if _is_same(trial, single, without(inputs, lacking))
        ),
    )
    return replace(fused, served=served), ""


def _other_batches(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what batches of other kinds differ than ``inputs``; empty where they do not."""
    form = fused.form
    for longer in long_inputs(form, twin, inputs[1].dtype):
        if not _is_same(fused, twin, longer):
            return "its forward computes something else of many visits or codes"
    if form == "baseline" and not _is_same(fused, twin, (*inputs[:3], False)):
        return "its forward returns something else without hidden states"
    if form == "encoder":
        return ""
    if not _is_same(fused, twin, with_padding(inputs), or_refused=True):
        return "its forward computes something else of padding behind all visits"
    if form == "with_time" and not _reads_features(fused, twin, inputs):
        return "its forward changes time features"
    at_ends = _reaches_ends(fused, twin, inputs)
    return "" if at_ends else "its forward changes probabilities near 0 or 1"


@torch.no_grad()
def _reads_features(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether time features are taken as they are: large ones, to weights as much smaller, and NaN,
    which has to show."""
    kind: Any = fused.kind
    weight = twin.time_encoder[0].weight
    *others, features = inputs
    weight.div_(_LARGE_FEATURE)
    same = _is_same(fused, twin, (*others, features * _LARGE_FEATURE))
    weight.mul_(_LARGE_FEATURE)
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
        if not _end_alike(_outputs(ours), _outputs(theirs)):
            return False
    return True


@torch.no_grad()
def _is_same(fused: Fused, twin: Any, inputs: tuple[Any, ...], *, or_refused: bool = False) -> bool:
    """Whether the outputs are the same, of weights as they are; or the module's own forward does
    not take the arguments, where that does as well."""
    kind: Any = fused.kind
    try:
        for training in (False, True):
            twin.train(training)
            try:
                theirs = kind.forward(twin, *inputs)
            except Exception:
                return or_refused
            ours = run_fused(fused, twin, list(inputs))
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
    """Slots that hold codes, of what :func:`inputs_of` or :func:`_compare_pool` made."""
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
        same = _are_close(ours[0], theirs[0]) and (
            fused.form in ("pool", "encoder") or _end_alike(ours[0], theirs[0])
        )
        if not same:
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
    # large ones, which a hook within ``forward`` may clamp
    gradients = torch.autograd.grad(total * _LARGE_GRADIENT, sources, allow_unused=True)
    dense = [
        g.to_dense() / _LARGE_GRADIENT if g is not None else torch.zeros(()) for g in gradients
    ]
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


def _end_alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether probabilities near 0 and 1, of which logarithms are taken, are the same in relation
    to what they are and lack."""
    for one, other in zip(ours, theirs, strict=True):
        if one.dtype != torch.float64 or not ((other >= 0) & (other <= 1)).all():
            continue
        near_0 = torch.allclose(one, other, rtol=1e-6, atol=1e-290)
        if not near_0 or not torch.allclose(1 - one, 1 - other, rtol=1e-6, atol=1e-15):
            return False
    return True


# Modules that pool an embedding's rows ------------------------------------------------------------


def _compare_pool(fused: Fused, twin: Any) -> tuple[Fused | None, str]:
    embedding = next(iter(twin.children()))
    generator = torch.Generator("cpu").manual_seed(1)
    rows = embedding.weight.shape[0]
    codes = torch.randint(rows, (2, 4, CODES), generator=generator)
    mask = torch.rand(codes.shape, generator=generator) < 0.5
    mask[..., 1] = True
    codes[mask] = first_and_last(rows, int(mask.sum()))
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
    codes = torch.randint(rows, (2, LONG), generator=torch.Generator("cpu").manual_seed(3))
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
    light = [real * 0.01, real * torch.linspace(0.1, 1.7, CODES)]
    weighted = torch.float32 in both and all(agrees(like, weights, True) for weights in light)
    return Pooling(mode, None, dimensions, both, weighted)

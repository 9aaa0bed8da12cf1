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

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import MayChange, foreign_to, options_among, reads_of
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
from .extremes import DIVIDED, at_extremes, divides_ties, gives_zeros
from .fused_forward import (
    Fused,
    Pooling,
    Served,
    definitions_of,
    describe,
    state_of,
)
from .trials import SETS, difference, is_same, real_slots

_TABLE = 2**21  # numbers of an embedding that are copied, which more of them would make slow
_ZEROS = "a visit without a code gives zeros"
_MASKS = (torch.bool, torch.int64, torch.float32)


def compare(module: nn.Module, form: str) -> tuple[Fused | None, str]:
    """The description to fuse ``module`` by, and in what results differ by intention; or None and
    the reason against it."""
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
            example = _examples(found, twin)[0]
            return found, "" if gives_zeros(found, twin, example) else _ZEROS
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
    at = real_slots(fused, inputs).nonzero()
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
                if not is_same(fused, twin, inputs):
                    return True
    return False


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _with_reads(fused: Fused, twin: Any) -> Fused:
    """With the names of the attributes that its own forward reads.

    Raises:
        MayChange: for one that was put on a part, as ``self.embedding.scale``.
    """
    twin = copy.deepcopy(twin).float()
    encoder = twin.visit_encoder if fused.form == "baseline" else nn.Module()
    parts = {n: part for n, part in twin.named_modules() if part not in (twin, encoder)}
    names: set[str] = set()
    of_encoder: set[str] = set()
    kind: Any = fused.kind
    for training in (False, True):
        twin.train(training)
        for inputs in _examples(fused, twin):
            with (
                torch.no_grad(),
                reads_of(twin) as read,
                reads_of(encoder) as read_inside,
                contextlib.ExitStack() as stack,
            ):
                of_parts = {n: stack.enter_context(reads_of(part)) for n, part in parts.items()}
                kind.forward(twin, *in_32_bits(inputs))
            names |= read
            of_encoder |= read_inside
            for name, read_of_part in of_parts.items():
                if foreign := foreign_to(parts[name], read_of_part):
                    raise MayChange(f"{name}.{foreign[0]}")
    return replace(
        fused,
        reads=options_among(names, twin),
        encoder_reads=options_among(of_encoder, encoder),
    )


def _examples(fused: Fused, twin: Any) -> list[tuple[Any, ...]]:
    """Arguments of every kind that is served."""
    if fused.pooling is not None:
        masks = fused.pooling.masks
        codes = torch.zeros((2,) * fused.pooling.dimensions[0], dtype=torch.int64)
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
            found = "" if masks and is_same(trial, twin, inputs) else None
            found = difference(trial, twin, inputs) if found is None else found
        except Exception as error:  # as of ~ with numbers, or - with bool
            reasons.append(f"it could not be compared: {_told(error)}")
            continue
        if not found:
            masks.append(dtype)
        elif found.startswith(SETS):
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
        weighted=torch.float32 in masks and all(is_same(trial, twin, one) for one in light),
        lacking=tuple(
            lacking
            for lacking in everything.lacking
            if is_same(trial, single, without(inputs, lacking))
        ),
    )
    return replace(fused, served=served), ""


def _other_batches(fused: Fused, twin: Any, inputs: tuple[Any, ...]) -> str:
    """In what batches of other kinds differ than ``inputs``; empty where they do not."""
    form = fused.form
    for longer in long_inputs(form, twin, inputs[1].dtype):
        if not is_same(fused, twin, longer):
            return "its forward computes something else of many visits or codes"
    if form == "baseline" and not is_same(fused, twin, (*inputs[:3], False)):
        return "its forward returns something else without hidden states"
    if form != "encoder" and not is_same(fused, twin, with_padding(inputs), or_refused=True):
        return "its forward computes something else of padding behind all visits"
    encoder = getattr(twin, "visit_encoder", twin)
    if getattr(encoder, "aggregation", None) == "max" and divides_ties(fused, twin, inputs):
        return DIVIDED
    return at_extremes(fused, twin, inputs)


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
        elif isinstance(part, nn.Embedding):
            part.sparse = False  # rows of sparse gradients are looked at in each call
    return twin


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
                reason = _of_other_codes(made, twin)
                return (None, reason) if reason else (made, "")
    return None, "its forward computes no masked mean, sum or maximum of its embedding's rows"


def _of_other_codes(fused: Fused, twin: Any) -> str:
    """In what a pool differs of other codes than those that it was compared on."""
    pooling: Any = fused.pooling
    rows = next(iter(twin.children())).weight.shape[0]
    generator = torch.Generator("cpu").manual_seed(3)
    inputs: tuple[Any, ...] = ()
    for visits, width in ((2, LONG), (1, 1), (6, 4)):
        codes = torch.randint(rows, (visits, width), generator=generator)
        if pooling.padding is not None:
            codes[:, 0] = (pooling.padding + 1) % rows  # a visit without a code is compared below
        for patients in ((1, visits), (visits, 1)) if 3 in pooling.dimensions else ((visits,),):
            given = codes.view(*patients, width)
            inputs = (given, *(torch.ones(given.shape, dtype=kind) for kind in pooling.masks[:1]))
            if not is_same(fused, twin, inputs):
                return "its forward computes something else of many codes, or of few"
    if pooling.mode == "max" and divides_ties(fused, twin, inputs):
        return DIVIDED
    return at_extremes(fused, twin, inputs)


def _pooling(
    fused: Fused, twin: Any, codes: Tensor, mask: Tensor | None, mode: str, padding: int | None
) -> Pooling | None:
    def agrees(codes: Tensor, mask: Tensor | None, weighted: bool = False) -> bool:
        dtypes = () if mask is None else (mask.dtype,)
        pooling = Pooling(mode, padding, (codes.dim(),), dtypes, weighted)
        made = replace(fused, pooling=pooling)
        inputs = (codes,) if mask is None else (codes, mask)
        try:
            return difference(made, twin, inputs) == ""
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

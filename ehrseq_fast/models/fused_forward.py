"""The fused forward pass for models of other classes: a subclass made for an instance's class.

An instance is given the subclass, as PyTorch's parametrizations do it: it stays the same object
with the same parameters, hooks and other methods, and is an instance of its class as before. What
the fused pass does not serve goes to the class's own ``forward``: other arguments than the form
takes or than were compared, masks with holes, patients without a visit, 16-bit weights, children
that were replaced or are watched since, options of its own that were changed since.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import values_are_hidden
from ..batch import PackedVisits
from ..compiling import let_trace
from ..visit_pool import masked_pool, packed_visit_pool, visit_mean_pool
from .attributes import FOUND, Found, MayChange, are_as_found, attributes_of
from .competing_risks import CompetingRisksSurvivalLSTM
from .definitions import Definitions
from .known_forms import arguments_of, form_of
from .lstm_baseline import LSTMBaseline, VisitEncoder
from .reading import readable
from .sequences import CODE_DTYPES, is_fractional, lists_the_same_rows
from .survival_lstm import DiscreteTimeSurvivalLSTM, DiscreteTimeSurvivalLSTMWithTime

_WIDE = (torch.float32, torch.float64)
_MODELS: dict[str, Any] = {
    "survival": DiscreteTimeSurvivalLSTM,
    "with_time": DiscreteTimeSurvivalLSTMWithTime,
    "competing_risks": CompetingRisksSurvivalLSTM,
    "baseline": LSTMBaseline,
}


@dataclass(frozen=True)
class Pooling:
    """What a module that pools an embedding's rows computes, as was found by comparing.

    Attributes:
        mode: ``"mean"``, ``"sum"`` or ``"max"``.
        padding: the code that its own mask leaves out, None where it counts every slot or is given
            a mask.
        dimensions: of the codes.
        masks: dtypes of masks that it takes; none where it takes no mask.
        weighted: whether a fractional mask weighs codes as here.
    """

    mode: str
    padding: int | None
    dimensions: tuple[int, ...]
    masks: tuple[torch.dtype, ...]
    weighted: bool


@dataclass(frozen=True)
class Served:
    """For which arguments a model or a visit encoder was found to compute what is computed here.

    Attributes:
        masks: dtypes of masks: bool, int64 for all integers, float32 for all that are floating.
        weighted: whether a fractional mask weighs codes as here.
        lacking: which arguments may be None: places among all, as many together as in each entry.
    """

    masks: tuple[torch.dtype, ...]
    weighted: bool
    lacking: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fused:
    """What the subclass of a module's class was made for.

    Attributes:
        kind: the class that the module had.
        form: as in :data:`~ehrseq_fast.models.known_forms.FORMS`.
        arguments: the names of what ``kind.forward`` takes.
        defaults: what it takes where they are left out; None also where they must not be.
        encoder: the class of a baseline's visit encoder.
        pooling: of the form ``"pool"``.
        served: of the other forms.
        reads: the names of the module's own attributes that ``kind.forward`` reads.
        encoder_reads: those of a baseline's visit encoder.
    """

    kind: type[nn.Module]
    form: str
    arguments: tuple[str, ...]
    defaults: tuple[bool | None, ...]
    encoder: type[nn.Module] | None = None
    pooling: Pooling | None = None
    served: Served | None = None
    reads: tuple[str, ...] = ()
    encoder_reads: tuple[str, ...] = ()


def fused_of(module: object) -> Fused | None:
    """What ``module`` was fused as; None where its class is its own."""
    return type(module).__dict__.get("_ehrseq_fast_fused")


def class_of(module: object) -> type:
    """The class that ``module`` has, or had before it was fused."""
    fused = fused_of(module)
    return type(module) if fused is None else fused.kind


def describe(module: nn.Module, form: str) -> Fused | None:
    """``module`` as one of a form; None where its ``forward`` takes other arguments."""
    arguments = arguments_of(type(module), form)
    if arguments is None:
        return None
    encoder = class_of(module._modules["visit_encoder"]) if form == "baseline" else None
    return Fused(type(module), form, tuple(arguments), tuple(arguments.values()), encoder)


def state_of(fused: Fused, module: nn.Module) -> tuple[Found, ...]:
    """What the comparison of ``module`` with the fused forward pass depended on, beside weights.

    Raises:
        MayChange: where this cannot be told.
    """
    found = [attributes_of(module, fused.reads)]
    if fused.form == "baseline":
        found.append(attributes_of(_child(module, "visit_encoder"), fused.encoder_reads))
    if fused.form not in ("pool", "encoder"):
        found.append(attributes_of(_child(module, "lstm"), ("bidirectional", "batch_first")))
    return tuple(found)


def definitions_of(fused: Fused) -> Definitions:
    """What the forward passes of ``fused`` are made of, as it is now.

    Raises:
        MayChange: where this cannot be told.
    """
    kinds = [kind for kind in (fused.kind, fused.encoder) if kind is not None]
    return Definitions(kinds, {*fused.reads, *fused.encoder_reads})


@torch.compiler.assume_constant_result
def _is_defined_as_compared(kind: Any) -> bool:
    """Of a class that :func:`fused_class` made; asked once where ``torch.compile`` traces."""
    definitions = kind._ehrseq_fast_definitions
    return definitions is not None and definitions.hold()


def is_as_found(fused: Fused, module: nn.Module) -> bool:
    """Whether ``module`` still has the form, and the options with which it was compared, and its
    class the functions."""
    if form_of(module) != fused.form or not _is_defined_as_compared(type(module)):
        return False
    found = module.__dict__.get(FOUND)
    if found is None or not are_as_found(module, found[0]):
        return False
    if fused.form == "baseline" and not are_as_found(_child(module, "visit_encoder"), found[1]):
        return False
    return fused.form in ("pool", "encoder") or are_as_found(_child(module, "lstm"), found[-1])


def _child(module: nn.Module, name: str) -> Any:
    return module._modules[name]


_MADE: dict[Fused, list[Any]] = {}


def fused_class(fused: Fused) -> type[nn.Module]:
    """The subclass of ``fused.kind`` whose forward pass is fused; one for each description, and
    another one where functions of ``fused.kind`` were replaced since."""
    for kind in _MADE.setdefault(fused, []):
        if _is_defined_as_compared(kind):
            return kind
    return _subclass(fused, definitions_of(fused))


def _subclass(
    fused: Fused, definitions: Definitions | None, fingerprint: str | None = None
) -> type[nn.Module]:
    """``definitions``: None where those of ``fingerprint``, of which a model was compared, are
    gone: the forward pass is then always its own."""
    kind: Any = fused.kind
    if definitions is not None:
        fingerprint = definitions.fingerprint
    parts = _methods_of(fused.form)
    traced = parts is not None and not any(hasattr(kind, name) for name in parts)

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        if torch.jit.is_tracing():  # values would be constants
            return kind.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            given = _packed_arguments(fused, args, kwargs)
            if given is None and torch.compiler.is_exporting():  # as above
                return kind.forward(self, *args, **kwargs)
            if given is not None and traced and torch.compiler.is_dynamo_compiling():
                result = _traced(fused, self, given)
                if result is not NOT_SERVED:
                    return result
        return _forward(fused, self, args, kwargs)

    def reduce(self, protocol):
        reduced = kind.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (made,):  # type: ignore[attr-defined]
            return _make, (fused, fingerprint), *reduced[2:]
        return reduced

    contents = {
        **(parts if traced and parts is not None else {}),
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__reduce_ex__": reduce,
        "_ehrseq_fast_fused": fused,
        "_ehrseq_fast_definitions": definitions,
        "_ehrseq_fast_fingerprint": fingerprint,
        "forward": forward,
    }
    made = type(kind)(f"Fused{kind.__name__}", (kind,), contents)
    _MADE.setdefault(fused, []).append(made)
    return readable(made)


def _make(fused: Fused, fingerprint: str) -> nn.Module:
    """An instance without contents, for ``pickle`` and ``copy``; of a class that is what it was
    when the model was compared, or else one whose forward pass is its own."""
    alike = [k for k in _MADE.get(fused, []) if k._ehrseq_fast_fingerprint == fingerprint]
    alike.sort(key=_is_defined_as_compared)
    if alike:
        return alike[-1].__new__(alike[-1])
    try:
        now = definitions_of(fused)
    except MayChange:
        now = None
    if now is None or now.fingerprint != fingerprint:
        warnings.warn(
            f"{fused.kind.__name__}: its class was changed since accelerate compared it, and its "
            "own forward is used: restore, then accelerate",
            stacklevel=2,
        )
        now = None
    kind = _subclass(fused, now, fingerprint)
    return kind.__new__(kind)


def is_outdated(module: nn.Module) -> bool:
    """Whether ``module`` was fused, and its class was changed since."""
    return fused_of(module) is not None and not _is_defined_as_compared(type(module))


def _methods_of(form: str) -> dict[str, Any] | None:
    """What the fused forward pass of a form looks up on the model, by name; None for a form that is
    not traced. ``torch.compile`` makes no view of a model, as :func:`_view` does."""
    if form == "pool":
        return {}
    if form not in _MODELS:
        return None
    found: dict[str, Any] = {"path": "fused"}
    lineage = _MODELS[form].__mro__
    for kind in reversed(lineage[: lineage.index(nn.Module)]):
        own = vars(kind).items()
        found |= {name: value for name, value in own if name[0] == "_" and name[1] != "_"}
    if form == "competing_risks":
        found["link"] = "sigmoid"
    if form == "baseline":
        found["_pool_rows"] = _encode_batch
    return found


def _encode_batch(module: Any, batch: PackedVisits) -> Tensor:
    return VisitEncoder.encode_batch(module.visit_encoder, batch, module.embedding)


def _packed_arguments(
    fused: Fused, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any] | None:
    """The arguments in order where the first is a packed batch."""
    given = _bind(fused, args, kwargs)
    return given if given is not None and isinstance(given[0], PackedVisits) else None


def _traced(fused: Fused, module: Any, given: list[Any]) -> Any:
    """:func:`run_fused` on a packed batch, as ``torch.compile`` traces it."""
    if fused.form != "pool":
        let_trace(module, "lstm")
    fits = is_as_found(fused, module)
    for name, value in (("path", "fused"), ("link", "sigmoid")):  # it may have its own of that name
        fits = fits and module.__dict__.get(name, value) == value
    if fused.form == "baseline":
        fits = fits and class_of(module.visit_encoder) is fused.encoder
        given = [*given[:3], bool(given[3])]
    if not fits:
        return NOT_SERVED
    if fused.form == "pool":
        return _run_pool(fused, module, given)
    return _MODELS[fused.form].forward(module, *given)


@torch.compiler.disable
def _forward(fused: Fused, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _bind(fused, args, kwargs)
    if given is not None and is_as_found(fused, module):
        result = run_fused(fused, module, given)
        if result is not NOT_SERVED:
            return result
    if given is not None and isinstance(given[0], PackedVisits):
        raise TypeError(
            f"{fused.kind.__name__}: expected padded tensors (batch.to_padded()), got a "
            "PackedVisits: only the fused forward pass takes one, and this model is not what "
            "accelerate compared it as: a part, a hook or an option was changed since"
        )
    return fused.kind.forward(module, *args, **kwargs)


NOT_SERVED = object()


def run_fused(fused: Fused, module: nn.Module, given: list[Any]) -> Any:
    """The fused forward pass of ``module``, which has the form; ``NOT_SERVED`` for what is left to
    ``fused.kind.forward``."""
    return _RUN.get(fused.form, _run_model)(fused, module, given)


def _bind(fused: Fused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The arguments in order, with their defaults; None for more than there are names."""
    names = fused.arguments[len(args) :]
    if len(args) > len(fused.arguments) or not kwargs.keys() <= set(names):
        return None
    defaults = fused.defaults[len(args) :]
    return [*args, *(kwargs.get(n, default) for n, default in zip(names, defaults, strict=True))]


# Models -------------------------------------------------------------------------------------------


def _run_model(fused: Fused, module: Any, given: list[Any]) -> Any:
    codes, visit_mask, sequence_mask, *more = given
    packed = isinstance(codes, PackedVisits)
    if not packed:
        if not _serves(module, codes, visit_mask, sequence_mask):
            return NOT_SERVED
        if fused.form == "with_time" and not _are_features(codes, more[0]):
            return NOT_SERVED
        place = 4 if fused.form == "with_time" else 3
        if not _was_compared(fused, given[:place], module.embedding.weight.dtype):
            return NOT_SERVED
    model = _MODELS[fused.form]
    if fused.form != "baseline":
        options: dict[str, Any] = {"link": "sigmoid"} if fused.form == "competing_risks" else {}
        view = _view(model, module, **options)
        hazards = model.forward(view, codes, visit_mask, sequence_mask, *more)
        # under autocast theirs are widened by the product with a float mask
        return hazards if packed else hazards.to(torch.promote_types(hazards.dtype, torch.float32))
    encoder: Any = module._modules["visit_encoder"]
    if class_of(encoder) is not fused.encoder:
        return NOT_SERVED
    ours = _view(VisitEncoder, encoder, embedding_dim=module._modules["embedding"].embedding_dim)
    view = _view(model, module, children={"visit_encoder": ours})
    output = model.forward(view, codes, visit_mask, sequence_mask, bool(more[0]))
    if not packed and sequence_mask is not None and "hidden_states" in output:
        # as pad_packed_sequence leaves them
        longest = int((sequence_mask != 0).sum(1).max())
        output["hidden_states"] = output["hidden_states"][:, :longest]
    return output


def _view(
    kind: Any, module: Any, children: dict[str, nn.Module] | None = None, **attributes: Any
) -> Any:
    """``module`` as one of this package's classes, to call methods on: the same children."""
    view = kind.__new__(kind)
    view.__dict__.update(module.__dict__, _path="fused", **attributes)
    if children:
        view.__dict__["_modules"] = {**module._modules, **children}
    return view


def _was_compared(fused: Fused, given: list[Any], dtype: torch.dtype) -> bool:
    """Whether arguments of this kind were among those compared, for a model of ``dtype``. Reads the
    values of masks where fractional ones are others than here."""
    served = fused.served
    assert served is not None
    lacking = tuple(place for place, value in enumerate(given) if value is None)
    if lacking and lacking not in served.lacking:
        return False
    masks = [mask for mask in given[1:3] if mask is not None]
    if not all(_kind_of_mask(mask) in served.masks for mask in masks):
        return False
    if any(mask.is_floating_point() and mask.dtype not in (torch.float32, dtype) for mask in masks):
        return False  # a wider one widens, in a narrower one sums are rounded
    return served.weighted or not is_fractional(given[1])


def _kind_of_mask(mask: Tensor) -> torch.dtype:
    if mask.is_floating_point():
        return torch.float32
    return torch.bool if mask.dtype == torch.bool else torch.int64


def _serves(module: Any, codes: Any, visit_mask: Any, sequence_mask: Any) -> bool:
    if not _is_plain(codes) or codes.dtype not in CODE_DTYPES or codes.dim() != 3:
        return False
    if not codes.numel() or module.embedding.weight.dtype not in _WIDE:
        return False
    if not _is_mask(visit_mask, codes.shape) or not _is_mask(sequence_mask, codes.shape[:2]):
        return False
    if values_are_hidden(codes, visit_mask, sequence_mask):
        return False
    if sequence_mask is not None and not _is_ones_then_zeros(sequence_mask):
        return False
    return lists_the_same_rows(module.embedding, codes, visit_mask, sequence_mask)


def _is_ones_then_zeros(sequence_mask: Tensor) -> bool:
    """Whether every patient has a visit, and real visits come first. Reads values."""
    real = sequence_mask != 0
    fits = real[:, 0].all() & ~(real[:, 1:] & ~real[:, :-1]).any()
    if sequence_mask.dtype != torch.bool:
        fits = fits & (~real | (sequence_mask == 1)).all()
    return bool(fits)


def _are_features(codes: Tensor, features: Any) -> bool:
    if features is None:
        return True
    return _is_plain(features) and features.shape == (*codes.shape[:2], 3)


# Visit encoders and pools -------------------------------------------------------------------------


def _run_encoder(fused: Fused, module: Any, given: list[Any]) -> Any:
    embeddings, mask = given
    mode = module.aggregation
    if mode == "attention" or not _is_plain(embeddings) or embeddings.dim() != 3:
        return NOT_SERVED
    if embeddings.dtype not in _WIDE or not _is_mask(mask, embeddings.shape[:-1]):
        return NOT_SERVED
    if not _was_compared(fused, given, embeddings.dtype):
        return NOT_SERVED
    return module.dropout(masked_pool(embeddings, mask, mode=mode))


def _run_pool(fused: Fused, module: nn.Module, given: list[Any]) -> Any:
    pooling = fused.pooling
    assert pooling is not None
    embedding: Any = next(iter(module._modules.values()))
    weight = embedding.weight
    codes, mask = given[0], given[1] if len(given) > 1 else None
    options: dict[str, Any] = {
        "mode": pooling.mode,
        "padding_idx": embedding.padding_idx,
        "sparse_grad": embedding.sparse,
    }
    if isinstance(codes, PackedVisits) and mask is None:
        return packed_visit_pool(codes, weight, **options)
    if not _serves_pool(pooling, codes, mask) or weight.dtype not in _WIDE:
        return NOT_SERVED
    if mask is None and pooling.padding is not None:
        mask = codes != pooling.padding
    if not lists_the_same_rows(embedding, codes, mask):
        return NOT_SERVED
    return visit_mean_pool(codes, weight, mask, **options)


def _serves_pool(pooling: Pooling, codes: Any, mask: Any) -> bool:
    if not _is_plain(codes) or codes.dtype not in CODE_DTYPES:
        return False
    if codes.dim() not in pooling.dimensions or not codes.shape[-1]:
        return False
    if mask is None or not pooling.masks:
        return mask is None and not pooling.masks
    if not _is_mask(mask, codes.shape) or mask.dtype not in pooling.masks:
        return False
    return pooling.weighted or not is_fractional(mask)


def _is_mask(mask: Any, shape: tuple[int, ...]) -> bool:
    if mask is None:
        return True
    return _is_plain(mask) and mask.shape == shape and not mask.requires_grad


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose values can be read: no fake one, nor another subclass."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta


_RUN: dict[str, Callable[[Fused, nn.Module, list[Any]], Any]] = {
    "encoder": _run_encoder,
    "pool": _run_pool,
}

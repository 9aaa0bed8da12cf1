"""The fused forward pass for models of other classes: a subclass made for an instance's class.

An instance is given the subclass, as PyTorch's parametrizations do it: it stays the same object
with the same parameters, hooks and other methods, and is an instance of its class as before. What
the fused pass does not serve goes to the class's own ``forward``: other arguments than the form
takes, masks with holes, patients without a visit, 16-bit weights, children that were replaced or
are watched since.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import values_are_hidden
from ..batch import PackedVisits
from ..compiling import let_trace
from ..visit_pool import masked_pool, packed_visit_pool, visit_mean_pool
from .competing_risks import CompetingRisksSurvivalLSTM
from .known_forms import arguments_of, form_of
from .lstm_baseline import LSTMBaseline, VisitEncoder
from .reading import readable
from .sequences import CODE_DTYPES, is_fractional
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
class Fused:
    """What the subclass of a module's class was made for.

    Attributes:
        kind: the class that the module had.
        form: as in :data:`~ehrseq_fast.models.known_forms.FORMS`.
        arguments: the names of what ``kind.forward`` takes.
        encoder: the class of a baseline's visit encoder.
        pooling: of the form ``"pool"``.
    """

    kind: type[nn.Module]
    form: str
    arguments: tuple[str, ...]
    encoder: type[nn.Module] | None = None
    pooling: Pooling | None = None


def fused_of(module: object) -> Fused | None:
    """What ``module`` was fused as; None where its class is its own."""
    return type(module).__dict__.get("_ehrseq_fast_fused")


def class_of(module: object) -> type:
    """The class that ``module`` has, or had before it was fused."""
    fused = fused_of(module)
    return type(module) if fused is None else fused.kind


def describe(module: nn.Module, form: str, pooling: Pooling | None = None) -> Fused | None:
    """``module`` as one of a form; None where its ``forward`` takes other arguments."""
    arguments = arguments_of(type(module), form)
    if arguments is None:
        return None
    encoder = class_of(module._modules["visit_encoder"]) if form == "baseline" else None
    return Fused(type(module), form, arguments, encoder, pooling)


@functools.cache
def fused_class(fused: Fused) -> type[nn.Module]:
    """The subclass of ``fused.kind`` whose forward pass is fused; one for each description."""
    kind: Any = fused.kind
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
            return _make, (fused,), *reduced[2:]
        return reduced

    contents = {
        **(parts if traced and parts is not None else {}),
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__reduce_ex__": reduce,
        "_ehrseq_fast_fused": fused,
        "forward": forward,
    }
    made = type(kind)(f"Fused{kind.__name__}", (kind,), contents)
    return readable(made)


def _make(fused: Fused) -> nn.Module:
    """An instance without contents, for ``pickle`` and ``copy``."""
    kind = fused_class(fused)
    return kind.__new__(kind)


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
    given = _bind(fused.arguments, args, kwargs)
    return given if given is not None and isinstance(given[0], PackedVisits) else None


def _traced(fused: Fused, module: Any, given: list[Any]) -> Any:
    """:func:`run_fused` on a packed batch, as ``torch.compile`` traces it."""
    if fused.form != "pool":
        let_trace(module, "lstm")
    fits = form_of(module) == fused.form
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
    given = _bind(fused.arguments, args, kwargs)
    if given is not None and form_of(module) == fused.form:
        result = run_fused(fused, module, given)
        if result is not NOT_SERVED:
            return result
    return fused.kind.forward(module, *args, **kwargs)


NOT_SERVED = object()


def run_fused(fused: Fused, module: nn.Module, given: list[Any]) -> Any:
    """The fused forward pass of ``module``, which has the form; ``NOT_SERVED`` for what is left to
    ``fused.kind.forward``."""
    return _RUN.get(fused.form, _run_model)(fused, module, given)


def _bind(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any] | None:
    """The arguments in order, None for those left out; None for more than there are names."""
    if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
        return None
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]


# Models -------------------------------------------------------------------------------------------


def _run_model(fused: Fused, module: Any, given: list[Any]) -> Any:
    codes, visit_mask, sequence_mask, *more = given
    packed = isinstance(codes, PackedVisits)
    if not packed:
        if not _serves(fused.form, module, codes, visit_mask, sequence_mask):
            return NOT_SERVED
        if fused.form == "with_time" and not _are_features(codes, more[0]):
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


def _serves(form: str, module: Any, codes: Any, visit_mask: Any, sequence_mask: Any) -> bool:
    if not _is_plain(codes) or codes.dtype not in CODE_DTYPES or codes.dim() != 3:
        return False
    if not codes.shape[0] or not codes.shape[1] or module.embedding.weight.dtype not in _WIDE:
        return False
    may_lack = form == "baseline"
    for mask, shape in ((visit_mask, codes.shape), (sequence_mask, codes.shape[:2])):
        if mask is None and may_lack:
            continue
        if mask is None or not _is_mask(mask, shape):
            return False
    if values_are_hidden(codes, visit_mask, sequence_mask):
        return False
    return sequence_mask is None or _is_ones_then_zeros(sequence_mask)


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
    return visit_mean_pool(codes, weight, mask, **options)


def _serves_pool(pooling: Pooling, codes: Any, mask: Any) -> bool:
    if not _is_plain(codes) or codes.dtype not in CODE_DTYPES:
        return False
    if codes.dim() not in pooling.dimensions:
        return False
    if mask is None or not pooling.masks:
        return mask is None and not pooling.masks
    if not _is_mask(mask, codes.shape) or mask.dtype not in pooling.masks:
        return False
    return not mask.is_floating_point() or pooling.weighted or not is_fractional(mask)


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

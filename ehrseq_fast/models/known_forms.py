"""Models and modules of other packages whose structure is known here.

A form is recognised by the names and types of a module's children and by how many arguments its
``forward`` takes, not by its class: the classes of ``ehrsequencing``, copies of them and models
written anew have the same. That ``forward`` computes the same is found out by
:mod:`~ehrseq_fast.models.comparison`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..packed_gru import PackedGRU
from ..packed_lstm import PackedLSTM
from .lstm_baseline import AGGREGATIONS
from .reading import are_plain, is_plain_embedding

# what takes the place of each form's forward pass, for reports
FORMS = {
    "survival": "DiscreteTimeSurvivalLSTM",
    "with_time": "DiscreteTimeSurvivalLSTMWithTime",
    "competing_risks": "CompetingRisksSurvivalLSTM",
    "baseline": "LSTMBaseline",
    "encoder": "VisitEncoder",
    "pool": "visit_mean_pool",
}

# codes, masks, and time features or return_hidden; a pool may make its mask itself
_ARGUMENTS = {
    "survival": (3,),
    "with_time": (4,),
    "competing_risks": (3,),
    "baseline": (4,),
    "encoder": (2,),
    "pool": (1, 2),
}

_HEAD = (nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.Sigmoid)
_TIME_ENCODER = (nn.Linear, nn.ReLU, nn.Linear)
_ATTENTION = (nn.Linear, nn.Tanh, nn.Linear)
_RECURRENT = (nn.LSTM, nn.GRU, PackedLSTM, PackedGRU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def form_of(module: nn.Module) -> str | None:
    """The form that ``module`` has, by its children as they are now; None where it has none, where
    a child is of another class, and where a hook or a replaced ``forward`` of a child would see
    what the fused forward pass does not do.

    Example:
        >>> from torch import nn
        >>> from ehrseq_fast.models import VisitEncoder
        >>> from ehrseq_fast.models.known_forms import form_of
        >>> form_of(VisitEncoder(4)), form_of(nn.Linear(2, 2))
        ('encoder', None)
    """
    if module._parameters or module._buffers:
        return None
    children: dict[str, Any] = module._modules
    names = frozenset(children)
    if len(names) == 1 and is_plain_embedding(next(iter(children.values()))):
        return "pool"
    if names <= {"dropout", "attention"}:
        return "encoder" if _is_encoder(module) else None
    form, fits = _MODELS.get(names, (None, _fits_none))
    has_both = is_plain_embedding(children.get("embedding")) and _is_layer(children.get("lstm"))
    return form if has_both and fits(children) else None


def why_no_form(module: nn.Module) -> str:
    """What keeps a model with an ``embedding`` and an ``lstm`` from having a form; empty for all
    other modules, of which nothing was to be expected.

    Example:
        >>> from torch import nn
        >>> from ehrseq_fast.models.known_forms import why_no_form
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 4)
        >>> why_no_form(Model())
        'its parts are those of no structure that is known: embedding, lstm'
    """
    children: dict[str, Any] = module._modules
    embedding, layer = children.get("embedding"), children.get("lstm")
    if not isinstance(embedding, nn.Embedding) or not isinstance(layer, (nn.LSTM, nn.GRU)):
        return ""
    if module._parameters or module._buffers:
        own = ", ".join([*module._parameters, *module._buffers])
        return f"it has parameters or buffers of its own: {own}"
    if frozenset(children) not in _MODELS:
        return f"its parts are those of no structure that is known: {', '.join(children)}"
    if not is_plain_embedding(embedding):
        return "its embedding has hooks, a parametrization, max_norm or scale_grad_by_freq"
    if not _is_layer(layer):
        return "its layer is not a plain one"
    return "some of its parts are of other classes than in the structure, or have hooks"


def arguments_of(kind: type[nn.Module], form: str) -> dict[str, bool | None] | None:
    """The names of what ``kind.forward`` takes, in order, with their defaults, None for those that
    must be given; None where it is not what the form takes."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    named = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    if not named or len(parameters) not in _ARGUMENTS[form]:
        return None
    defaults = [None if p.default is inspect.Parameter.empty else p.default for p in parameters]
    if not all(default is None or isinstance(default, bool) for default in defaults):
        return None
    return {p.name: default for p, default in zip(parameters, defaults, strict=True)}


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see calls of ``module``, or its ``forward`` is not its class's."""
    own = module.__dict__
    return (
        "forward" in own
        or "_call_impl" in own
        or own.get("_compiled_call_impl") is not None
        or any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _is_layer(module: Any) -> bool:
    return type(module) in _RECURRENT and not is_watched(module) and not module.proj_size


def _is_encoder(module: nn.Module) -> bool:
    aggregation = getattr(module, "aggregation", None)
    if not isinstance(aggregation, str) or aggregation not in AGGREGATIONS:
        return False
    if not _is_unwatched(module._modules.get("dropout"), nn.Dropout):
        return False
    if aggregation == "attention":
        return are_plain(module._modules.get("attention"), _ATTENTION)
    return "attention" not in module._modules


def _is_unwatched(module: Any, *kinds: type[nn.Module]) -> bool:
    return type(module) in kinds and not is_watched(module)


def _fits_none(children: dict[str, Any]) -> bool:
    return False


def _fits_survival(children: dict[str, Any]) -> bool:
    return are_plain(children["hazard_head"], _HEAD)


def _fits_with_time(children: dict[str, Any]) -> bool:
    return _fits_survival(children) and are_plain(children["time_encoder"], _TIME_ENCODER)


def _fits_competing_risks(children: dict[str, Any]) -> bool:
    heads = children["hazard_heads"]
    is_list = type(heads) is nn.ModuleList and len(heads) > 0
    return is_list and all(are_plain(head, _HEAD) for head in heads)


def _fits_baseline(children: dict[str, Any]) -> bool:
    encoder = children["visit_encoder"]
    return (
        isinstance(encoder, nn.Module)
        and not is_watched(encoder)
        and form_of(encoder) == "encoder"
        and _is_unwatched(children["dropout"], nn.Dropout)
        and _is_unwatched(children["fc"], nn.Linear)
        and _is_unwatched(children["activation"], nn.Sigmoid, nn.Softmax, nn.Identity)
    )


# by the names of a model's children: the form, and what else has to hold of them
_MODELS: dict[frozenset[str], tuple[str, Callable[[dict[str, Any]], bool]]] = {
    frozenset({"embedding", "lstm", *more}): (form, fits)
    for form, fits, more in (
        ("survival", _fits_survival, ("hazard_head",)),
        ("with_time", _fits_with_time, ("hazard_head", "time_encoder")),
        ("competing_risks", _fits_competing_risks, ("hazard_heads",)),
        ("baseline", _fits_baseline, ("visit_encoder", "dropout", "fc", "activation")),
    )
}

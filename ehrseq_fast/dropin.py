"""A model of one's own made faster in place: ``accelerate`` and ``restore``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from .arrays import kind_of
from .packed_gru import PackedGRU
from .packed_lstm import PackedLSTM

_PACKED: dict[type, type] = {nn.LSTM: PackedLSTM, nn.GRU: PackedGRU}
_PLAIN: dict[type, type] = {packed: plain for plain, packed in _PACKED.items()}
_OUTDATED = "its class was changed since it was accelerated: restore, then accelerate"
# what forward was: it may be replaced on the class
_FORWARDS: dict[type, Any] = {nn.LSTM: nn.LSTM.forward, nn.GRU: nn.GRU.forward}
# of an instance whose class accelerate changed to a packed layer
_MARK = "_ehrseq_fast_accelerated"


@dataclass(frozen=True)
class Replaced:
    """A module that :func:`accelerate` gave another class.

    Attributes:
        name: where it is in the model, ``""`` for the model itself; of a module that is used at
            several places all of them, with commas between.
        before: the name of its class.
        after: what computes it now.
        note: when that is used.
    """

    name: str
    before: str
    after: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{_called(self.name)}: {self.before} -> {self.after}{note}"


@dataclass(frozen=True)
class Left:
    """A module that :func:`accelerate` looked at and left as it is.

    Attributes:
        name, kind: where it is, and the name of its class.
        reason: why it is left.
    """

    name: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{_called(self.name)}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class AccelerateReport:
    """What :func:`accelerate` did; ``str(report)`` is for reading.

    Attributes:
        replaced: what this call replaced.
        left: what it left, and why.
        already: names of the modules that were fast before, by an earlier call or as built.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    already: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"{len(self.replaced)} replaced, {len(self.left)} left"
        if self.already:
            counts += f", {len(self.already)} fast already"
        lines = [f"accelerate: {counts}"]
        lines += [f"  replaced {entry}" for entry in self.replaced]
        lines += [f"  left {entry}" for entry in self.left]
        lines += [f"  fast already {_called(name)}" for name in self.already]
        if len(lines) == 1:
            lines.append("  nothing in it that this package has a faster way for")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerateReport:
    """Let the modules of ``model`` compute with this package's kernels, in place.

    * ``nn.LSTM`` and ``nn.GRU`` become :class:`~ehrseq_fast.PackedLSTM` and
      :class:`~ehrseq_fast.PackedGRU`: fast on a ``PackedSequence`` on the CPU, which the model has
      to make (``pack_padded_sequence``); padded input goes to PyTorch's layer as before.
    * Models and visit encoders that have the structure of ``ehrsequencing``'s get the fused forward
      pass of :mod:`ehrseq_fast.models`, for padded tensors and for a
      :class:`~ehrseq_fast.PackedVisits` in their place.
    * A module that is one ``nn.Embedding`` and pools its rows (masked mean, sum or maximum) gets
      :func:`~ehrseq_fast.visit_mean_pool`.

    **Nothing but the classes of these instances changes.** They stay the same objects with the same
    parameters, buffers, hooks and ``state_dict``, are instances of their class as before, and
    optimizers go on with them. No class and no module is touched globally. A second call changes
    nothing more; :func:`restore` undoes it. ``copy.deepcopy``, ``pickle`` and ``torch.save`` keep
    an accelerated model accelerated; loading it needs this package, a ``state_dict`` does not. A
    model that is loaded where its class is another than when it was saved runs its own ``forward``,
    with a warning.

    **How a model is recognised.** By names and types of its children and by the number of arguments
    of its ``forward``. Then a copy with random weights is run both ways in float64, in training and
    in ``eval()``, and where outputs or gradients differ the model is left. So is one that draws
    random numbers of its own, writes to its arguments or its attributes, drops other values in
    training, takes codes outside its embedding, cuts its output to the longest patient, changes
    time features, large or small numbers between its layers or probabilities near 0 and 1, has a
    vector of its own for visits without a code, or turns autocast on or off. The model itself is
    not called. What a forward pass prints or counts elsewhere is not found, nor what it does to
    codes in the middle of a large vocabulary or to more than 600 visits or codes alone.
    ``accelerate(model.lstm)`` leaves such a model's own ``forward`` alone. A layer is left where a
    ``forward`` asks for exact classes (``type(self.rnn) is nn.LSTM``); code outside of models that
    does (to initialise weights, to quantise) finds ``PackedLSTM`` there.

    **Where the fused pass is used.** For codes ``[B, V, C]`` of int32 or int64, masks of 0 and 1
    with real visits first and at least one for each patient, and float32 or float64 weights; for
    fractional ``visit_mask``, masks of each kind (bool, integers, floating) and arguments left out
    where the comparison found the same for these too. Everything else goes to the model's own
    ``forward``, and so does a model whose parts were replaced or given hooks since, that holds
    another value where its ``forward`` reads one (a temperature, a flag), or of whose class, or of
    the file where that is defined, a method, function or value was replaced that ``forward`` uses
    (not what other modules hold; under ``torch.compile`` this is looked at when it traces). A visit
    without a real code gives zeros in every mode, where ``ehrsequencing`` gives −inf for max and
    NaN for attention; padded slots are not read. Under autocast hazards of padded tensors are
    float32, as products with a float mask are. Dropout draws other random numbers.
    ``torch.compile`` traces the fused pass of a :class:`~ehrseq_fast.PackedVisits` whole, and
    breaks the graph for padded tensors; :func:`~ehrseq_fast.exporting.export_model` takes it too.
    An embedding with ``sparse=True`` is served where padded slots hold its ``padding_idx``: other
    codes there are rows of the gradient, which ``SparseAdam`` changes.
    ``torch.export`` of padded tensors and ``torch.jit.trace`` take the model's own ``forward``.

    **Wrapped models.** In ``DistributedDataParallel`` and ``DataParallel`` the module inside is
    accelerated, in every process alike. Models that are compiled (``torch.compile``), scripted or
    sharded (FSDP) are refused: accelerate first, then compile or shard. As parts of a larger model
    they are left, and the report says why.

    Args:
        model: any module, a single ``nn.LSTM`` too.

    Returns:
        What was replaced, what was left and why.

    Raises:
        TypeError: for anything but an ``nn.Module``, and for a compiled, scripted or sharded model.

    Example:
        >>> import torch
        >>> import ehrseq_fast
        >>> model = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(4, 8), "rnn": torch.nn.RNN(4, 8)})
        >>> print(ehrseq_fast.accelerate(model))
        accelerate: 1 replaced, 1 left
          replaced lstm: LSTM -> PackedLSTM (packed sequences; padded ones go to PyTorch's layer)
          left rnn: RNN: there are no packed kernels for it
        >>> isinstance(model["lstm"], torch.nn.LSTM), ehrseq_fast.restore(model)
        (True, ('lstm',))
    """
    _refuse_sealed(model)
    replaced, left, already = [], [], []
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    fused: dict[int, str] = {}  # by the id of a module that a fused forward pass reads, its name
    walked = _walk(model)
    asking = _asking_for_types(walked)
    for name, module in walked:
        kind = type(module).__name__
        reason = _why_sealed(module)
        if not reason and asking and type(module) in _PACKED:
            reason = f"forward of {asking} asks for its exact class, which would be another"
        if reason:
            left.append(Left(name, kind, reason))
        elif _is_outdated(module):
            left.append(Left(name, kind, _OUTDATED))
        elif _is_fast(module):
            already.append(name)
        else:
            found = _plan(module, fused.get(id(module)))
            if isinstance(found, str):
                left.append(Left(name, kind, found))
            elif found is not None:
                target, after, note = found
                plan.append((module, target))
                replaced.append(Replaced(name, kind, after, note))
                if target not in _PLAIN:
                    parts = ("lstm", "visit_encoder")
                    inside = (id(module._modules.get(part)) for part in parts)
                    fused |= dict.fromkeys(inside, _called(name))
    marks = [_marks(module, target) for module, target in plan]
    for (module, target), own in zip(plan, marks, strict=True):
        module.__dict__.update(own)
        module.__class__ = target
    return AccelerateReport(tuple(replaced), tuple(left), tuple(already))


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`accelerate`: every module that it gave another class gets its own back.

    The objects are the same before, between and after, so parameters keep what they were trained
    to, and what was changed meanwhile (hooks, ``train()``, devices, dtypes) stays. Modules that
    were built as this package's are left.

    Args:
        model: what was accelerated, or a part of it, or a copy.

    Returns:
        The names of the modules that were changed; empty where nothing was accelerated.

    Raises:
        TypeError: as :func:`accelerate`.
        RuntimeError: where a module was compiled, sharded or parametrized since; nothing is changed
            then.

    Example:
        >>> import torch
        >>> import ehrseq_fast
        >>> gru = torch.nn.GRU(4, 8)
        >>> _ = ehrseq_fast.accelerate(gru)
        >>> type(gru), ehrseq_fast.restore(gru), type(gru) is torch.nn.GRU
        (<class 'ehrseq_fast.packed_gru.module.PackedGRU'>, ('',), True)
    """
    _refuse_sealed(model)
    found: list[tuple[str, nn.Module, type[nn.Module]]] = []
    sealed: list[str] = []
    for name, module in model.named_modules():
        if _why_sealed(module):
            sealed.append(f"{name}.")
        before = _class_before(module)
        if before is None:
            continue
        if type(module) not in _PLAIN and _is_changed_since(module):
            raise RuntimeError(
                f"{_called(name)}: expected the class that accelerate gave it, got "
                f"{type(module).__name__}: take off what was put on it since, then restore"
            )
        if any(name.startswith(prefix) for prefix in sealed):
            raise RuntimeError(
                f"{_called(name)}: expected no compiled or sharded module around it, got one: "
                "restore before compiling or sharding"
            )
        found.append((name, module, before))
    from .models.attributes import FOUND

    for _, module, before in found:
        for mark in (_MARK, FOUND):
            module.__dict__.pop(mark, None)
        module.__class__ = before
    return tuple(name for name, _, _ in found)


def _called(name: str) -> str:
    return name or "the model"


def _marks(module: nn.Module, target: Any) -> dict[str, Any]:
    """What goes with an instance that is given the class ``target``."""
    if target in _PLAIN:
        return {_MARK: True}
    from .models.attributes import FOUND
    from .models.fused_forward import state_of

    return {FOUND: state_of(target._ehrseq_fast_fused, module)}


# Walking a model ----------------------------------------------------------------------------------


def _walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, parents first, with all its names; not what is in sealed ones."""
    names: dict[int, list[str]] = {}
    found: list[nn.Module] = []

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in names:
            names[id(module)].append(name)
            return
        names[id(module)] = [name]
        found.append(module)
        if _why_sealed(module):
            return
        for part, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{part}" if name else part)

    visit(model, "")
    return [(", ".join(names[id(module)]), module) for module in found]


def _refuse_sealed(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {kind_of(model)}")
    reason = _why_sealed(model)
    if reason:
        raise TypeError(
            f"model: expected one that can be changed, got {type(model).__name__}: {reason}"
        )


def _why_sealed(module: nn.Module) -> str:
    """Why the classes in a module must not change any more; empty where they may."""
    if isinstance(module, ScriptModule):
        return "it is scripted, and runs without these classes"
    is_optimized = type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
    if is_optimized or module.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled: accelerate or restore what was compiled, then compile again"
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: no module is one
    kinds = [getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule")]
    if any(kind is not None and isinstance(module, kind) for kind in kinds):
        return "it is sharded: accelerate or restore it before FSDP"
    return ""


def _asking_for_types(walked: list[tuple[str, nn.Module]]) -> str:
    """The class of a module whose forward looks at the exact classes of layers; empty for none."""
    from .models.definitions import asks_for_type

    kinds = dict.fromkeys(type(module) for _, module in walked)
    own = (kind for kind in kinds if not kind.__module__.startswith(("torch.", "ehrseq_fast.")))
    return next((kind.__name__ for kind in own if asks_for_type(kind)), "")


# Single modules -----------------------------------------------------------------------------------


Plan = tuple[type[nn.Module], str, str]


def _plan(module: nn.Module, reader: str | None) -> Plan | str | None:
    """What to give a module: its new class, and the report's ``after`` and ``note``. A reason to
    leave it, or None where there is nothing to say. ``reader`` is the fused model that reads it."""
    if isinstance(module, nn.RNNCellBase):
        return "it computes one step at a time, and there is nothing to pack"
    if isinstance(module, nn.RNNBase):
        return _plan_layer(module, reader)
    if reader is not None or type(module).__module__.startswith("torch."):
        return None
    return _plan_form(module)


def _plan_layer(layer: nn.RNNBase, reader: str | None) -> Plan | str:
    target = _PACKED.get(type(layer))
    if target is None:
        if nn.utils.parametrize.is_parametrized(layer):
            return "it is parametrized, which changed its class: accelerate before that"
        if isinstance(layer, (nn.LSTM, nn.GRU)):
            return "it is of a subclass, whose forward may do something else"
        return "there are no packed kernels for it"
    reason = _why_not_packed(layer)
    if reason:
        return reason
    device = next(layer.parameters()).device.type
    if device != "cpu":
        note = f"on {device} PyTorch's own kernels go on computing it; on the CPU packed sequences"
    elif reader is not None:
        note = f"called by the fused forward of {reader}"
    else:
        note = "packed sequences; padded ones go to PyTorch's layer"
    return target, target.__name__, note


def _why_not_packed(layer: nn.RNNBase) -> str:
    kind = type(layer)
    if kind.forward is not _FORWARDS[kind]:
        return f"nn.{kind.__name__}.forward was replaced"
    if "forward" in layer.__dict__ or "_call_impl" in layer.__dict__:
        return "its forward was replaced"
    if layer.proj_size:
        return "projections (proj_size) have no packed kernel"
    others = {type(weight) for weight in layer.parameters()} - {nn.Parameter}
    if others:
        return f"its weights are of {', '.join(sorted(other.__name__ for other in others))}"
    return ""


def _plan_form(module: nn.Module) -> Plan | str | None:
    from .models.comparison import compare
    from .models.fused_forward import fused_class
    from .models.known_forms import FORMS, form_of, why_no_form

    form = form_of(module)
    if form is None:
        reason = why_no_form(module)
        return f"its forward stays as it is: {reason}" if reason else None
    if form == "encoder" and getattr(module, "aggregation", None) == "attention":
        return "attention over embeddings that exist has no kernel, but within a whole model"
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return "its forward was replaced"
    fused, reason = compare(module, form)
    if fused is None:
        return f"it has the structure of {FORMS[form]}, but {reason}"
    after = f"forward of {FORMS[form]}"
    if fused.pooling is not None:
        after = f"visit_mean_pool, mode {fused.pooling.mode!r}"
    return fused_class(fused), after, reason


def _is_fast(module: nn.Module) -> bool:
    if isinstance(module, (PackedLSTM, PackedGRU)) or _class_before(module) is not None:
        return True
    models = sys.modules.get("ehrseq_fast.models")  # not imported: no module is one of these
    if models is None:
        return False
    from .models.base import VisitSequenceModel
    from .models.lstm_baseline import VisitEncoder

    return isinstance(module, (VisitSequenceModel, VisitEncoder))


def _is_outdated(module: nn.Module) -> bool:
    if getattr(type(module), "_ehrseq_fast_fused", None) is None:
        return False
    from .models.fused_forward import is_outdated

    return is_outdated(module)


def _class_before(module: nn.Module) -> type[nn.Module] | None:
    """The class that an accelerated module had; None for one that was not accelerated."""
    if _MARK in module.__dict__:
        return next((plain for packed, plain in _PLAIN.items() if isinstance(module, packed)), None)
    fused = getattr(type(module), "_ehrseq_fast_fused", None)
    return None if fused is None else fused.kind


def _is_changed_since(module: nn.Module) -> bool:
    """Whether something else changed the class of an accelerated module again."""
    return "_ehrseq_fast_fused" not in type(module).__dict__

"""Whether a module's weights may be read in place of calling the module.

The fused path computes from the weights of modules (the embedding table, the hazard head) without
calling their ``forward``. That is right only while calling them would do nothing else. Code that
reads weights asks here first, and calls the module where the answer is no.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_Kind = TypeVar("_Kind", bound=type[nn.Module])

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)

# What `forward` was when the class was defined: it may be replaced on the class itself.
_FORWARDS: dict[type[nn.Module], Any] = {}
# What leads from a call to `forward`: either may be replaced, on nn.Module, a class or an instance.
_CALL = nn.Module.__call__
_CALL_IMPL = nn.Module._call_impl


def readable(kind: _Kind) -> _Kind:
    """Say that the package knows what ``kind.forward`` computes. Decorates its own modules."""
    _FORWARDS[kind] = kind.forward
    return kind


for _torchs in (nn.Embedding, nn.Linear, nn.ReLU, nn.Tanh, nn.Dropout, nn.Sigmoid, nn.Sequential):
    readable(_torchs)


def is_plain(module: object, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` computes what ``kind`` defines and nothing else.

    False for a subclass (parametrizations make one), for a wrapper, and where a hook is registered
    on the module or on all modules (pruning and weight normalisation of the old style are hooks),
    ``forward`` or the way to it was replaced, the module was compiled, a weight is of a tensor
    subclass, or a ``TorchFunctionMode`` is active.

    Example:
        >>> from torch import nn
        >>> from ehrseq_fast.models.reading import is_plain
        >>> layer = nn.Linear(2, 2)
        >>> is_plain(layer, nn.Linear)
        True
        >>> handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        >>> is_plain(layer, nn.Linear)
        False
    """
    compiling = torch.compiler.is_compiling()
    return _is_unchanged(module, kind, compiling) and not _all_modules_have_hooks(compiling)


def are_plain(modules: Any, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether ``modules`` is an ``nn.Sequential`` of exactly these ``kinds``, each plain."""
    compiling = torch.compiler.is_compiling()
    if not _is_unchanged(modules, nn.Sequential, compiling) or len(modules) != len(kinds):
        return False
    for module, kind in zip(modules, kinds, strict=True):
        if not _is_unchanged(module, kind, compiling):
            return False
    return not _all_modules_have_hooks(compiling)


def is_plain_embedding(embedding: object) -> TypeGuard[nn.Embedding]:
    """Whether ``embedding`` is a table of rows and no option asks for more than looking them up.

    ``max_norm`` rewrites the table in ``forward``, ``scale_grad_by_freq`` counts codes there.
    """
    return (
        isinstance(embedding, nn.Embedding)
        and is_plain(embedding, nn.Embedding)
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
    )


def _is_unchanged(module: Any, kind: type[nn.Module], compiling: bool) -> bool:
    """:func:`is_plain`, apart from what holds of all modules."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return (
        "forward" not in own
        and "_call_impl" not in own
        and kind.forward is _FORWARDS[kind]
        # the tracer puts its own in the place of both
        and (compiling or (kind.__call__ is _CALL and kind._call_impl is _CALL_IMPL))
        # as attributes, which torch.compile can be told to look at again (docs/export.md)
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        and own.get("_compiled_call_impl") is None
        and _holds_plain_tensors(own)
    )


def _holds_plain_tensors(own: dict[str, Any]) -> bool:
    for tensor in own["_parameters"].values():
        if tensor is not None and type(tensor) not in _PLAIN_TENSORS:
            return False
    for name in ("weight", "bias"):  # replicas of DataParallel hold their weights as attributes
        if name in own and type(own[name]) not in _PLAIN_TENSORS:
            return False
    return True


def _all_modules_have_hooks(compiling: bool) -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or (not compiling and _a_function_mode_is_active())
    )


def _a_function_mode_is_active() -> bool:
    """Whether a mode other than that of ``torch.set_default_device`` sees functions called."""
    if not torch._C._is_torch_function_mode_enabled():
        return False
    modes = _get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)

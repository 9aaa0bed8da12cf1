"""The recurrent layer of a model: the one it is built with, and any that is put in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import BackwardHook

from ..backend import requested, use_backend
from ..checks import expect_option
from ..openmp import refuse_restricted_openmp
from ..packed_gru import PackedGRU
from ..packed_lstm import PackedLSTM

CELLS: dict[str, type[PackedLSTM] | type[PackedGRU]] = {"lstm": PackedLSTM, "gru": PackedGRU}
_OURS = tuple(CELLS.values())

_TRAITS = ("batch_first", "bidirectional", "hidden_size", "num_layers")


def visit_layer(
    cell: str, inputs: int, hidden_dim: int, num_layers: int, dropout: float, **options: Any
) -> PackedLSTM | PackedGRU:
    """The recurrent layer of a model: as ``nn.LSTM`` or ``nn.GRU``, with batches first, dropout
    between layers where there is more than one, and frugal with memory.

    Raises:
        ValueError: for another cell.
    """
    expect_option("cell", cell, CELLS)
    between = dropout if num_layers > 1 else 0.0
    layer = CELLS[cell](
        inputs, hidden_dim, num_layers, batch_first=True, dropout=between, **options
    )
    layer.keep_gates = None
    return layer


def recurrent_layer(module: nn.Module) -> Any:
    """What says of ``model.lstm`` how wide it is and in which directions it runs: itself, or the
    one recurrent layer inside a wrapper.

    Raises:
        TypeError: if it is no recurrent layer and does not hold exactly one.
    """
    if _has_traits(module):
        return module
    inside = [layer for layer in module.modules() if _has_traits(layer)]
    if len(inside) == 1:
        return inside[0]
    raise TypeError(
        "model.lstm: expected a recurrent layer (nn.LSTM, nn.GRU, nn.RNN) or a module that holds "
        f"exactly one, got {type(module).__name__}, which holds {len(inside)}"
    )


def _has_traits(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) or all(hasattr(module, trait) for trait in _TRAITS)


def run(module: nn.Module, input: Tensor | PackedSequence, state: Any = None) -> tuple[Any, Any]:
    """``module`` called on packed visits, or on ``[B, V, E]``: outputs in the same form and the
    final states as the module gives them.

    Under autocast on the CPU outputs keep the dtype of ``input``, which the kernels compute in:
    PyTorch's LSTM gives autocast's for padded visits and for packed ones of equal lengths alone.

    Raises:
        TypeError: if the result is not that of a recurrent layer.
        RuntimeError: where PyTorch's own layers would run and be wrong
            (:func:`~ehrseq_fast.openmp.refuse_restricted_openmp`).
    """
    layer = recurrent_layer(module)
    if not isinstance(layer, _OURS):  # which see to this themselves
        data = input if isinstance(input, Tensor) else input.data
        is_lstm = getattr(layer, "mode", "LSTM") == "LSTM"
        refuse_restricted_openmp(data, type(layer).__name__, is_lstm=is_lstm)
    hook = _backward_hook(module) if isinstance(input, PackedSequence) else None
    if hook is not None:
        input = input._replace(data=hook.setup_input_hook((input.data,))[0])  # type: ignore[union-attr]
    is_transposed = isinstance(input, Tensor) and not layer.batch_first
    given = input.transpose(0, 1) if is_transposed else input  # type: ignore[union-attr]
    with _own_precision(module, given):
        result = module(given) if state is None else module(given, state)
    kind = PackedSequence if isinstance(input, PackedSequence) else Tensor
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], kind):
        raise TypeError(
            f"model.lstm: given a {kind.__name__}, must return one and its final states, as "
            f"nn.LSTM does; {type(module).__name__} returned {type(result).__name__}"
        )
    outputs, final = result
    if hook is not None:
        # not the final states as well: a GRU's are a tensor, which nn.Module has a hook for itself
        outputs = outputs._replace(data=hook.setup_output_hook((outputs.data, None))[0])
    outputs = outputs.transpose(0, 1) if is_transposed else outputs
    if torch.is_autocast_enabled("cpu"):
        outputs = _in_dtype_of(input, outputs)
    return outputs, final


def _own_precision(module: nn.Module, input: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast off for the package's own layer on packed visits: it computes in the dtype of these,
    and its states are not to be rounded where all patients happen to have as many visits."""
    is_own = type(module) is PackedLSTM and isinstance(input, PackedSequence)
    if not is_own or not torch.is_autocast_enabled("cpu") or input.data.device.type != "cpu":
        return contextlib.nullcontext()
    if module.weight_hh_l0.dtype != input.data.dtype or requested() == "reference":
        return contextlib.nullcontext()
    return torch.autocast("cpu", enabled=False)


def _in_dtype_of(input: Any, outputs: Any) -> Any:
    if isinstance(outputs, PackedSequence):
        return outputs._replace(data=_in_dtype_of(input.data, outputs.data))
    return outputs.to(input.dtype) if outputs.device.type == "cpu" else outputs


def _backward_hook(module: nn.Module) -> BackwardHook | None:
    """What calls the full backward hooks of ``module``, with the gradients of the packed rows.

    ``nn.Module`` calls them for tensors that a module takes and returns, and does not look for
    tensors inside a PackedSequence: called with one, it would leave its hooks out.
    """
    full = _module._global_is_full_backward_hook is not False and _module._global_backward_hooks
    if not (
        full
        or _module._global_backward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return None
    hooks, _ = module._get_backward_hooks()
    before = module._get_backward_pre_hooks()
    return BackwardHook(module, hooks, before) if hooks or before else None


@torch.compiler.disable
def run_plain(module: nn.Module, input: Tensor | PackedSequence) -> tuple[Any, Any]:
    """:func:`run` with PyTorch's own kernels, which the packed and padded paths are there to
    show.

    Raises:
        RuntimeError: as :func:`run`.
    """
    with use_backend("reference"):
        return run(module, input)


def untransformed(module: nn.Module, path: str, error: RuntimeError) -> RuntimeError:
    """The error of a transform that PyTorch's recurrent layers do not have a rule for."""
    layer = recurrent_layer(module)
    return RuntimeError(
        f"model.lstm, of class {type(layer).__name__}, on path={path!r} runs PyTorch's own "
        "recurrent layer, which torch.func and forward-mode differentiation do not transform in "
        'this way; the model\'s own cell (cell="lstm" or cell="gru") on path="fused" is '
        f"transformed ({error})"
    )


def first_state(module: nn.Module, n_patients: int) -> tuple[Tensor, Tensor | None]:
    """The state before the first visit: ``h`` and, for an LSTM, ``c``.

    Raises:
        ValueError: for a bidirectional layer, whose states depend on visits still to come.
    """
    layer = recurrent_layer(module)
    if layer.bidirectional:
        raise ValueError(
            "a bidirectional model cannot score record by record: its states depend on later visits"
        )
    # Weights that are loaded when the layer is called (CPU offloading) are on "meta" until then.
    weights: Iterator[Tensor] = (
        p for p in module.parameters() if p.is_floating_point() and p.device.type != "meta"
    )
    like: Tensor = next(weights, torch.zeros(0, device="cpu")).detach()
    width = getattr(layer, "proj_size", 0) or layer.hidden_size
    h = like.new_zeros(layer.num_layers, n_patients, width)
    if getattr(layer, "mode", "LSTM") != "LSTM":
        return h, None
    return h, like.new_zeros(layer.num_layers, n_patients, layer.hidden_size)

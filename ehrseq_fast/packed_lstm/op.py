"""The packed LSTM as an operation: gradient, choice of backend, layers and directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.utils.rnn import PackedSequence

from .. import backend
from ..autograd import once, transformed
from . import operators  # noqa: F401  (which defines what is called here)
from .reference import packed_lstm_layer as layer_by_definition
from .threads import refuse_restricted_openmp

States = tuple[Tensor, Tensor]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input,
        batch_sizes,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        reverse,
        kept,
    ):
        operands = (input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)
        output, h_n, c_n, gates, cells = torch.ops.ehrseq_fast.packed_lstm_layer(
            *operands, reverse, True, kept
        )
        ctx.save_for_backward(*operands, output, gates, cells)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        need = ctx.needs_input_grad
        operands = (
            *(grad_output, grad_h_n, grad_c_n),
            *ctx.saved_tensors,
            *(ctx.reverse, need[0], any(need[2:6]), any(need[6:8])),
        )
        with torch.no_grad():
            grads = torch.ops.ehrseq_fast.packed_lstm_layer_backward(*operands)
        grads = once("packed_lstm", grads, operands[:11])
        grad_input, grad_weight_ih, grad_weight_hh, grad_bias, grad_h0, grad_c0 = grads
        # Equal numbers, but each its own: gradients may be changed in place.
        other_bias = grad_bias
        if grad_bias is not None and need[4] and need[5]:
            other_bias = grad_bias.clone()
        return (
            grad_input if need[0] else None,
            None,
            grad_weight_ih if need[2] else None,
            grad_weight_hh if need[3] else None,
            grad_bias if need[4] else None,
            other_bias if need[5] else None,
            grad_h0 if need[6] else None,
            grad_c0 if need[7] else None,
            None,
            None,
        )


def _layer(
    input: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    reverse: bool,
    keep_gates: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_ih, bias_hh = weights[2:] if len(weights) == 4 else (None, None)
    operands = (input, *weights, h0, c0)
    if transformed(*operands):
        weight_ih, weight_hh = weights[:2]
        return layer_by_definition(
            input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return _Layer.apply(
            *(input, batch_sizes, *weights[:2], bias_ih, bias_hh, h0, c0, reverse),
            _kept_visits(input, keep_gates),
        )
    output, h_n, c_n, _, _ = torch.ops.ehrseq_fast.packed_lstm_layer(
        input, batch_sizes, *weights[:2], bias_ih, bias_hh, h0, c0, reverse, False, 0
    )
    return output, h_n, c_n


def _kept_visits(input: Tensor, keep_gates: float) -> int:
    """How many visits' gates to keep: that share, in 64ths."""
    if torch.compiler.is_compiling():  # a share of a size has no name in the traced graph
        return input.shape[0]
    if input.dtype not in (torch.float32, torch.float64):
        # 16-bit states were rounded on their way out, and would not give the same gates again.
        return input.shape[0]
    return input.shape[0] * int(64 * keep_gates) // 64


def _layers(
    data: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: States | None,
    directions: int,
    dropout: float,
    keep_gates: float,
) -> tuple[Tensor, Tensor, Tensor]:
    finals: list[States] = []
    for first in range(0, len(weights), directions):
        if first > 0 and dropout > 0:
            data = drop(data, dropout, training=True)
        outputs = []
        for i in range(first, first + directions):
            h0, c0 = (None, None) if states is None else (states[0][i], states[1][i])
            output, *final = _layer(data, batch_sizes, weights[i], h0, c0, i > first, keep_gates)
            outputs.append(output)
            finals.append((final[0], final[1]))
        data = outputs[0] if directions == 1 else torch.cat(outputs, dim=1)
    return data, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])


def _one_step(
    data: Tensor, weights: Sequence[Sequence[Tensor]], states: States
) -> tuple[Tensor, Tensor, Tensor]:
    """One visit of each patient: packing the weights would cost more than the step itself.

    Autocast is off, as for the kernels: a patient's state must not depend on how many there are.
    """
    finals = []
    with torch.autocast("cpu", enabled=False):
        for i, layer in enumerate(weights):
            final = torch.lstm_cell(data, (states[0][i], states[1][i]), *layer)
            finals.append(final)
            data = final[0]
    return data, torch.stack([h for h, _ in finals]), torch.stack([c for _, c in finals])


def _by_pytorch(
    data: Tensor,
    batch_sizes: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: States,
    directions: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch._VF.lstm(  # type: ignore[attr-defined]
        data,
        batch_sizes,
        states,
        [tensor for layer in weights for tensor in layer],
        len(weights[0]) == 4,
        len(weights) // directions,
        dropout,
        dropout > 0,
        directions == 2,
    )


def _check(
    sequence: PackedSequence,
    weights: Sequence[Sequence[Tensor]],
    hx: States | None,
    directions: int,
    dropout: float,
    keep_gates: float,
) -> None:
    if not isinstance(sequence, PackedSequence):
        raise TypeError(
            f"packed_lstm: sequence must be a PackedSequence, and is {type(sequence).__name__}"
        )
    data, batch_sizes = sequence.data, sequence.batch_sizes
    if data.dim() != 2:
        raise ValueError(
            f"packed_lstm: the data of the sequence must be [visits, inputs], and is "
            f"{list(data.shape)}"
        )
    if not weights or len(weights) % directions:
        raise ValueError(
            f"packed_lstm: weights must hold one entry per layer and direction, {directions} per "
            f"layer, and holds {len(weights)}"
        )
    if not 0 <= keep_gates <= 1:
        raise ValueError(
            f"packed_lstm: keep_gates must be a share of the visits, and is {keep_gates}"
        )
    if not 0 <= dropout <= 1:
        raise ValueError(f"packed_lstm: dropout must be a probability, and is {dropout}")
    for i, layer in enumerate(weights):
        if len(layer) not in (2, 4) or len(layer) != len(weights[0]):
            raise ValueError(
                "packed_lstm: every entry of weights must hold weight_ih, weight_hh and either "
                f"both biases or none; entry {i} holds {len(layer)} tensors"
            )
    hidden = weights[0][1].shape[-1] if weights[0][1].dim() else 0
    if hidden < 1:
        raise ValueError(
            "packed_lstm: there must be at least one hidden unit, got weight_hh "
            f"{list(weights[0][1].shape)}"
        )
    for i, layer in enumerate(weights):
        inputs = data.shape[1] if i < directions else directions * hidden
        shapes = [[4 * hidden, inputs], [4 * hidden, hidden], [4 * hidden], [4 * hidden]]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        for name, tensor, shape in zip(names, layer, shapes, strict=False):
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"packed_lstm: {name} of entry {i} of weights must be {shape}, and is "
                    f"{list(tensor.shape)}"
                )
    named = [(f"weights[{i}]", tensor) for i, layer in enumerate(weights) for tensor in layer]
    if batch_sizes.numel() == 0:
        raise ValueError("packed_lstm: batch_sizes must hold one number per time, got none")
    if hx is not None:
        if isinstance(hx, Tensor) or len(hx) != 2:
            raise ValueError(
                "packed_lstm: hx must be the pair (h_0, c_0), got "
                + ("one tensor" if isinstance(hx, Tensor) else f"{len(hx)} tensors")
            )
        for name, state in zip(("h_0", "c_0"), hx, strict=True):
            if state.dim() != 3 or [state.shape[0], state.shape[2]] != [len(weights), hidden]:
                raise ValueError(
                    f"packed_lstm: {name} must be [layers * directions, patients, hidden] = "
                    f"[{len(weights)}, patients, {hidden}], and is {list(state.shape)}"
                )
            named.append((name, state))
        if not torch.compiler.is_compiling() and any(
            state.shape[1] != batch_sizes[0] for state in hx
        ):
            raise ValueError(
                f"packed_lstm: the sequence has {int(batch_sizes[0])} patients, and h_0 and c_0 "
                f"have {hx[0].shape[1]} and {hx[1].shape[1]}"
            )
    for name, tensor in named:
        if tensor.dtype != data.dtype:
            raise TypeError(f"packed_lstm: {name} is {tensor.dtype}, and the sequence {data.dtype}")


def _in_dtype(dtype: torch.dtype, weights, hx):
    weights = [[tensor.to(dtype) for tensor in layer] for layer in weights]
    return weights, hx if hx is None else (hx[0].to(dtype), hx[1].to(dtype))


# A step of at most this many patients is left to torch.lstm_cell.
_FEW_PATIENTS = 4


def packed_lstm(
    sequence: PackedSequence,
    weights: Sequence[Sequence[Tensor]],
    hx: States | None = None,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    keep_gates: float = 1.0,
) -> tuple[PackedSequence, States]:
    """The LSTM of :class:`torch.nn.LSTM` over a packed batch of sequences, nothing padded.

    On the CPU, forward and backward are compiled: the scan works on weights packed once per call,
    each thread takes some patients through all their visits, the tail of long records is shared
    out by hidden units, and the gradients of the weights are single products over all visits.
    Elsewhere, and on the backend ``reference``, PyTorch's own ``lstm`` computes the same.

    Args:
        sequence: data ``[visits, E]`` with its batch sizes, as ``pack_padded_sequence`` and
            ``pack_sequence`` build it. float32, float64, bfloat16 or float16; 16-bit types are
            computed in float32, states included, and rounded once at the end of each layer. (On
            CPUs with AVX512-BF16, bfloat16 layers of even width multiply bfloat16, hidden states
            and gate gradients being rounded for it; sums, cells and activations are float32.)
        weights: per layer and direction (forward, then reverse) the tensors ``weight_ih``
            ``[4H, E]``, ``weight_hh`` ``[4H, H]`` and both biases ``[4H]`` or none of them: what
            ``nn.LSTM.all_weights`` holds.
        hx: initial states ``(h_0, c_0)``, each ``[layers * directions, patients, H]``, patients in
            the caller's order. Zeros by default.
        bidirectional: whether each layer has two directions.
        dropout: probability with which outputs of every layer but the last are zeroed, the others
            being scaled by 1 / (1 - dropout); in training alone.
        training: whether dropout applies.
        keep_gates: the share of visits whose gates the forward pass keeps for the backward pass,
            4H values a visit; of the others it computes them again, to the same bits. All of them
            are half of what the step holds; none cost one product more, of six. 16-bit layers keep
            all, and so does ``torch.compile``.

    Returns:
        The outputs of the last layer, packed as ``sequence`` is, ``[visits, directions * H]``, and
        the final states ``(h_n, c_n)`` shaped as ``hx``, in the caller's order.

    Raises:
        ValueError: for a shape that does not fit, or batch sizes that are not positive, rise, or
            do not count the rows of the data.
        TypeError: if ``sequence`` is not packed, or dtypes differ (under autocast, weights and
            states are taken in the dtype of the data).
        RuntimeError: if a backend was asked for that cannot run; on differentiating twice on
            backend ``cpu``, save by the transforms of ``torch.func``.

    Results are the same bits for any number of threads and on every run.

    Source: Hochreiter and Schmidhuber, Long short-term memory, Neural Computation 9(8), 1997, with
    the forget gate of Gers et al., 2000; the equations are in ``reference.py``.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> import ehrseq_fast
        >>> lstm = torch.nn.LSTM(input_size=3, hidden_size=2)
        >>> records = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
        >>> output, (h_n, c_n) = ehrseq_fast.packed_lstm(records, lstm.all_weights)
        >>> output.data.shape, h_n.shape
        (torch.Size([6, 2]), torch.Size([1, 2, 2]))
        >>> torch.allclose(output.data, lstm(records)[0].data, atol=1e-6)
        True
    """
    directions = 2 if bidirectional else 1
    if torch.is_autocast_enabled("cpu") and isinstance(sequence, PackedSequence):
        weights, hx = _in_dtype(sequence.data.dtype, weights, hx)
    _check(sequence, weights, hx, directions, dropout, keep_gates)
    data, batch_sizes, sorted_indices, unsorted_indices = sequence
    if hx is not None and sorted_indices is not None:
        hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))
    rate = dropout if training else 0.0

    chosen = backend.choose("packed_lstm", data.device.type, data.dtype)
    if transformed(data, *(tensor for layer in weights for tensor in layer), *(hx or ())):
        _check_batch_sizes(data, batch_sizes)
        output, h_n, c_n = _layers(data, batch_sizes, weights, hx, directions, rate, keep_gates)
    elif chosen == "reference":
        _check_batch_sizes(data, batch_sizes)
        refuse_restricted_openmp(data, "packed_lstm")
        if hx is None:
            patients, hidden = int(batch_sizes[0]), weights[0][1].shape[1]
            zeros = data.new_zeros(len(weights), patients, hidden)
            hx = (zeros, zeros)
        output, h_n, c_n = _by_pytorch(data, batch_sizes, weights, hx, directions, rate)
    elif _is_one_small_step(data, batch_sizes, hx, directions, rate):
        assert hx is not None
        output, h_n, c_n = _one_step(data, weights, hx)
    else:
        output, h_n, c_n = _layers(data, batch_sizes, weights, hx, directions, rate, keep_gates)

    if unsorted_indices is not None:
        h_n, c_n = h_n.index_select(1, unsorted_indices), c_n.index_select(1, unsorted_indices)
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), (h_n, c_n)


def _is_one_small_step(
    data: Tensor, batch_sizes: Tensor, hx: States | None, directions: int, rate: float
) -> bool:
    return (
        not torch.compiler.is_compiling()
        and hx is not None
        and directions == 1
        and rate == 0
        and data.dtype in (torch.float32, torch.float64)
        and batch_sizes.numel() == 1
        and data.shape[0] == int(batch_sizes[0]) <= _FEW_PATIENTS
    )


def _check_batch_sizes(data: Tensor, batch_sizes: Tensor) -> None:
    """What the compiled kernel checks for itself."""
    if torch.compiler.is_compiling():
        return
    sizes = batch_sizes.tolist()
    falls = all(later <= earlier for earlier, later in pairwise(sizes))
    if not sizes or not falls or sizes[-1] < 1:
        raise ValueError(f"packed_lstm: batch_sizes must be positive and must not rise: {sizes}")
    if sum(sizes) != data.shape[0]:
        raise ValueError(
            f"packed_lstm: batch_sizes must be the number of visits at each time, "
            f"{data.shape[0]} in all, got {sum(sizes)}"
        )

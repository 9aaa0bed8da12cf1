"""The packed GRU as an operation: its gradient and its public function. Layers, directions and the
choice of backend are in ``recurrent.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..arrays import kind_of
from ..autograd import once
from ..recurrent import Cell, read_again, run, with_shapes
from . import operators  # noqa: F401  (which defines what is called here)
from .reference import packed_gru_layer


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, reverse, kept):
        operands = (input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0)
        output, h_n, gates = torch.ops.ehrseq_fast.packed_gru_layer(*operands, reverse, True, kept)
        again = read_again(operands, kept, ctx.needs_input_grad[0])
        ctx.save_for_backward(*again, output, gates)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        need = ctx.needs_input_grad
        operands = (
            *(grad_output, grad_h_n),
            *with_shapes(ctx.saved_tensors),
            *(ctx.reverse, need[0], any(need[2:6]), need[6]),
        )
        with torch.no_grad():
            grads = torch.ops.ehrseq_fast.packed_gru_layer_backward(*operands)
        of_input, *of_weights, of_h0 = once("packed_gru", grads, operands[:10])
        of_weights = [
            grad if is_needed else None
            for grad, is_needed in zip(of_weights, need[2:6], strict=True)
        ]
        return (
            of_input if need[0] else None,
            None,
            *of_weights,
            of_h0 if need[6] else None,
            None,
            None,
        )


def _infer(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, reverse):
    return torch.ops.ehrseq_fast.packed_gru_layer(
        input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, reverse, False, 0
    )[:2]


def _step(data, states, weights):
    return (torch.gru_cell(data, states[0], *weights),)


def _by_pytorch(data, batch_sizes, states, weights, options):
    return torch._VF.gru(data, batch_sizes, states[0], weights, *options)  # type: ignore[attr-defined]


_GRU = Cell(
    "packed_gru",
    gates=3,
    states=("h_0",),
    train=_Layer.apply,
    infer=_infer,
    definition=packed_gru_layer,
    step=_step,
    by_pytorch=_by_pytorch,
)


def packed_gru(
    sequence: PackedSequence,
    weights: Sequence[Sequence[Tensor]],
    hx: Tensor | None = None,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    keep_gates: float | None = 1.0,
) -> tuple[PackedSequence, Tensor]:
    """The GRU of :class:`torch.nn.GRU` over a packed batch of sequences, nothing padded.

    On the CPU, forward and backward are compiled, as those of :func:`packed_lstm` are. Elsewhere,
    and on the backend ``reference``, PyTorch's own ``gru`` computes the same.

    Args:
        sequence: data ``[visits, E]`` with its batch sizes, as ``pack_padded_sequence`` and
            ``pack_sequence`` build it. float32, float64, bfloat16 or float16; 16-bit types are
            computed in float32, states included, and rounded once at the end of each layer. (On
            CPUs with AVX512-BF16, bfloat16 layers of even width multiply bfloat16, hidden states
            and gradients being rounded for it; sums, activations and the state that the update gate
            keeps are float32.)
        weights: per layer and direction (forward, then reverse) the tensors ``weight_ih``
            ``[3H, E]``, ``weight_hh`` ``[3H, H]`` and both biases ``[3H]`` or none of them: what
            ``nn.GRU.all_weights`` holds.
        hx: initial states ``[layers * directions, patients, H]``, patients in the caller's order.
            Zeros by default.
        bidirectional: whether each layer has two directions.
        dropout: probability with which outputs of every layer but the last are zeroed, the others
            being scaled by 1 / (1 - dropout); in training alone.
        training: whether dropout applies.
        keep_gates: the share of visits whose gates the forward pass keeps for the backward pass,
            4H values a visit (the reset gate needs what it scales too); of the others it computes
            them again, to the same bits, which is two products more, of six. None keeps all up to
            16 MiB, and two fifths of more. 16-bit layers keep all, and so does ``torch.compile``.

    Returns:
        The outputs of the last layer, packed as ``sequence`` is, ``[visits, directions * H]``, and
        the final states shaped as ``hx``, in the caller's order.

    Raises:
        ValueError: for a shape that does not fit, or batch sizes that are not positive, rise, or
            do not count the rows of the data.
        TypeError: if ``sequence`` is not packed, ``hx`` is no tensor, or dtypes differ (under
            autocast, weights and states are taken in the dtype of the data).
        RuntimeError: if a backend was asked for that cannot run; on differentiating twice on
            backend ``cpu``, except by the transforms of ``torch.func``.

    Results are the same bits for any number of threads and on every run.

    Source: Cho et al., Learning phrase representations using RNN encoder-decoder, EMNLP 2014, with
    PyTorch's reset gate; the equations are in ``reference.py``.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> import ehrseq_fast
        >>> gru = torch.nn.GRU(input_size=3, hidden_size=2)
        >>> records = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
        >>> output, h_n = ehrseq_fast.packed_gru(records, gru.all_weights)
        >>> output.data.shape, h_n.shape
        (torch.Size([6, 2]), torch.Size([1, 2, 2]))
        >>> torch.allclose(output.data, gru(records)[0].data, atol=1e-6)
        True
    """
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"packed_gru: hx: expected a tensor or None, got {kind_of(hx)}")
    states = None if hx is None else (hx,)
    output, finals = run(
        _GRU, sequence, weights, states, bidirectional, dropout, training, keep_gates
    )
    return output, finals[0]

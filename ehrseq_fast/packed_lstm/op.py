"""The packed LSTM as an operation: its public function. Its gradient is in ``layer.py``; layers,
directions and the choice of backend are in ``recurrent.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..openmp import refuse_restricted_openmp
from ..recurrent import Cell, CudaCell, run
from . import cuda
from .layer import CudaLayer, Layer, infer, infer_on_cuda
from .reference import packed_lstm_layer

States = tuple[Tensor, Tensor]


def _step(data: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]) -> States:
    return torch.lstm_cell(data, states, *weights)


def _by_pytorch(data, batch_sizes, states, weights, options):
    refuse_restricted_openmp(data, "packed_lstm", is_lstm=True)
    return torch._VF.lstm(data, batch_sizes, states, weights, *options)  # type: ignore[attr-defined]


_LSTM = Cell(
    "packed_lstm",
    gates=4,
    states=("h_0", "c_0"),
    train=Layer.apply,
    infer=infer,
    definition=packed_lstm_layer,
    step=_step,
    by_pytorch=_by_pytorch,
    cuda=CudaCell(CudaLayer.apply, infer_on_cuda, cuda.why_not),
)


def packed_lstm(
    sequence: PackedSequence,
    weights: Sequence[Sequence[Tensor]],
    hx: States | None = None,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    keep_gates: float | None = 1.0,
) -> tuple[PackedSequence, States]:
    """The LSTM of :class:`torch.nn.LSTM` over a packed batch of sequences, nothing padded.

    On the CPU, forward and backward are compiled: the scan works on weights packed once per call,
    each thread takes some patients through all their visits, the tail of long records is shared
    out by hidden units, and the gradients of the weights are single products over all visits.
    Elsewhere, and on the backend ``reference``, PyTorch's own ``lstm`` computes the same (cuDNN on
    a GPU).

    There are CUDA kernels too, which no GPU has measured, and which are taken only when they are
    asked for: ``EHRSEQ_FAST_CUDA_LSTM=1``, or the backend ``cuda``, on GPUs of compute capability
    9.0 and 10.x, for hidden sizes that are multiples of 32, up to 288 in float32 and 416 in
    bfloat16 and float16, outside autocast and ``torch.compile``. All else goes to cuDNN as before.
    In 16 bits, and in float32 as TF32 where ``torch.backends.cudnn.allow_tf32`` is on, they
    multiply on tensor cores: weights, hidden states and, backward, the gradients of the gates' sums
    are rounded to such operands; all sums, gates and cells are float32. Else float32 is exact.
    Products over all visits follow ``torch.backends.cuda.matmul``.

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
            4H values a visit; of the others it computes them again, to the same bits, which is two
            products more, of six. All of them are half of what the step holds. None keeps all up
            to 16 MiB, and two fifths of more. 16-bit layers keep all, and so do ``torch.compile``
            and the CUDA kernels.

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
    if hx is not None:
        if isinstance(hx, Tensor) or len(hx) != 2:
            raise ValueError(
                "packed_lstm: hx: expected the pair (h_0, c_0), got "
                + ("one tensor" if isinstance(hx, Tensor) else f"{len(hx)} tensors")
            )
        hx = (hx[0], hx[1])
    output, (h_n, c_n) = run(
        _LSTM, sequence, weights, hx, bidirectional, dropout, training, keep_gates
    )
    return output, (h_n, c_n)

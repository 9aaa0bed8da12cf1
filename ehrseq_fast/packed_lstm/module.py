"""``PackedLSTM``, the drop-in for ``nn.LSTM``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .. import backend
from ..autograd import transformed
from ..openmp import refuse_restricted_openmp
from . import cuda
from .op import packed_lstm

_FORWARD = nn.LSTM.forward  # it may be replaced on the class


class PackedLSTM(nn.LSTM):
    """``nn.LSTM`` that is fast on packed sequences on the CPU, in training above all.

    Constructor, parameters, ``state_dict`` and results are those of :class:`torch.nn.LSTM`. A
    ``PackedSequence`` on the CPU goes to :func:`packed_lstm`, and on a GPU where its CUDA kernels
    are asked for and serve; everything else goes to ``nn.LSTM`` itself: tensors that are not
    packed, other devices, projections (``proj_size > 0``), the backend ``reference``, and where
    ``nn.LSTM.forward`` was replaced.
    ``batch_first`` says nothing about packed data, as in ``nn.LSTM``.

    Under autocast on the CPU results have the dtype of ``nn.LSTM``'s: autocast's for padded tensors
    and for packed ones of which all patients have as many visits, that of the data for others. The
    kernels compute in the dtype of the data, so autocast never makes them slower.

    Differentiating twice is refused where the compiled kernel ran; the transforms of ``torch.func``
    and forward-mode differentiation are right everywhere, at the speed of plain PyTorch.

    Raises:
        ValueError, TypeError: as :func:`packed_lstm`.
        RuntimeError: as :func:`packed_lstm`; where ``nn.LSTM`` would run and be wrong
            (``OMP_THREAD_LIMIT`` below ``torch.get_num_threads()``, ``OMP_DYNAMIC``, or
            ``OMP_MAX_ACTIVE_LEVELS=0``).

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> import ehrseq_fast
        >>> plain = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        >>> fast = ehrseq_fast.PackedLSTM(3, 4, num_layers=2, bidirectional=True)
        >>> _ = fast.load_state_dict(plain.state_dict())
        >>> records = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> torch.allclose(fast(records)[0].data, plain(records)[0].data, atol=1e-6)
        True
    """

    #: As in :func:`packed_lstm`; may be set on an instance.
    keep_gates: float | None = 1.0

    def forward(self, input, hx=None):
        """As ``nn.LSTM.forward``: outputs and ``(h_n, c_n)``."""
        if self._takes(input, hx):
            output, (h_n, c_n) = packed_lstm(
                input,
                self.all_weights,
                hx,
                bidirectional=self.bidirectional,
                dropout=self.dropout,
                training=self.training,
                keep_gates=self.keep_gates,
            )
            dtype = _dtype_under_autocast(output)
            if dtype == output.data.dtype:
                return output, (h_n, c_n)
            return output._replace(data=output.data.to(dtype)), (h_n.to(dtype), c_n.to(dtype))
        data = input.data if isinstance(input, PackedSequence) else input
        refuse_restricted_openmp(data, "PackedLSTM", is_lstm=True)
        return super().forward(input, hx)

    def _takes(self, input, hx) -> bool:
        if self.proj_size != 0 or not isinstance(input, PackedSequence):
            return False
        if nn.LSTM.forward is not _FORWARD:
            return False
        if backend.choose("packed_lstm", input.data.device.type, input.data.dtype) == "cpu":
            return True
        if cuda.why_not(input.data, self.hidden_size) is None:
            return True
        # which PyTorch's own lstm does not serve
        return transformed(input.data, *self.parameters(), *(hx or ()))


def _dtype_under_autocast(output: PackedSequence) -> torch.dtype:
    """The dtype of ``nn.LSTM``'s results under autocast on the CPU: autocast's where all patients
    have as many visits, and that of the data everywhere else."""
    data, sizes = output.data, output.batch_sizes
    if not torch.is_autocast_enabled("cpu") or data.device.type != "cpu":
        return data.dtype
    if data.dtype == torch.float64 or torch.compiler.is_compiling() or sizes[0] != sizes[-1]:
        return data.dtype
    return torch.get_autocast_dtype("cpu")

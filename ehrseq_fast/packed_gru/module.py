"""``PackedGRU``, the drop-in for ``nn.GRU``."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from .. import backend
from ..autograd import transformed
from ..openmp import refuse_restricted_openmp
from .op import packed_gru

_FORWARD = nn.GRU.forward  # it may be replaced on the class


class PackedGRU(nn.GRU):
    """``nn.GRU`` that is fast on packed sequences on the CPU, in training above all.

    Constructor, parameters, ``state_dict`` and results are those of :class:`torch.nn.GRU`. A
    ``PackedSequence`` on the CPU goes to :func:`packed_gru`; everything else goes to ``nn.GRU``
    itself: tensors that are not packed, other devices, the backend ``reference``, and where
    ``nn.GRU.forward`` was replaced.
    ``batch_first`` says nothing about packed data, as in ``nn.GRU``.

    Differentiating twice is refused where the compiled kernel ran; the transforms of ``torch.func``
    and forward-mode differentiation are right everywhere, at the speed of plain PyTorch.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`packed_gru`.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> import ehrseq_fast
        >>> plain = torch.nn.GRU(3, 4, num_layers=2, bidirectional=True)
        >>> fast = ehrseq_fast.PackedGRU(3, 4, num_layers=2, bidirectional=True)
        >>> _ = fast.load_state_dict(plain.state_dict())
        >>> records = pack_sequence([torch.randn(2, 3), torch.randn(5, 3)], enforce_sorted=False)
        >>> torch.allclose(fast(records)[0].data, plain(records)[0].data, atol=1e-6)
        True
    """

    #: As in :func:`packed_gru`; may be set on an instance.
    keep_gates: float | None = 1.0

    def forward(self, input, hx=None):
        """As ``nn.GRU.forward``: outputs and ``h_n``."""
        if self._takes(input, hx):
            return packed_gru(
                input,
                self.all_weights,
                hx,
                bidirectional=self.bidirectional,
                dropout=self.dropout,
                training=self.training,
                keep_gates=self.keep_gates,
            )
        data = input.data if isinstance(input, PackedSequence) else input
        refuse_restricted_openmp(data, "PackedGRU")
        return super().forward(input, hx)

    def _takes(self, input, hx) -> bool:
        if not isinstance(input, PackedSequence) or nn.GRU.forward is not _FORWARD:
            return False
        if backend.choose("packed_gru", input.data.device.type, input.data.dtype) == "cpu":
            return True
        # which PyTorch's own gru does not serve
        return transformed(input.data, *self.parameters(), hx)

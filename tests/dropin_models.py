"""Models of one's own, in plain PyTorch, that ``accelerate`` is tried on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class PooledRecurrent(nn.Module):
    """As PyHealth's RNN layer has it: padded vectors and their mask in, packed within."""

    def __init__(self, kind, inputs=6, hidden=5, **options):
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.rnn = kind(inputs, hidden, batch_first=True, **options)
        self.fc = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 1)

    def forward(self, vectors, mask):
        lengths = mask.sum(-1).int().cpu()
        packed = pack_padded_sequence(
            self.dropout(vectors), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        last = outputs[torch.arange(len(outputs)), lengths.long() - 1]
        return self.fc(last)


class Nested(nn.Module):
    """One LSTM at two places, layers in lists and dicts, and padded input for one of them."""

    def __init__(self):
        super().__init__()
        shared = nn.LSTM(6, 6, batch_first=True)
        self.first, self.again = shared, shared
        self.towers = nn.ModuleList([nn.ModuleDict({"gru": nn.GRU(6, 3, bidirectional=True)})])
        self.padded = nn.LSTM(6, 4, batch_first=True)

    def forward(self, vectors, mask):
        lengths = mask.sum(-1).cpu()
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        packed = self.again(self.first(packed)[0])[0]
        for tower in self.towers:
            packed = tower["gru"](packed)[0]
        outputs, _ = pad_packed_sequence(packed, batch_first=True, total_length=mask.shape[1])
        return torch.cat([outputs, self.padded(vectors)[0]], -1)


class Pool(nn.Module):
    """One embedding whose rows are pooled; ``how`` says in which of the usual ways."""

    def __init__(self, how, vocabulary=23, padding_idx=0):
        super().__init__()
        self.how = how
        self.codes = nn.Embedding(vocabulary, 6, padding_idx=padding_idx)

    def forward(self, codes, mask):
        rows, weights = self.codes(codes), mask.unsqueeze(-1)
        if self.how == "max":
            return rows.masked_fill(weights == 0, -torch.inf).max(-2).values
        total = (rows * weights).sum(-2)
        if self.how == "sum":
            return total
        least = 1e-9 if self.how == "mean, any weights" else 1
        if self.how == "mean, 3 dimensions":
            total = (rows * weights).sum(dim=2)
        return total / mask.sum(-1, keepdim=True).clamp(min=least)


class OwnMask(nn.Module):
    def __init__(self, padding_idx=0):
        super().__init__()
        self.table = nn.Embedding(23, 6, padding_idx=padding_idx)

    def forward(self, codes):
        mask = (codes != self.table.padding_idx).unsqueeze(-1)
        return (self.table(codes) * mask).sum(-2) / mask.sum(-2).clamp(min=1)


class EverySlot(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(23, 6)

    def forward(self, codes):
        return self.table(codes).mean(-2)


class SquareRoot(Pool):
    """No mean, sum or maximum."""

    def forward(self, codes, mask):
        rows, weights = self.codes(codes), mask.unsqueeze(-1)
        return (rows * weights).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1).sqrt()

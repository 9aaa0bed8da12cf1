"""The models that this package takes the place of, in plain PyTorch: what its tests compare with,
and the baselines of its benchmarks.

They have the public ``ehrsequencing`` models' structure (names and order of parameters, order of
seeded initialisation, and the computation over padded tensors), written anew here. They are right
where nothing hits those models' faults: no empty visit under max or attention, no NaN in
padded slots, no padding before a bidirectional LSTM.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def head(width, hidden_dim, dropout):
    return nn.Sequential(
        nn.Linear(width, hidden_dim),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden_dim, 1),
        nn.Sigmoid(),
    )


def lstm(width, hidden_dim, num_layers, dropout, bidirectional=False, cell="lstm"):
    return {"lstm": nn.LSTM, "gru": nn.GRU}[cell](
        width,
        hidden_dim,
        num_layers,
        batch_first=True,
        dropout=dropout if num_layers > 1 else 0,
        bidirectional=bidirectional,
    )


def mean_of_codes(embedding, codes, mask):
    counted = embedding(codes) * mask[..., None].float()
    return counted.sum(2) / mask.sum(2, keepdim=True).clamp(min=1)


def packed_around(layer, vectors, sequence_mask):
    """The layer's states of real visits; zeros behind them."""
    lengths = sequence_mask.sum(1).cpu()
    packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
    visits = sequence_mask.shape[1]
    return pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=visits)[0]


class SurvivalLSTM(nn.Module):
    """Over padded visits, or, ``packed``, with packing around the LSTM."""

    def __init__(
        self,
        vocab_size,
        embedding_dim=128,
        hidden_dim=256,
        num_layers=1,
        dropout=0.1,
        bidirectional=False,
        packed=False,
        cell="lstm",
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = lstm(embedding_dim, hidden_dim, num_layers, dropout, bidirectional, cell)
        self.hazard_head = head(hidden_dim * (1 + bidirectional), hidden_dim, dropout)
        self.packed = packed

    def forward(self, codes, visit_mask, sequence_mask):
        vectors = mean_of_codes(self.embedding, codes, visit_mask)
        if self.packed:
            states = packed_around(self.lstm, vectors, sequence_mask)
        else:
            states, _ = self.lstm(vectors)
        return self.hazard_head(states)[..., 0] * sequence_mask.float()

    def predict_survival(self, codes, visit_mask, sequence_mask):
        hazards = self(codes, visit_mask, sequence_mask)
        survival = torch.exp(torch.cumsum(torch.log(1 - hazards + 1e-7), dim=1))
        return survival, torch.cumsum(hazards, dim=1)


class SurvivalLSTMWithTime(SurvivalLSTM):
    def __init__(
        self,
        vocab_size,
        embedding_dim=128,
        hidden_dim=256,
        num_layers=1,
        dropout=0.1,
        time_encoding_dim=16,
        cell="lstm",
    ):
        super().__init__(vocab_size, embedding_dim, hidden_dim, num_layers, dropout, cell=cell)
        self.time_encoder = nn.Sequential(
            nn.Linear(3, time_encoding_dim),
            nn.ReLU(),
            nn.Linear(time_encoding_dim, time_encoding_dim),
        )
        width = embedding_dim + time_encoding_dim
        self.lstm = lstm(width, hidden_dim, num_layers, dropout, cell=cell)

    def forward(self, codes, visit_mask, sequence_mask, time_features=None):
        if time_features is None:
            time_features = torch.zeros(*codes.shape[:2], 3)
        vectors = mean_of_codes(self.embedding, codes, visit_mask)
        states, _ = self.lstm(torch.cat([vectors, self.time_encoder(time_features)], dim=-1))
        return self.hazard_head(states)[..., 0] * sequence_mask.float()


class CompetingRisksLSTM(nn.Module):
    def __init__(
        self,
        vocab_size,
        num_event_types,
        embedding_dim=128,
        hidden_dim=256,
        num_layers=1,
        dropout=0.1,
        cell="lstm",
        link="sigmoid",
    ):
        super().__init__()
        self.link = link
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = lstm(embedding_dim, hidden_dim, num_layers, dropout, cell=cell)
        self.hazard_heads = nn.ModuleList(
            [head(hidden_dim, hidden_dim, dropout) for _ in range(num_event_types)]
        )

    def forward(self, codes, visit_mask, sequence_mask):
        states, _ = self.lstm(mean_of_codes(self.embedding, codes, visit_mask))
        if self.link == "softmax":
            logits = torch.stack([cause[:4](states)[..., 0] for cause in self.hazard_heads], -1)
            odds = logits.exp()
            return odds / (1 + odds.sum(-1, keepdim=True)) * sequence_mask[..., None].float()
        hazards = torch.stack([cause(states)[..., 0] for cause in self.hazard_heads], dim=-1)
        return hazards * sequence_mask[..., None].float()


class VisitEncoder(nn.Module):
    def __init__(self, embedding_dim, aggregation="mean", dropout=0.1):
        super().__init__()
        self.aggregation = aggregation
        self.dropout = nn.Dropout(dropout)
        if aggregation == "attention":
            self.attention = nn.Sequential(
                nn.Linear(embedding_dim, embedding_dim // 2),
                nn.Tanh(),
                nn.Linear(embedding_dim // 2, 1),
            )

    def forward(self, embeddings, mask=None):
        if mask is None:
            mask = torch.ones(embeddings.shape[:-1])
        mask = mask[..., None]
        if self.aggregation == "mean":
            vectors = (embeddings * mask).sum(1) / mask.sum(1).clamp(min=1)
        elif self.aggregation == "sum":
            vectors = (embeddings * mask).sum(1)
        elif self.aggregation == "max":
            vectors = embeddings.masked_fill(mask == 0, -torch.inf).max(1)[0]
        else:
            scores = self.attention(embeddings).masked_fill(mask == 0, -torch.inf)
            vectors = (embeddings * scores.softmax(1)).sum(1)
        return self.dropout(vectors)


class LSTMBaseline(nn.Module):
    def __init__(
        self,
        vocab_size,
        embedding_dim=128,
        hidden_dim=256,
        num_layers=2,
        dropout=0.3,
        bidirectional=False,
        visit_aggregation="mean",
        output_dim=1,
        task="binary_classification",
        padding_idx=0,
        cell="lstm",
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=padding_idx)
        self.visit_encoder = VisitEncoder(embedding_dim, visit_aggregation, dropout)
        self.lstm = lstm(embedding_dim, hidden_dim, num_layers, dropout, bidirectional, cell)
        self.bidirectional = bidirectional
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_dim * (1 + bidirectional), output_dim)
        self.activation = {
            "binary_classification": nn.Sigmoid(),
            "multi_class": nn.Softmax(dim=-1),
            "regression": nn.Identity(),
        }[task]

    def forward(self, codes, visit_mask=None, sequence_mask=None, return_hidden=False):
        patients, visits, width = codes.shape
        embeddings = self.embedding(codes).view(patients * visits, width, -1)
        mask = None if visit_mask is None else visit_mask.view(patients * visits, width)
        vectors = self.visit_encoder(embeddings, mask).view(patients, visits, -1)
        if sequence_mask is None:
            states, final = self.lstm(vectors)
        else:
            packed = pack_padded_sequence(
                vectors, sequence_mask.sum(1), batch_first=True, enforce_sorted=False
            )
            packed, final = self.lstm(packed)
            states, _ = pad_packed_sequence(packed, batch_first=True)
        h_n = final[0] if isinstance(final, tuple) else final
        last = torch.cat([h_n[-2], h_n[-1]], 1) if self.bidirectional else h_n[-1]
        logits = self.fc(self.dropout(last))
        output = {"logits": logits, "predictions": self.activation(logits)}
        if return_hidden:
            output["hidden_states"] = states
        return output

"""Every operator of the package, in one place: the table of contents of ``torch.ops.ehrseq_fast``.

The schemas are defined here, in Python, and not in a compiled library, so that they exist wherever
the package does. They are defined once per kind of kernel: ``torch.ops.ehrseq_fast`` holds the
compiled ones (``csrc/``; CPU and CUDA), ``torch.ops.ehrseq_fast_triton`` those in Triton, so that
either can be called on the same tensor. ``backend.operators`` gives the ones that were chosen.
Each room's ``op.py`` holds the shapes (:func:`fake`), the gradients and the choice of backend.

Conventions: ``mode`` is 0 mean, 1 sum, 2 max; ``reduction`` is 0 none, 1 mean, 2 sum; ``link`` is
0 probabilities, 1 sigmoid of logits, 2 softmax of logits. An output that a call has no use for is
an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCHEMAS = (
    # visit_pool: codes (or embeddings) -> one vector per visit. arg_max is filled in mode max only.
    # A gradient takes no value of the table, and so no table, but how many rows it has.
    "visit_pool(Tensor codes, Tensor weight, Tensor? visit_mask, int mode)"
    " -> (Tensor pooled, Tensor arg_max)",
    "visit_pool_backward(Tensor grad, Tensor codes, SymInt vocabulary, Tensor? visit_mask,"
    " Tensor? arg_max, int mode, int padding_idx) -> Tensor",
    "visit_pool_backward_sparse(Tensor grad, Tensor codes, SymInt vocabulary, Tensor? visit_mask,"
    " Tensor? arg_max, int mode, int padding_idx) -> (Tensor code_ids, Tensor rows)",
    "masked_pool(Tensor embeddings, Tensor? mask, int mode) -> (Tensor pooled, Tensor arg_max)",
    "masked_pool_backward(Tensor grad, Tensor? mask, Tensor? arg_max, SymInt n_slots, int mode)"
    " -> Tensor",
    # The same for packed batches, with the transposed index (index_*) that the batch builder makes.
    "packed_visit_pool(Tensor codes, Tensor code_offsets, Tensor weight, int mode)"
    " -> (Tensor pooled, Tensor arg_max)",
    "packed_visit_pool_backward(Tensor grad, Tensor code_offsets, Tensor index_codes,"
    " Tensor index_offsets, Tensor index_visits, SymInt vocabulary, Tensor? arg_max, int mode,"
    " int padding_idx) -> Tensor",
    "packed_visit_pool_backward_sparse(Tensor grad, Tensor code_offsets, Tensor index_codes,"
    " Tensor index_offsets, Tensor index_visits, SymInt vocabulary, Tensor? arg_max, int mode,"
    " int padding_idx) -> (Tensor code_ids, Tensor rows)",
    # Attention is exp(score - highest) * inverse, with a visit's highest score and 1 / (sum of
    # exp(score - highest)), in float64.
    "packed_attention_pool(Tensor codes, Tensor code_offsets, Tensor weight, Tensor scores)"
    " -> (Tensor pooled, Tensor highest, Tensor inverse)",
    "packed_attention_pool_backward(Tensor grad, Tensor pooled, Tensor highest, Tensor inverse,"
    " Tensor index_codes, Tensor index_offsets, Tensor index_visits, Tensor weight, Tensor scores,"
    " int padding_idx) -> (Tensor grad_weight, Tensor grad_scores)",
    # survival_nll: the forward kernel also writes the gradient, where one is needed.
    "survival_nll(Tensor hazards, Tensor event_times, Tensor event_indicators,"
    " Tensor? sequence_mask, Tensor? entry_times, Tensor? sample_weight, int link,"
    " bool censored_included, float eps, int reduction, bool needs_grad)"
    " -> (Tensor nll, Tensor grad)",
    # The same for hazards as rows of a packed batch; [n_visits] or, with competing risks,
    # [n_visits, K]. The visits of patient p are the rows row_starts[t] + unsorted_indices[p].
    "packed_survival_nll(Tensor hazards, Tensor row_starts, Tensor unsorted_indices,"
    " Tensor last_rows, Tensor event_times, Tensor event_types, Tensor? entry_times,"
    " Tensor? sample_weight, int link, bool censored_included, float eps, int reduction,"
    " bool needs_grad) -> (Tensor nll, Tensor grad)",
    "competing_risks_nll(Tensor hazards, Tensor event_times, Tensor event_types,"
    " Tensor? sequence_mask, Tensor? entry_times, Tensor? sample_weight, int link,"
    " bool censored_included, float eps, int reduction, bool needs_grad)"
    " -> (Tensor nll, Tensor grad)",
    # The saved gradient times that of the loss, in the dtype of the hazards: what a GPU's backward
    # pass launches. grad_nll is one number or, with reduction none, one per patient, whose rows in
    # a packed batch are found as above.
    "survival_nll_scale(Tensor grad, Tensor grad_nll, Tensor? row_starts,"
    " Tensor? unsorted_indices, Tensor? last_rows, ScalarType dtype) -> Tensor",
    # packed_lstm: one direction of one layer, rows and states in PackedSequence's order. gates and
    # cells are what the backward pass needs, in the kernel's own layout; empty without training.
    # Gates are those of the first `kept` visits: the backward pass computes the others again.
    "packed_lstm_layer(Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh,"
    " Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, Tensor? c0, bool reverse, bool training,"
    " SymInt kept) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    "packed_lstm_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n,"
    " Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih,"
    " Tensor? bias_hh, Tensor? h0, Tensor? c0, Tensor output, Tensor gates, Tensor cells,"
    " bool reverse, bool need_input, bool need_weights, bool need_states) -> (Tensor input,"
    " Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor h0, Tensor c0)",
    # linear: one layer, float32 or float64. activation is 0 none, 1 ReLU, 2 tanh, 3 sigmoid.
    "linear_layer(Tensor input, Tensor weight, Tensor? bias, int activation) -> Tensor",
    "linear_layer_backward(Tensor grad, Tensor input, Tensor weight, Tensor out, int activation,"
    " bool need_input, bool need_weights) -> (Tensor input, Tensor weight, Tensor bias)",
    # hazard_head: Linear, ReLU, Dropout, Linear to one unit, Sigmoid. `kept` says which hidden
    # units dropout keeps, and `scale` what it multiplies them by; `hidden` are those before it,
    # which the backward pass needs, no rows of them without training.
    "hazard_head(Tensor input, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias,"
    " Tensor? kept, float scale, bool training) -> (Tensor hazards, Tensor hidden)",
    "hazard_head_backward(Tensor grad, Tensor hazards, Tensor hidden, Tensor input, Tensor weight,"
    " Tensor bias, Tensor last_weight, Tensor last_bias, Tensor? kept, float scale,"
    " bool need_input, bool need_weights) -> (Tensor input, Tensor weight, Tensor bias,"
    " Tensor last_weight, Tensor last_bias)",
)

_fakes: dict[str, Callable[..., Any]] = {}
_libraries: dict[str, torch.library.Library] = {}


def define(namespace: str) -> torch.library.Library:
    """Define every operator, with the shapes known so far, under ``torch.ops.<namespace>``."""
    library = _libraries[namespace] = torch.library.Library(namespace, "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for name, shapes in _fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
    return library


def fake(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function that gives the shapes and dtypes of what these operators return."""

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _fakes[name] = shapes
            for namespace, library in _libraries.items():
                torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
        return shapes

    return register


define("ehrseq_fast")
triton_library = define("ehrseq_fast_triton")

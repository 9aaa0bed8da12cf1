"""What models return beside plain tensors: rows of visits, and states to go on from."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree

from .packed_rows import PackedRows
from .state import VisitState

__all__ = ["PackedRows", "VisitState"]

# As pytree nodes, the tensors in them are seen by whatever looks for a model's outputs:
# DistributedDataParallel with static_graph=True, FSDP, torch.func. A batch is part of the structure
# and not a node: what maps its tensors one by one (to a dtype, to another device) would break what
# holds between them, and a graph that was exported for one batch's sizes would serve no other.


def _as_node(kind: type, children: tuple[str, ...], rest: tuple[str, ...]) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, name) for name in children], [getattr(value, name) for name in rest]

    def flatten_with_keys(value: Any) -> tuple[list[tuple[_pytree.KeyEntry, Any]], Any]:
        leaves, context = flatten(value)
        keys = map(_pytree.GetAttrKey, children)
        return list(zip(keys, leaves, strict=True)), context

    _pytree.register_pytree_node(
        kind,
        flatten,
        lambda leaves, context: kind(*leaves, *context),
        serialized_type_name=f"ehrseq_fast.{kind.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_as_node(PackedRows, ("values",), ("batch",))
_as_node(VisitState, ("h", "c"), ("n_visits",))
# by the names that files of version 0.1 hold as well
torch.serialization.add_safe_globals(
    [
        PackedRows,
        VisitState,
        (PackedRows, "ehrseq_fast.rows.PackedRows"),
        (VisitState, "ehrseq_fast.rows.VisitState"),
    ]
)

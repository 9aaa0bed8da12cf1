"""What ``torch.compile`` has to be told to trace recurrent layers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch._dynamo.decorators
from torch import nn

# Dynamo leaves every nn.RNNBase out of graphs unless torch._dynamo.config.allow_rnn is set. This
# sets it for the tracing of one block, which it takes from a global of this type alone.
_Patch: Any = getattr(torch._dynamo.decorators, "DynamoConfigPatchProxy", None)
_RNN_ALLOWED = (
    contextlib.nullcontext()
    if _Patch is None
    else _Patch(torch._dynamo.config.patch(allow_rnn=True))
)


def let_trace(model: nn.Module, name: str) -> None:
    """Have ``torch.compile`` trace the recurrent layer ``model.<name>`` in the rest of this frame.

    Nothing but this look at the layer is traced under the changed setting, so that no graph break
    can leave it changed."""
    if torch.compiler.is_dynamo_compiling():
        with _RNN_ALLOWED:
            isinstance(getattr(model, name), nn.Module)

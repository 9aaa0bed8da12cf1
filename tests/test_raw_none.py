"""None for a tensor that an operator requires: the error names the operator and the argument."""

from __future__ import annotations

import pytest
import torch

from ehrseq_fast import backend as backends

# Whatever it is, it is not looked at: the argument that is missing is refused first.
OTHERS = {"Tensor": torch.ones(2, 2), "int": 0, "bool": False, "float": 0.0}
COMPILED = torch.ops.ehrseq_fast
OPERATORS = sorted(
    name.removeprefix("ehrseq_fast::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("ehrseq_fast::")
)


def other(argument, device):
    kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
    value = torch.float32 if argument.name == "dtype" else OTHERS[kind.replace("SymInt", "int")]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(operator, name, device="cpu"):
    arguments = operator._schema.arguments
    required = [at for at, argument in enumerate(arguments) if str(argument.type) == "Tensor"]
    assert required
    for at in required:
        given = [other(argument, device) for argument in arguments]
        given[at] = None
        message = f"^{name}: {arguments[at].name}: expected a tensor, got None$"
        with pytest.raises(ValueError, match=message):
            operator(*given)


def test_every_operator_is_seen():
    assert len(OPERATORS) > 15
    assert "packed_lstm_layer_backward" in OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled(compiled, name):
    check(getattr(COMPILED, name).default, name)


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes(name):
    """As export and torch.compile reach them."""
    check(getattr(COMPILED, name).default, name, "meta")


@pytest.mark.parametrize(
    "name", ["visit_pool", "packed_visit_pool_backward", "survival_nll", "survival_nll_scale"]
)
def test_kernels_of_a_gpu(kernels, name):
    if kernels == "cuda":
        check(getattr(backends.operators(kernels), name).default, name)
    elif kernels == "triton":
        operator = getattr(backends.operators(kernels), name).default
        given = [other(argument, "cpu") for argument in operator._schema.arguments]
        given[0] = None
        first = operator._schema.arguments[0].name
        with pytest.raises(ValueError, match=f"^{name}: {first}: expected a tensor, got None$"):
            operator(*given)


def test_no_tensor_at_all_is_refused_by_the_dispatcher(compiled):
    """Before any code of this package runs: it knows no device, and so no kernel."""
    with pytest.raises(
        NotImplementedError, match=r"no tensor arguments .* ehrseq_fast::masked_pool"
    ):
        COMPILED.masked_pool.default(None, None, 0)

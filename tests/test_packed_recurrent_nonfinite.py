"""What is real is never hidden: a NaN or an infinity in any operand of the packed LSTM and GRU
shows in outputs and gradients exactly where PyTorch's do, and memory that was never written shows
nowhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from tests import poisoned
from tests.recurrent_layers import every_cell, flat, sizes_of

pytestmark = [pytest.mark.operation("packed_lstm"), pytest.mark.operation("packed_gru")]

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYERS = 2


def results(cell, lstm, sizes, data, *others):
    """Outputs, final states and the gradients of all that has one."""
    data, *states = (x.detach().requires_grad_() for x in (data, *others[: cell.states]))
    given = cell.given(states) if states[0].numel() else None
    output, final = lstm(PackedSequence(data, sizes), given)
    results = [output.data, *flat(final)]
    leaves = [data, *lstm.parameters(), *flat(given)]
    return [*results, *torch.autograd.grad(results, leaves, others[cell.states :])]


def spoilt(operands, name, value):
    operands = {key: tensor.clone() for key, tensor in operands.items()}
    flat = operands[name].view(-1)
    flat[torch.randint(len(flat), (1,))] = value
    return operands


def not_finite_where_pytorch_is_not(
    cell, dtype, hidden, inputs, bidirectional, keep_gates, given_states
):
    """Tries a NaN and both infinities in every operand: how many cases, and those that failed."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = cell.plain(inputs, hidden, LAYERS, bidirectional=bidirectional).to(dtype).to(wide)
    fast = cell.fast(inputs, hidden, LAYERS, bidirectional=bidirectional).to(dtype)
    fast.keep_gates = keep_gates
    weights = list(plain.state_dict())
    lengths = [4, 3, 1, 1]
    directions = 2 if bidirectional else 1
    states = (LAYERS * directions, len(lengths), hidden)
    shapes = {
        "data": (sum(lengths), inputs),
        **dict.fromkeys(("h0", "c0")[: cell.states], states if given_states else (0,)),
        "grad of output": (sum(lengths), directions * hidden),
        **dict.fromkeys(("grad of h_n", "grad of c_n")[: cell.states], states),
    }
    sound = {
        **{name: tensor.to(dtype) for name, tensor in plain.state_dict().items()},
        **{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()},
    }
    tried, failed = 0, []
    for name, value in product(sound, (NAN, INF, -INF)):
        if not sound[name].numel():
            continue
        operands = spoilt(sound, name, value)
        for lstm in (plain, fast):
            lstm.load_state_dict({key: operands[key] for key in weights})
        others = [operands[key] for key in shapes]
        expected = results(cell, plain, sizes_of(lengths), *(x.to(wide) for x in others))
        actual = results(cell, fast, sizes_of(lengths), *others)
        tried += 1
        if not all(
            torch.equal(mine.isnan(), theirs.isnan())
            and torch.equal(mine.isinf(), theirs.isinf())
            and torch.equal(mine[mine.isinf()].sign(), theirs[theirs.isinf()].sign().to(dtype))
            for mine, theirs in zip(actual, expected, strict=True)
        ):
            failed.append((name, value))
    return tried, failed


@every_cell
@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize(
    ("hidden", "inputs", "keep_gates"), [(5, 3, 0.0), (16, 4, 1.0), (18, 6, 0.4)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_show_where_those_of_pytorch_do(
    cell, compiled, dtype, hidden, inputs, keep_gates, given_states
):
    tried, failed = not_finite_where_pytorch_is_not(
        cell, dtype, hidden, inputs, not given_states, keep_gates, given_states
    )
    assert tried >= 30
    assert failed == []


def in_a_process(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("done\n"), run.stderr


ON_OTHER_CPUS = """
from tests.recurrent_layers import CELLS
from tests.test_packed_recurrent_nonfinite import *
for cell in CELLS.values():
    for dtype in (torch.float32, torch.bfloat16):
        assert not_finite_where_pytorch_is_not(cell, dtype, 18, 6, False, 0.0, False)[1] == []
print("done")
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_also_with_other_instruction_sets(compiled, capability):
    in_a_process(ON_OTHER_CPUS, EHRSEQ_FAST_CPU_CAPABILITY=capability)


IN_POISONED_MEMORY = """
from itertools import product
import torch
from tests.recurrent_layers import *
dtypes = ((torch.float32, 2e-5), (torch.float64, 1e-11), (torch.bfloat16, 0.1))
for cell, (dtype, bound) in product(CELLS.values(), dtypes):
    for hidden, patients, times in ((50, 300, 60), (200, 300, 12), (5, 9, 4)):
        plain, fast = cell.layers(6, hidden, dtype=dtype, bidirectional=hidden == 5)
        fast.keep_gates = 0.3
        visits = records([1 + i * times // patients for i in range(patients)], 6, dtype)
        hx = cell.states_for(plain, patients, dtype) if hidden == 50 else None
        mine = everything(fast, visits, hx)
        assert all(tensor.isfinite().all() for tensor in mine)
        results = 1 + cell.states
        close(mine[:results], everything(plain, visits, hx)[:results], bound)
        for tensor in mine[results:][-4:]:
            assert tensor.abs().max() < 1e4
print("done")
"""


def test_memory_never_written_shows_nowhere(compiled):
    """Of hidden sizes that leave part of a vector unused, over several chunks of the backward
    pass."""
    reason = poisoned.why_not()
    if reason is not None:
        pytest.skip(reason)
    in_a_process(IN_POISONED_MEMORY, **poisoned.environment())

"""Products of bfloat16 in tiles (AMX): on a CPU that has them, and everywhere else in a model of
the tiles in memory, which ends the process where one is used outside of what it was set to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ehrseq_fast import backend

pytestmark = [pytest.mark.operation("packed_lstm"), pytest.mark.operation("packed_gru")]


@pytest.fixture(params=["amx", "amx_emulated"])
def tiles(request, compiled):
    """Runs Python in a process whose recurrent layers use tiles."""
    if request.param == "amx" and backend.why_no_amx() is not None:
        pytest.skip(f"no AMX: {backend.why_no_amx()}")

    def run(code: str) -> None:
        environment = os.environ | {"EHRSEQ_FAST_CPU_CAPABILITY": request.param}
        header = "from tests.test_packed_recurrent_tiles import *\n"
        done = subprocess.run(
            [sys.executable, "-c", header + code],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
        )
        if "no tiles here" in done.stdout:
            pytest.skip("no AVX-512, which the model of the tiles is written in")
        assert done.stdout.endswith("done\n"), done.stdout + done.stderr

    return run


IMPORTS = """
import torch
from ehrseq_fast import backend
from tests.recurrent_layers import *
from tests.tolerances import ROUNDOFF
if backend.bfloat16_products() != "tiles":
    raise SystemExit(print("no tiles here"))
torch.manual_seed(0)
torch.set_num_threads(1)

def both(cell, inputs, hidden, lengths, keep_gates=1.0, **options):
    '''Ours in bfloat16, PyTorch's in float32 with the same weights, and their inputs.'''
    low = cell.fast(inputs, hidden, **options).bfloat16()
    low.keep_gates = keep_gates
    plain = cell.plain(inputs, hidden, **options)
    plain.load_state_dict(low.state_dict())
    visits = [visit.detach().bfloat16().requires_grad_() for visit in records(lengths, inputs)]
    return low, plain, visits
"""

EVERY_SHAPE = """
# Rows of tiles from 1 to 16 and beyond, packs that fill them, leave a rest or are only a rest.
shapes = [(2, 2), (32, 14), (30, 32), (34, 16), (66, 46), (8, 98)]
lengths = [1 + (7 * patient) % 19 for patient in range(19)]
for cell in CELLS.values():
    for inputs, hidden in shapes:
        for patients in (1, 2, 15, 16, 17, 19) if inputs == 34 else (19,):
            low, plain, visits = both(cell, inputs, hidden, lengths[:patients], bidirectional=True)
            raised = [visit.detach().float().requires_grad_() for visit in visits]
            hx = cell.states_for(plain, patients, torch.bfloat16) if patients % 2 else None
            wide = [x.detach().float().requires_grad_() for x in flat(hx)]
            wide = None if hx is None else cell.given(wide)
            actual = everything(low, visits, hx)
            expected = everything(plain, raised, wide)
            # the states go through bfloat16 from visit to visit
            close([a.float() for a in actual], expected, 4 * ROUNDOFF[torch.bfloat16])
print("done")
"""


def test_equals_pytorch_for_every_shape_of_tiles(tiles):
    tiles(IMPORTS + EVERY_SHAPE)


SAME_BITS = """
lengths = [40, 25, 12] + [1 + patient % 9 for patient in range(60)]
for cell in CELLS.values():
    found = []
    for threads, keep_gates in ((1, 1.0), (1, 0.0), (2, 0.3), (3, 1.0), (1, 1.0)):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        low, _, visits = both(cell, 40, 72, lengths, keep_gates)
        found.append(everything(low, visits, None))
    for results in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(results, found[0]))
print("done")
"""


def test_same_bits_for_any_number_of_threads_and_of_kept_gates(tiles):
    tiles(IMPORTS + SAME_BITS)


# PyTorch's own products of matrices use the tiles of the same threads.
BESIDE_OTHERS = """
a = torch.randn(96, 96).bfloat16()
expected = a @ a
for cell in CELLS.values():
    low, _, visits = both(cell, 64, 64, [9, 7, 2])
    first = everything(low, visits, None)
    for _ in range(5):
        assert torch.equal(a @ a, expected)
        assert all(torch.equal(*pair) for pair in zip(everything(low, visits, None), first))
print("done")
"""


def test_other_users_of_tiles_are_left_alone(tiles):
    tiles(IMPORTS + BESIDE_OTHERS)


NOT_HIDDEN = """
from tests.test_packed_recurrent_nonfinite import not_finite_where_pytorch_is_not
for cell in CELLS.values():
    for hidden, inputs in ((18, 6), (32, 34)):
        tried, failed = not_finite_where_pytorch_is_not(
            cell, torch.bfloat16, hidden, inputs, False, 0.0, True
        )
        assert tried >= 30 and failed == []
print("done")
"""


def test_nan_and_infinity_show(tiles):
    tiles(IMPORTS + NOT_HIDDEN)


def product(sums: int, left: int, right: int) -> bytes:
    """TDPBF16PS as the manual encodes it: the left factor in the last, the right one in the third
    operand's field (VEX.128.F3.0F38.W0 5C)."""
    return bytes([0xC4, 0xE2, (~right & 0xF) << 3 | 2, 0x5C, 0xC0 | sums << 3 | left])


def test_the_instructions_are_compiled(compiled):
    """Whatever this CPU has; and the factors are in the order that the model takes them in."""
    if "not compiled" in (backend.why_no_amx() or ""):
        pytest.skip(backend.why_no_amx())
    code = Path(backend.compiled_cpu.path).read_bytes()
    full, rest = (4, 6), (5, 7)
    found = {(sums, *tiles) for sums in range(4) for tiles in (full, rest, (6, 4), (7, 5))
             if product(sums, *tiles) in code}  # fmt: skip
    assert found == {(sums, *tiles) for sums in range(4) for tiles in (full, rest)}

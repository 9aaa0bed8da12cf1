"""ONNX export of models on the padded path, run by ONNX Runtime on batches of other sizes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from .model_cases import build, ragged_batch

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package}: pip install 'ehrseq_fast[onnx]'")


@torch.no_grad()
def check(variant: str, folder: str) -> None:
    """What a process of its own runs: what PyTorch's exporter holds constant depends on what was
    compiled and exported before."""
    import onnxruntime

    warnings.simplefilter("ignore")
    model = build(variant, path="padded").eval()
    sizes = ({0: "B", 1: "V", 2: "C"}, {0: "B", 1: "V", 2: "C"}, {0: "B", 1: "V"})
    program = torch.onnx.export(model, ragged_batch(), dynamo=True, dynamic_shapes=sizes)
    assert program is not None
    program.save(Path(folder) / "model.onnx")
    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for lengths, visits, width in (((4, 1, 6, 3), 7, 5), ((2, 5, 1), 6, 4), ((3,), 3, 2)):
        batch = ragged_batch(lengths, visits, width, seed=visits)
        given = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
        found = torch.from_numpy(session.run(None, given)[0])
        torch.testing.assert_close(found, model(*batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["survival", "survival-gru", "competing-risks"])
def test_the_padded_path(variant, tmp_path):
    code = f"from tests.test_onnx import check; check({variant!r}, {str(tmp_path)!r})"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.onnx").exists()

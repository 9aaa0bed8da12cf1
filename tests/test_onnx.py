"""ONNX export of models on the padded path, run by ONNX Runtime on batches of other sizes."""

from __future__ import annotations

import pytest
import torch

from .model_cases import build, ragged_batch

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} is not installed (docs/export.md)")

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
@pytest.mark.parametrize("variant", ["survival", "survival-gru", "competing-risks"])
def test_the_padded_path(variant, tmp_path):
    import onnxruntime

    model = build(variant, path="padded").eval()
    sizes = ({0: "B", 1: "V", 2: "C"}, {0: "B", 1: "V", 2: "C"}, {0: "B", 1: "V"})
    program = torch.onnx.export(model, ragged_batch(), dynamo=True, dynamic_shapes=sizes)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    for lengths, visits, width in (((4, 1, 6, 3), 7, 5), ((2, 5, 1), 6, 4), ((3,), 3, 2)):
        batch = ragged_batch(lengths, visits, width, seed=visits)
        given = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
        found = torch.from_numpy(session.run(None, given)[0])
        torch.testing.assert_close(found, model(*batch), rtol=1e-5, atol=1e-6)

"""``python -m ehrseq_fast info``: what it says of the backends is what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ehrseq_fast import backend, cli, operations


def info(**environment: str) -> dict[str, str]:
    """The report's lines on backends, from a fresh process, and all of it under ''."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("EHRSEQ_FAST_", "TRITON_"))}
    text = subprocess.run(
        [sys.executable, "-m", "ehrseq_fast", "info"],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = text[text.index("Backends") :].splitlines()[1 : 1 + len(backend.BACKENDS)]
    return {"": text} | dict(line.split(None, 1) for line in lines)


def test_every_backend_is_accounted_for():
    report = cli.describe()
    for name in backend.BACKENDS:
        reason = backend.why_not_loaded(name)
        assert f"  {name:<10} " in report
        assert reason is None or f"{name:<10} not used: {reason}" in report
    for operation in operations.registered():
        assert f"  {operation.name} " in report


def test_why_triton_is_not_used():
    pytest.importorskip("triton")
    said = info()["triton"]
    if torch.version.cuda is None:
        assert said.startswith("not used: this torch is built without CUDA (TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        assert said == "loaded, but there is no CUDA device here for it to serve"
    else:
        assert said == "available"


def test_triton_is_not_used_where_it_could_not_launch(monkeypatch, tmp_path):
    """It compiles its launcher in C: without a compiler the first call on a GPU would fail."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("TRITON_INTERPRET", "CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C compiler" in backend._triton_kernels().reason
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda *of: str(tmp_path))
    assert "no Python.h in" in backend._triton_kernels().reason
    (tmp_path / "Python.h").touch()
    assert backend._triton_kernels().reason is None
    compiler.unlink()
    monkeypatch.setenv("CC", "cc")
    assert backend._triton_kernels().reason is None


def test_tritons_interpreter_is_not_called_available():
    pytest.importorskip("triton")
    said = info(TRITON_INTERPRET="1")
    assert said["triton"].startswith("emulated on cpu tensors, slowly and when asked for")
    assert said["reference"] == "available"
    asked = info(TRITON_INTERPRET="1", EHRSEQ_FAST_BACKEND="triton")[""]
    assert "asks for 'triton'" in asked
    assert "nothing: backend 'triton' was asked for, but cannot run survival_nll: its" in asked


def test_what_has_run_on_a_gpu_is_said_last():
    report = cli.describe().splitlines()
    assert report[-2] == cli.describe_gpu_runs(json.loads(cli.GPU_RUNS.read_text()))
    run = {"gpu": "A GPU", "measured_at": "2026-01-02T03:04:05", "commit": "0123", "operations": {}}
    run["operations"] = {"cuda": ["visit pooling", "survival NLL"], "triton": ["visit pooling"]}
    said = cli.describe_gpu_runs([run])
    assert "A GPU (commit 0123, 2026-01-02): cuda: visit pooling, survival NLL; triton: vis" in said
    assert "compiled ahead for sm_80, sm_90 and sm_100" in report[-1]

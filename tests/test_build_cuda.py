"""The build of ``_C_cuda``: what it asks nvcc for, and what it says where there is none."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from ehrseq_fast import backend

SOURCE = Path(__file__).parent.parent / "csrc" / "build_cuda.py"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason=f"there is no {SOURCE}")


@pytest.fixture
def build_cuda():
    spec = importlib.util.spec_from_file_location("build_cuda", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Puts a script in the place of CUDA's nvcc."""

    def write(*lines: str) -> str:
        script = tmp_path / "cuda" / "bin" / "nvcc"
        script.parent.mkdir(parents=True)
        script.write_text("\n".join(["#!/bin/sh", *lines]))
        script.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return str(script)

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return write


def test_the_nvcc_of_cuda_home_comes_first(build_cuda, nvcc):
    script = nvcc("exit 0")
    assert build_cuda.find_nvcc() == script


def test_a_machine_without_nvcc_is_told_so(build_cuda, monkeypatch):
    monkeypatch.setattr(build_cuda.shutil, "which", lambda *_: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build_cuda.CudaBuildError, match="no nvcc was found"):
        build_cuda.find_nvcc()


def test_an_older_nvcc_builds_for_what_it_knows(build_cuda, nvcc):
    script = nvcc("echo sm_75 sm_80 sm_90")
    assert build_cuda.architectures(script) == ["8.0", "9.0+PTX"]


def test_architectures_that_are_asked_for(build_cuda, nvcc, monkeypatch):
    script = nvcc("echo sm_75")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 9.0a;12.0+PTX")
    assert build_cuda.architectures(script) == ["7.5", "9.0a", "12.0+PTX"]
    assert build_cuda._generate("12.0+PTX") == [
        *("-gencode", "arch=compute_120,code=sm_120"),
        *("-gencode", "arch=compute_120,code=compute_120"),
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build_cuda.CudaBuildError, match=r"holds 'Hopper'; it takes such as 9\.0"):
        build_cuda.architectures(script)


def test_an_nvcc_that_fails_is_quoted(build_cuda, nvcc, tmp_path):
    nvcc(
        'case "$1" in --version) echo V13.0.88; exit;; --list-gpu-code) echo sm_90; exit;; esac',
        'echo "kernels.cuh(7): error: there is no such thing"; exit 2',
    )
    source = tmp_path / "cuda.cu"
    source.touch()
    with pytest.raises(build_cuda.CudaBuildError, match=r"nvcc failed \(kernels\.cuh\(7\): error"):
        build_cuda.build([source], tmp_path / "lib.so", tmp_path / "scratch", tmp_path, [])


def test_the_reason_is_kept_for_info(tmp_path, monkeypatch):
    monkeypatch.delenv("EHRSEQ_FAST_NO_COMPILED", raising=False)
    monkeypatch.setattr(backend, "_PACKAGE", tmp_path)
    assert backend._load_library("_C_cuda").reason == "_C_cuda was not built, or was deleted"
    record = {"compiler": "g++", "cuda_skipped": "no nvcc was found when the package was built"}
    (tmp_path / "_build_record.json").write_text(json.dumps(record))
    assert backend._load_library("_C_cuda").reason == record["cuda_skipped"]
    assert backend._load_library("_C").reason == "_C was not built, or was deleted"


def test_sources_keep_to_names_that_torch_2_10_has():
    """A newer torch's headers have more, which no build with them would notice."""
    csrc = Path(__file__).parent.parent / "csrc"
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")  # 2.13; TORCH_ERROR_CODE_CHECK
    sources = [path for path in csrc.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 50
    assert not [str(path) for path in sources if newer.search(path.read_text())]

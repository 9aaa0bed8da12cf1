"""The command line: what ``info`` says of the backends is what they do, and how commands fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ehrseq_fast import backend, cli, operations
from tests.extras import needs

ROOT = Path(__file__).parent.parent


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


def test_info_says_how_bfloat16_is_multiplied():
    def said(**environment: str) -> str:
        (line,) = [line for line in info(**environment)[""].splitlines() if "bfloat16 in" in line]
        return line.removeprefix("bfloat16 in recurrent layers on the CPU: ")

    if backend.compiled_cpu.reason is None:
        how, amx = said(EHRSEQ_FAST_CPU_CAPABILITY="baseline").split("; AMX: ")
        assert how == "widened to float32"
        forbidden = "not used, because EHRSEQ_FAST_CPU_CAPABILITY forbids it"
        assert amx == (backend.why_no_amx() or forbidden)
        if backend.cpu_capability() not in ("baseline", "avx2"):
            assert said(EHRSEQ_FAST_CPU_CAPABILITY="amx_emulated").startswith(
                "in tiles (AMX); AMX: emulated, slowly, because "
            )
    assert said(EHRSEQ_FAST_NO_COMPILED="1") == "by PyTorch; AMX: no kernels are loaded"


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


# Errors and extras


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def hide(*packages: str) -> None:
        for package in packages:
            for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, package, None)

    return hide


OPTIONAL = ("jsonargparse", "safetensors", "yaml", "tqdm", "matplotlib", "pyarrow", "duckdb")


def test_info_needs_no_optional_package(without, capsys):
    without(*OPTIONAL)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == cli.describe() + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "S", "R"], "needs jsonargparse: pip install 'ehrseq_fast[train]'"),
        (["evaluate", "R", "S"], "needs safetensors: pip install 'ehrseq_fast[train]'"),
        (["predict", "R", "S", "o.parquet"], "needs safetensors: pip install 'ehrseq_fast[train]'"),
        (["store", "omop", "D", "S"], "needs duckdb: pip install 'ehrseq_fast[omop]'"),
        (["store", "meds", "D", "S"], "needs pyarrow: pip install 'ehrseq_fast[meds]'"),
        (["store", "to-meds", "S", "D"], "needs pyarrow: pip install 'ehrseq_fast[meds]'"),
    ],
)
def test_other_commands_say_which_extra_they_need(without, capsys, arguments, said):
    without(*OPTIONAL)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("ehrseq-fast: error: ")
    assert error.endswith(f"{said}\n")
    assert error.count("\n") == 1


def test_errors_end_in_one_line_and_show_their_traceback_when_asked(tmp_path, capsys):
    arguments = ["store", "describe", str(tmp_path / "none")]
    assert cli.main(arguments) == 1
    said = f"ehrseq-fast: error: {tmp_path}/none: expected the folder of an EventStore"
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert cli.main([*arguments, "--traceback"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["store", "omop", "D"], "the following arguments are required: STORE"),
        (["predict", "R", "S"], "the following arguments are required: OUT.parquet"),
        (["train", "S"], "the following arguments are required: run"),
        (["train", "S", "R", "--model.hidden_dim", "x"], "Expected a <class 'int'>. Got value: x"),
        (["train", "S", "R", "--epoch", "3"], "--epoch"),
    ],
)
def test_a_command_line_that_does_not_parse_exits_with_2(capsys, arguments, said):
    if arguments[:1] == ["train"]:
        pytest.importorskip("jsonargparse", reason="needs ehrseq_fast[train]")
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_console_script_is_this_main():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ehrseq-fast": "ehrseq_fast.cli:main"}
    extras = project["optional-dependencies"]
    assert extras["all"] == ["ehrseq_fast[meds,omop,train,metrics,tensorboard,mlflow]"]
    script = [sys.executable, "-c", "from ehrseq_fast.cli import main; raise SystemExit(main())"]
    done = subprocess.run([*script, "store"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ehrseq-fast store: error" in done.stderr.splitlines()[-1]


@needs("train")
def test_the_files_of_a_command_are_named(tmp_path, capsys):
    files = {"none.yaml": None, "no.yaml": "[", "other.yaml": "code: 5"}
    expected = ["no such file or directory", "expected YAML, got", "task: expected settings of"]
    for (name, text), said in zip(files.items(), expected, strict=True):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        assert cli.main(["train", "S", "R", "--task", str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"ehrseq-fast: error: {path}: {said}")


def test_warnings_are_lines_and_do_not_flood(monkeypatch, capsys):
    def describe(*_):
        for number in range(5):
            warnings.warn(f"same\nplace {number}", stacklevel=1)
        warnings.warn("another place", stacklevel=1)
        raise ValueError("and an error")

    monkeypatch.setattr(cli.store, "_describe", describe)
    shown = warnings.showwarning
    assert cli.main(["store", "describe", "S"]) == 1
    said = ["warning: same place 0", "warning: same place 1", "warning: another place"]
    lines = [f"ehrseq-fast: {line}" for line in (*said, "error: and an error")]
    assert capsys.readouterr().err.splitlines() == lines
    assert warnings.showwarning is shown

"""`python -m renorm doctor`: what it says, and its exit status."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import renorm
from renorm import __main__ as command
from renorm import doctor as module
from renorm import selftest as selftesting
from renorm.__main__ import main
from renorm.ops import backends, reference

PACKAGE = Path(renorm.__file__).parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "renorm", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPEED_SHAPES", {"cpu": (2, 3, 4, 4), "cuda": (2, 3, 4, 4)})


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package without its kernels, somewhere else."""
    target = tmp_path / "renorm"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("_kernels.*", "__pycache__"))
    return target


@pytest.fixture
def without_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "entry_points", lambda group: ())


def with_a_lab(monkeypatch: pytest.MonkeyPatch, lab: object) -> None:
    """Another distribution that adds to the command; what it brings may be an error."""

    class Entry:
        def load(self) -> object:
            if isinstance(lab, BaseException):
                raise lab
            return lab

    monkeypatch.setattr(command, "entry_points", lambda group: (Entry(),) if group == "renorm.commands" else ())


@pytest.mark.usefixtures("without_the_lab")
def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "doctor" in text
    assert "pip install ./lab" in text


@pytest.mark.usefixtures("without_the_lab")
def test_commands_of_the_lab_say_what_to_install_where_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "microbatch"])
    assert "run is no command of the library" in capsys.readouterr().err


def test_the_lab_is_handed_all_but_the_library_s_commands(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handed: list[list[str]] = []
    with_a_lab(monkeypatch, lambda arguments: handed.append(arguments) or 3)
    assert main(["run", "microbatch"]) == main(["--help"]) == main([]) == 3
    assert handed == [["run", "microbatch"], ["--help"], []]
    assert main(["doctor"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.endswith(f"renorm {renorm.__version__}\n")


def test_a_lab_that_lacks_something_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_lab(monkeypatch, ModuleNotFoundError("No module named 'lightning'"))
    assert main(["list"]) == 1
    assert capsys.readouterr().err.startswith("renorm: error: the lab is not complete (No module named 'lightning')")


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_lab(monkeypatch, KeyboardInterrupt())
    assert main(["list"]) == 130


def test_a_reader_that_has_seen_enough_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "renorm", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 1


def test_with_the_extension_everything_works(
    kernels: None, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RENORM_CPU", raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in text
    assert f"C++ kernels for {torch.ops.renorm.instruction_set()}" in text
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert dtype in text
    assert "BatchRenorm2d takes" in text
    assert "Everything works." in text


def test_turned_off_it_works_and_says_so() -> None:
    found = run("doctor", RENORM_CPU="off")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "torch's own operations: RENORM_CPU=off asks for them" in found.stdout
    assert "unset RENORM_CPU" in found.stdout
    assert found.stderr == ""


@pytest.mark.skipif(not backends.has_stable_abi(), reason="this torch is too old for kernels")
def test_a_package_without_kernels_works_and_says_how_to_build_them(copied: Path) -> None:
    found = run("doctor", PYTHONPATH=str(copied.parent), RENORM_CPU="")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "torch's own operations: the C++ kernels were not built" in found.stdout
    assert "pip install --no-build-isolation" in found.stdout


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not built"])
def test_a_torch_that_is_too_old_for_the_kernels_is_named(
    is_built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "_kernels.abi3.so"
    library.write_bytes(b"not loaded")
    monkeypatch.setattr(backends, "library_files", lambda: [library] if is_built else [])
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.delenv("RENORM_CPU", raising=False)
    assert not backends._load_cpu_kernels()  # and no warning, since the installation is as it should be
    found = module.cpu_backend()
    assert found.works
    assert found.reason == "the C++ kernels need torch 2.10 or newer, and this is 2.9.1+cpu"
    assert "pip install --upgrade torch" in found.remedy
    assert ("--no-build-isolation" in found.remedy) == (not is_built)


@pytest.mark.skipif(not backends.has_stable_abi(), reason="this torch is too old for kernels")
def test_a_broken_extension_is_a_failure_with_its_reason(copied: Path) -> None:
    (copied / "_kernels.abi3.so").write_bytes(b"not a library")
    found = run("doctor", PYTHONPATH=str(copied.parent), RENORM_CPU="", PYTHONWARNINGS="ignore")
    assert found.returncode == 1
    assert "_kernels.abi3.so does not load: " in found.stdout
    assert "against this torch" in found.stdout
    assert found.stdout.count("passed") == 4  # torch's operations take its place
    assert "Something does not work." in found.stdout


def test_wrong_results_are_a_failure_with_the_case(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = reference.forward

    def slightly_off(*arguments: Any) -> Any:
        found = forward(*arguments)
        return found._replace(y=found.y * (1 + 1e-4))

    monkeypatch.setattr(selftesting.reference, "forward", slightly_off)
    if not backends.available["cpu"]:
        pytest.skip("without kernels both sides are off")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED, " in text
    assert ": output" in text
    assert "results on cpu are wrong" in text


@pytest.mark.usefixtures("quick")
def test_what_raises_is_a_failure_of_its_case_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(selftesting, "Norm", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.count("RuntimeError: no such operation") == 4


@pytest.mark.usefixtures("each_backend")
def test_every_backend_is_well_within_the_bounds() -> None:
    results = selftesting.selftest()
    assert [result.dtype for result in results] == list(selftesting.BOUNDS)
    for result in results:
        assert result.cases == 48
        assert 0 < result.error < result.bound / 2, result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_tested_too() -> None:
    assert all(result.passed for result in selftesting.selftest("cuda"))
    assert module.gpu_backend().works


def test_importing_the_library_imports_nothing_heavier_than_torch() -> None:
    code = "import sys, torch; before = set(sys.modules); import renorm; print(*set(sys.modules) - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = found.stdout.split()
    assert "renorm.norm" in modules
    assert {module.partition(".")[0] for module in modules} <= {"renorm", "torch", *sys.stdlib_module_names}
    assert not any(module.startswith("renorm.integrations.") for module in modules)

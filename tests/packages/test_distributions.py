"""The sdist and the wheels: what they hold, and that they work in a fresh environment outside the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import renorm

from .building import ROOT, build, copy_source, put_in_place_of_torch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packages")]  # one process builds for all

OTHER = os.environ.get("RENORM_OTHER_PYTHON", "")
_SITE = "import sysconfig; print(sysconfig.get_path('platlib'))"
_TRAIN = """
import torch
from torch import nn

import renorm
from renorm.ops import backends

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
model = renorm.convert(model, renorm.BatchRenorm, limits=renorm.Limits.constant())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(renorm.__file__, renorm.__version__, backends.available["cpu"], sep="\\n")
"""


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, which is built from the sdist."""
    folder = tmp_path_factory.mktemp("packages")
    build(copy_source(folder / "source"), folder / "dist")
    return folder / "dist"


@pytest.fixture(scope="session")
def sdist(distributions: Path) -> Path:
    return next(distributions.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheels(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With the kernels, and the one that a build without torch gives."""
    folder = tmp_path_factory.mktemp("universal")
    build(copy_source(folder / "source"), folder / "dist", "--wheel", **put_in_place_of_torch(folder))
    return {"kernels": next(distributions.glob("*.whl")), "universal": next((folder / "dist").glob("*.whl"))}


@pytest.fixture(scope="session")
def lab_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's, built from its sdist."""
    folder = tmp_path_factory.mktemp("lab")
    build(copy_source(folder / "source") / "lab", folder / "dist")
    return next((folder / "dist").glob("*.whl"))


def package_files(package: Path = ROOT / "src" / "renorm") -> set[str]:
    files = (path for path in package.rglob("*") if path.is_file())
    return {path.relative_to(package.parent).as_posix() for path in files if path.suffix not in {".so", ".pyc"}}


def fresh_environment(folder: Path, python: str, *wheels: Path) -> Path:
    """The Python of a new virtual environment with the wheels; all but renorm it finds where the given Python does."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    new = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", new, "install", "--quiet", "--no-index", "--no-deps", *wheels]
    subprocess.run(pip, check=True)
    others = folder / "others"
    others.mkdir()
    for path in Path(printed(python, "-c", _SITE)).iterdir():
        if not path.name.startswith(("renorm", "__editable__")):
            (others / path.name).symlink_to(path)
    Path(printed(new, "-c", _SITE), "others.pth").write_text(str(others))
    return new


def printed(python: str | Path, *arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "RENORM_CPU"}}
    run = subprocess.run(
        [python, *arguments], cwd=Path(python).parent, env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def test_the_sdist_holds_what_builds_and_tests_the_project(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"LICENSE", "CHANGELOG.md", "constraints.txt", "csrc/tests/Makefile"} <= names
    assert {"tests/conftest.py", "lab/pyproject.toml", "lab/renorm_lab/cli.py", "lab/tests/conftest.py"} <= names
    assert not any(name.endswith((".so", ".pyc")) or "results/" in name for name in names)


@pytest.mark.parametrize("kind", ["kernels", "universal"])
def test_a_wheel_holds_the_package_alone(kind: str, wheels: dict[str, Path], kernels: None) -> None:
    with ZipFile(wheels[kind]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = f"renorm-{renorm.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{information}/METADATA").decode())
        assert f"{information}/licenses/LICENSE" in archive.namelist()
    assert names == package_files() | ({"renorm/_kernels.abi3.so"} if kind == "kernels" else set())
    assert "-cp310-abi3-" in wheels[kind].name if kind == "kernels" else wheels[kind].name.endswith("-py3-none-any.whl")
    assert metadata["Version"] == renorm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.8"]


def test_the_labs_wheel_holds_the_lab_alone(lab_wheel: Path) -> None:
    with ZipFile(lab_wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = f"renorm_lab-{renorm.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{information}/METADATA").decode())
        assert archive.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert names == package_files(ROOT / "lab" / "renorm_lab")
    assert lab_wheel.name.endswith("-py3-none-any.whl")
    assert any(line.startswith("renorm[vision]") for line in metadata.get_all("Requires-Dist", []))


def test_the_command_renorm_comes_with_the_lab(lab_wheel: Path, wheels: dict[str, Path], tmp_path: Path) -> None:
    library = fresh_environment(tmp_path / "library", sys.executable, wheels["universal"])
    assert "pip install ./lab" in printed(library.with_name("renorm"))
    both = fresh_environment(tmp_path / "both", sys.executable, wheels["universal"], lab_wheel)
    command = both.with_name("renorm")
    assert "report" in printed(command, "--help")
    assert printed(command, "--version") == f"renorm {renorm.__version__}"
    assert "microbatch" in printed(command, "list")
    out = tmp_path / "microbatch"
    printed(command, "run", "microbatch", "--scale=tiny", "--steps=2", "--methods=[batch_norm]", f"--out={out}")
    printed(command, "report", str(out), f"--out={tmp_path}")
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize("python", [
    pytest.param(sys.executable, id="this Python"),
    pytest.param(OTHER, id="another Python", marks=pytest.mark.skipif(
        not OTHER, reason="RENORM_OTHER_PYTHON names no Python, with another torch"
    )),
])  # fmt: skip
@pytest.mark.parametrize(("kind", "environment"), [
    ("kernels", {}),
    ("kernels", {"RENORM_CPU": "off"}),
    ("universal", {}),
], ids=["kernels", "kernels off", "universal"])  # fmt: skip
def test_a_wheel_works_in_a_fresh_environment(
    kind: str, environment: dict[str, str], python: str, wheels: dict[str, Path], tmp_path: Path, kernels: None
) -> None:
    new = fresh_environment(tmp_path / "environment", python, wheels[kind])
    file, version, has_kernels = printed(new, "-W", "error", "-c", _TRAIN, **environment).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert Path(file).with_name("py.typed").exists()
    assert version == renorm.__version__
    assert has_kernels == str(kind == "kernels" and not environment)
    found = printed(new, "-m", "renorm", "doctor", **environment)
    assert "Everything works." in found
    assert ("C++ kernels for" in found) == (has_kernels == "True")

"""`renorm inspect`: a model and data of the user's, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from renorm_lab.cli import main

MODULE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

NET = network()

def nothing():
    return None

def batches():
    return [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]

def strange():
    return ["text"]
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize(
    "options", [[], ["--data", "mine:batches"], ["--classes-per-batch", "2", "--batch-size", "16", "--batches", "5"]]
)
def test_findings_table_and_picture_of_a_model(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "mine:network", *options, "--csv", "layers.csv", "--plot", "layers.svg"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "its running statistics have never been moved" in shown
    assert Path("layers.csv").read_text().splitlines()[1].startswith("2,BatchNorm1d,16,")
    assert "<svg" in Path("layers.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "model must be module:function, got 'mine'"),
        (["absent:network"], "absent:network: No module named 'absent'"),
        (["mine:absent"], "mine:absent: module 'mine' has no attribute 'absent'"),
        (["mine:NET"], "model must be module:function, got 'mine:NET', a Sequential"),
        (["mine:network", "--csv", "absent/layers.csv"], "absent/layers.csv: cannot be written: No such file"),
        (["mine:network", "--csv", "."], ".: cannot be written: Is a directory"),
        (["mine:network", "--plot", "absent/layers.svg"], "absent/layers.svg: cannot be written: No such file"),
        (["mine:network", "--plot", "layers.foo"], "layers.foo: Format 'foo' is not supported"),
        (["mine:nothing"], "mine:nothing must return a torch.nn.Module, got NoneType"),
        (["mine:network", "--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["mine:network", "--data", "mine:strange"], "a batch must be a tensor"),
        (["mine:network", "--batch-size", "5000"], "batch_size must be at most"),
        (["mine:network", "--classes-per-batch", "3"], "batch_size must be a multiple of classes_per_batch=3, got 32"),
        (["mine:network", "--classes-per-batch", "16"], "classes_per_batch must be at most 10"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"renorm: error: {message}")
    assert error.count("\n") == 1

"""What finetune.py and shift.py share: images from a folder or a file, timm's networks, training and testing them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import renorm
from common import descend, replace_file

Transform = Callable[[Image.Image], Any]
Loader = DataLoader[tuple[Tensor, Tensor]]
SOURCES = "an .npz file, or a folder with subfolders train and val, in each a folder a class"
SMALL = 64  # pixels, up to which a network does without the pooling of its stem


class Arrays(Dataset[tuple[Any, int]]):
    """A part of an .npz file with x_train (N, H, W, 1 or 3), uint8, y_train (N,), x_test and y_test.

    Args:
        path: the file.
        part: "train" or "test".
        transform: of the PIL images.
    """

    def __init__(self, path: Path, part: str, transform: Transform | None) -> None:
        with np.load(path) as file:
            self.images, self.targets = file[f"x_{part}"], file[f"y_{part}"].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = self.images[index]
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        image = image.convert("RGB")
        return image if self.transform is None else self.transform(image), self.targets[index]


def dataset(path: Path, part: str, transform: Transform | None = None) -> Arrays | ImageFolder:
    """The part "train" or "test" of an .npz file, or of a folder with subfolders train and val, a folder a class."""
    if path.suffix == ".npz":
        return Arrays(path, part, transform)
    return ImageFolder(path / {"train": "train", "test": "val"}[part], transform)


def check_source(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    """Refuse a file or folder that `dataset` cannot read."""
    for part in [path] if path.suffix == ".npz" else [path / "train", path / "val"]:
        if not part.exists():
            parser.error(f"{option} {path}: there is no {part}; give {SOURCES}")


def transforms(model: nn.Module, size: int) -> tuple[v2.Transform, v2.Transform]:
    """How images of `size` pixels come to a model of timm, in training and at evaluation."""
    config = resolve_model_data_config(model)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    crop = v2.RandomResizedCrop(size, scale=(0.6, 1.0))
    whole = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *end])
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *end]), whole


def split(targets: Sequence[int], per_class: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Images to train with and to validate on: so many of each class each, or four fifths and a fifth."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).tolist()
    available, seen = Counter(targets), Counter[int]()
    train: list[int] = []
    validation: list[int] = []
    for index in order:
        label = targets[index]
        number = per_class or max(1, available[label] * 4 // 5)
        if seen[label] < 2 * number:
            (train if seen[label] < number else validation).append(index)
        seen[label] += 1
    return train, validation


def shuffled(data: Dataset[Any], indices: Sequence[int], batch_size: int, seed: int) -> Loader:
    """Batches to train with; the last one is left out if it is smaller, as batch norm needs two examples."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Subset(data, indices), batch_size, shuffle=True, drop_last=True, generator=generator)


def network(name: str, classes: int, size: int, pretrained: bool = False) -> nn.Module:
    """A network of timm; for small images without the pooling of its stem."""
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    if size <= SMALL and isinstance(getattr(model, "maxpool", None), nn.Module):
        model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    loader: Loader,
    epochs: int,
    rate: float,
    mode: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Train with SGD, its rate falling to 0 along a cosine, in training mode and inside `mode`."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    device = next(model.parameters()).device
    model.train()
    with mode(model):
        for _ in range(epochs):
            for images, labels in loader:
                descend(optimizer, cross_entropy(model(images.to(device)), labels.to(device)))
                schedule.step()


def pretrain(model: nn.Module, data: Dataset[Any], indices: Sequence[int], epochs: int, seed: int, file: Path) -> None:
    """Train a network from the beginning, in batches of 128, and keep its weights in a file; the next time, read it."""
    if file.exists():
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return
    torch.manual_seed(seed)
    train(model, shuffled(data, indices, min(128, len(indices)), seed), epochs, rate=0.1)
    replace_file(file, lambda path: torch.save(model.state_dict(), path))


@torch.no_grad()
def accuracy(model: nn.Module, loader: Loader) -> float:
    """Share of right answers at evaluation, in %."""
    device = next(model.parameters()).device
    model.eval()
    right = [(model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in loader]
    return 100 * torch.cat(right).mean().item()


def example_weight(model: nn.Module) -> float:
    """The example weight of all norm layers."""
    return next(module.example_weight for module in model.modules() if isinstance(module, renorm.Norm))

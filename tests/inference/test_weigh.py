"""Choosing the example weight: against a sweep by hand, within its budget, and with nothing left behind."""

from __future__ import annotations

import copy
import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import renorm
from renorm.inference.scores import Judge, bootstrap
from renorm.inference.weigh import _parts, rehearse

DIGITS = load_digits()
X = torch.as_tensor(DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
Y = torch.as_tensor(DIGITS.target)
ORDER = torch.randperm(len(Y), generator=torch.Generator().manual_seed(0))
TRAIN, HELD_OUT = ORDER[:1_000], ORDER[1_000:]
LOADER = DataLoader(TensorDataset(X[HELD_OUT], Y[HELD_OUT]), 50)


def trained(dependent: bool) -> nn.Module:
    """A small network, trained in batches that have a light each, or on the images as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        chosen = TRAIN[torch.randint(len(TRAIN), (64,))]
        x = X[chosen] * 4 ** torch.randn(()) if dependent else X[chosen]
        loss = nn.functional.cross_entropy(model(x), Y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def in_their_own_light(x: Tensor) -> Tensor:
    """Each image brighter or darker, as the batches of the training were."""
    return x * 4 ** torch.randn(len(x), 1, 1, 1, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dependent() -> nn.Module:
    return trained(dependent=True)


@pytest.fixture(scope="module")
def independent() -> nn.Module:
    return trained(dependent=False)


def scores_by_hand(model: nn.Module, alphas: float | dict[str, float], x: Tensor) -> Tensor:
    """The network's outputs with every batch norm layer written out."""
    for name, module in model.named_children():
        alpha = alphas[name] if isinstance(alphas, dict) and name in alphas else alphas
        if not isinstance(module, nn.BatchNorm2d | renorm.BatchNorm2d):
            x = module(x)
            continue
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        running_mean, running_var = (t[:, None, None] for t in (module.running_mean, module.running_var))
        var = (1 - alpha) * running_var + alpha * var + alpha * (1 - alpha) * (mean - running_mean) ** 2
        mean = (1 - alpha) * running_mean + alpha * mean
        weight, bias = module.weight[:, None, None], module.bias[:, None, None]
        x = (x - mean) / (var + module.eps).sqrt() * weight + bias
    return x


def test_lost_accuracy_is_won_back_by_more_than_its_interval(dependent: nn.Module) -> None:
    model, x = copy.deepcopy(dependent), in_their_own_light(X[HELD_OUT])
    found = renorm.weigh(model, DataLoader(TensorDataset(x, Y[HELD_OUT]), 50))
    assert found.alpha > 0
    assert found.gain.low > 0.02
    assert all(layer.example_weight == found.alpha for layer in (model[1], model[5]))
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == Y[HELD_OUT]).double().mean().item()
    assert right == pytest.approx(max(point.score.mean for point in found.curve))
    assert f"example_weight = {found.alpha:.3f} gains" in str(found)


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy"])
def test_the_curve_is_that_of_a_sweep_by_hand(dependent: nn.Module, metric: str) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, metric)
    with torch.no_grad():
        for point in found.curve:
            output = scores_by_hand(dependent, point.alpha, X[HELD_OUT])
            right = (output.argmax(1) == Y[HELD_OUT]).double().mean()
            expected = right if metric == "accuracy" else nn.functional.cross_entropy(output, Y[HELD_OUT]).double()
            tolerance = 1 / len(HELD_OUT) if metric == "accuracy" else 1e-5
            assert point.score.mean == pytest.approx(expected.item(), abs=tolerance)
            assert point.examples == len(HELD_OUT)


def test_the_best_is_near_that_of_a_fine_sweep(dependent: nn.Module) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, "cross_entropy")
    with torch.no_grad():
        losses = {
            alpha: nn.functional.cross_entropy(scores_by_hand(dependent, alpha / 100, X[HELD_OUT]), Y[HELD_OUT]).item()
            for alpha in range(101)
        }
    assert found.best == pytest.approx(min(losses, key=losses.__getitem__) / 100, abs=0.015)


def test_it_takes_at_most_eight_passes(dependent: nn.Module) -> None:
    model, examples = copy.deepcopy(dependent), 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal examples
        examples += len(inputs[0])

    model[0].register_forward_pre_hook(count)
    loader = DataLoader(TensorDataset(X[HELD_OUT], Y[HELD_OUT]), 20)
    found = renorm.weigh(model, loader)
    assert examples / len(HELD_OUT) == pytest.approx(found.passes)
    assert found.passes <= 8


@pytest.mark.parametrize("seed", range(30))
def test_any_curve_ends_within_the_budget(seed: int) -> None:
    """Rough curves, plateaus and maxima anywhere, as accuracies have them."""
    generator = torch.Generator().manual_seed(seed)
    peak, rough = torch.rand(2, generator=generator).tolist()
    model, examples = nn.Sequential(renorm.BatchNorm1d(1)), 0

    def curve(output: Tensor, target: Tensor) -> Tensor:
        nonlocal examples
        examples += len(output)
        alpha = model[0].example_weight
        noise = rough * 0.2 * math.sin(1e4 * alpha)
        return torch.full((len(output),), round(-((alpha - peak) ** 2) + noise, seed % 4)).double()

    loader = [(torch.randn(5, 1), torch.zeros(5))] * 16
    found = renorm.weigh(model, loader, curve, higher_is_better=True)
    assert examples == found.passes * 80 <= 8 * 80
    assert found.best == max(sorted(found.curve, key=lambda p: p.alpha), key=lambda p: p.score.mean).alpha


def test_where_nothing_is_to_be_gained_it_says_so_and_leaves_the_weight_at_0(independent: nn.Module) -> None:
    model = copy.deepcopy(independent)
    found = renorm.weigh(model, LOADER)
    assert found.alpha == model[1].example_weight == 0
    assert "within noise" in str(found) or "nothing is better than the model as it was" in str(found)
    assert found.is_noise


def test_the_loader_is_begun_once_for_each_pass(dependent: nn.Module) -> None:
    class Counting:
        begun = 0

        def __iter__(self) -> Iterator[Any]:
            self.begun += 1
            return iter(LOADER)

    loader = Counting()
    found = renorm.weigh(copy.deepcopy(dependent), loader)
    assert loader.begun == len(found.curve) + len(found.grid)


@pytest.mark.parametrize("name", ["accuracy", "cross_entropy"])
def test_a_function_of_a_known_name_is_still_the_user_s_own(name: str) -> None:
    def own(output: Tensor, target: Tensor) -> Tensor:
        return output[:, 0]

    own.__name__ = name
    with pytest.raises(ValueError, match=f"higher_is_better must be True or False for {name}, got None"):
        Judge(own)
    assert not Judge(own, False).higher_is_better


@pytest.mark.parametrize(
    ("metric", "output", "target"),
    [
        ("accuracy", (4, 3), (4, 1)),
        ("accuracy", (4, 1), (4, 1)),
        ("accuracy", (4, 1), (4,)),
        ("accuracy", (4,), (4,)),
        ("accuracy", (4, 3, 5), (4, 1)),
        ("cross_entropy", (4, 1), (4,)),
        ("cross_entropy", (4,), (4,)),
    ],
)
def test_shapes_that_say_something_else_are_refused(
    metric: str, output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    scoring = Judge(metric).start()
    with pytest.raises(ValueError, match=f"{metric} is of logits .* got shapes .*: give another metric") as refusal:
        scoring.add(torch.zeros(output), torch.zeros(target).long())
    assert f"{output} and {target}" in str(refusal.value)


def test_a_metric_is_computed_where_the_outputs_are() -> None:
    class Elsewhere(nn.Module):
        higher_is_better = True
        device = torch.device("meta")

        def to(self, device: Any) -> Any:
            self.device = device
            return self

        def update(self, output: Tensor, target: Tensor) -> None:
            assert output.device == self.device

        def compute(self) -> Tensor:
            return torch.tensor(1.0)

        def reset(self) -> None:
            pass

    metric = Elsewhere()
    scoring = Judge(metric).start()
    scoring.add(torch.zeros(4, 3), torch.zeros(4))
    assert scoring.evaluation().score == 1
    assert metric.device == torch.device("meta")  # the user's own stays where it is


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_torchmetrics_metric_of_the_cpu_judges_a_model_on_a_gpu() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).cuda()
    renorm.weigh(model, LOADER, MulticlassAccuracy(10, average="micro"))


def test_a_metric_of_one_s_own(dependent: nn.Module) -> None:
    def margin(output: Tensor, target: Tensor) -> Tensor:
        return output.gather(1, target[:, None])[:, 0] - output.mean(1)

    found = renorm.weigh(copy.deepcopy(dependent), LOADER, margin, higher_is_better=True)
    assert found.metric == "margin"
    with torch.no_grad():
        for point in found.curve:
            expected = margin(scores_by_hand(dependent, point.alpha, X[HELD_OUT]), Y[HELD_OUT]).mean().item()
            assert point.score.mean == pytest.approx(expected, abs=1e-4)
    assert found.best == max(found.curve, key=lambda point: point.score.mean).alpha


def test_modes_and_gradients_are_as_before(dependent: nn.Module) -> None:
    model = copy.deepcopy(dependent).train()
    model[2].eval()
    renorm.weigh(model, LOADER)
    assert [module.training for module in model] == [i != 2 for i in range(len(model))]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_restores_the_example_weights(dependent: nn.Module) -> None:
    model = renorm.convert(copy.deepcopy(dependent), renorm.BatchNorm, example_weight=0.3)

    def failing(output: Tensor, target: Tensor) -> Tensor:
        if model[1].example_weight == 0.2:
            raise ArithmeticError
        return output[:, 0]

    with pytest.raises(ArithmeticError):
        renorm.weigh(model, LOADER, failing, higher_is_better=True)
    assert model[1].example_weight == 0.3


def test_after_an_error_the_layers_are_those_that_were_there(dependent: nn.Module) -> None:
    model = copy.deepcopy(dependent)
    modules = list(model.modules())
    with pytest.raises(TypeError, match="a batch must be"):
        renorm.weigh(model, Once())
    assert list(model.modules()) == modules


class Once:
    def __iter__(self) -> Iterator[Any]:
        return iter([X[:4]])


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (iter(LOADER), {}, ValueError, "not an iterator"),
        ([], {}, ValueError, "loader has no example"),
        (Once(), {}, TypeError, r"a batch must be \(input, target\)"),
        (LOADER, {"metric": "f1"}, ValueError, "one of 'accuracy', 'cross_entropy', 'training_mode', a function or"),
        (LOADER, {"batch_size": 4}, ValueError, "None but for metric='training_mode', .* got 4 with accuracy"),
        (
            LOADER,
            {"metric": "training_mode", "batch_size": 0},
            ValueError,
            "whole number of at least 1, .* got 0",
        ),
        (LOADER, {"metric": "training_mode", "batch_size": 2.0}, ValueError, "whole number of at least 1, .* got 2.0"),
        (LOADER, {"metric": "training_mode", "batch_size": 51}, ValueError, "at most that of the loader's, 50, got 51"),
        (LOADER, {"metric": lambda y, t: y}, ValueError, "higher_is_better must be True or False"),
        (LOADER, {"metric": lambda y, t: y, "higher_is_better": True}, ValueError, r"of each example, \(N,\)"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    dependent: nn.Module, loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        renorm.weigh(copy.deepcopy(dependent), loader, **options)


class Segmenter(nn.Module):
    """Returns a dictionary, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.net(x)}


SCENES = [(torch.randn(4, 1, 6, 6), torch.randint(3, (4, 6, 6))) for _ in range(4)]


@pytest.mark.parametrize("metric", ["accuracy", "cross_entropy", "training_mode", MulticlassAccuracy(3)], ids=str)
def test_a_model_that_returns_a_dictionary_is_weighed_by_the_forward_that_the_error_names(metric: Any) -> None:
    model = Segmenter()
    modules = list(model.modules())
    name = metric if isinstance(metric, str) else "MulticlassAccuracy"
    with pytest.raises(TypeError, match=rf"{name} is of a tensor, and the model returns dict with \['out'\]") as caught:
        renorm.weigh(model, SCENES, metric)
    assert list(model.modules()) == modules
    (code,) = re.findall(r"as forward=(lambda .*)", str(caught.value))
    expected = renorm.weigh(copy.deepcopy(model.net), SCENES, metric)
    assert renorm.weigh(model, SCENES, metric, forward=eval(code)).before == expected.before


def test_a_score_of_one_s_own_gets_what_the_model_returns() -> None:
    def agreement(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return (output["out"].argmax(1) == target).double().mean((1, 2))

    model = Segmenter()
    expected = renorm.weigh(copy.deepcopy(model.net), SCENES, "accuracy")
    assert renorm.weigh(model, SCENES, agreement, higher_is_better=True).before == expected.before


def test_layers_in_ghost_batch_norm_are_weighed_where_they_are() -> None:
    class GBN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.virtual_batch_size = nn.BatchNorm1d(3), 2

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.bn(part) for part in x.split(2)])

    model = nn.Sequential(GBN(), nn.Linear(3, 2))
    keys = list(model.state_dict())
    found = renorm.weigh(model, [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(4)])
    assert list(found.alphas) == ["0.bn"]
    assert list(model.state_dict()) == keys


def test_models_without_running_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="no norm layer with running statistics"):
        renorm.weigh(nn.Sequential(nn.Linear(3, 3)), [(torch.randn(2, 3), torch.zeros(2))])
    with pytest.raises(ValueError, match="model must contain its norm layer"):
        renorm.weigh(nn.BatchNorm1d(3), [(torch.randn(2, 3), torch.zeros(2))])
    with pytest.raises(ValueError, match="no norm layer with running statistics"):  # and no word of conversion
        renorm.weigh(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), [torch.randn(2, 3)])


def test_a_subclass_of_batch_norm_is_not_weighed_and_it_is_said_why() -> None:
    class Own(nn.BatchNorm1d):
        pass

    with (
        pytest.warns(UserWarning, match="0: Own left as it is"),
        pytest.raises(ValueError, match=r"subclasses of nn\.BatchNorm are passed over"),
    ):
        renorm.weigh(nn.Sequential(Own(3)), [torch.randn(2, 3)])


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    hits = sum(
        interval.low <= 0.3 <= interval.high
        for interval in (bootstrap((torch.rand(80) < 0.3).double(), torch.ones(80)).interval for _ in range(100))
    )
    assert 88 <= hits <= 100


@pytest.mark.parametrize(
    "metric", [MulticlassAccuracy(10, average="micro"), MulticlassAUROC(10)], ids=["mean", "ranks"]
)
def test_torchmetrics_metrics_are_computed_over_all_examples(dependent: nn.Module, metric: Any) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, metric)
    assert found.metric == type(metric).__name__
    with torch.no_grad():
        for point in found.curve:
            metric.update(scores_by_hand(dependent, point.alpha, X[HELD_OUT]), Y[HELD_OUT])
            assert point.score.mean == pytest.approx(metric.compute().item(), abs=2e-3)
            metric.reset()
    assert found.before.low < found.before.mean < found.before.high


def test_a_torchmetrics_metric_of_the_mean_agrees_with_scores_of_examples(dependent: nn.Module) -> None:
    by_examples = renorm.weigh(copy.deepcopy(dependent), LOADER)
    by_metric = renorm.weigh(copy.deepcopy(dependent), LOADER, MulticlassAccuracy(10, average="micro"))
    assert by_metric.best == by_examples.best
    for at, expected in zip(by_metric.curve, by_examples.curve, strict=True):
        assert at.score.mean == pytest.approx(expected.score.mean, abs=1e-6)
        assert at.score.high - at.score.low == pytest.approx(expected.score.high - expected.score.low, rel=0.2)


def test_a_metric_of_several_numbers_is_refused(dependent: nn.Module) -> None:
    with pytest.raises(ValueError, match="metric must be a single number"):
        renorm.weigh(copy.deepcopy(dependent), LOADER, MulticlassAccuracy(10, average=None))


def one_layer_in_its_own_light() -> tuple[nn.Module, Any]:
    """Two layers: the scale of one's input is an example's own; the mean of the other's tells the class."""
    torch.manual_seed(0)
    target = torch.randint(2, (400,))
    sign = 2.0 * target[:, None, None] - 1
    shape = torch.randn(400, 1, 16) * 0.3 + sign * torch.linspace(-1, 1, 16)
    x = torch.cat([shape * 4 ** torch.randn(400, 1, 1), sign + 0.8 * torch.randn(400, 1, 16)], 1)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(renorm.BatchNorm1d(1))
            self.second = nn.Sequential(renorm.BatchNorm1d(1))

        def forward(self, x: Tensor) -> Tensor:
            shape = self.first(x[:, :1]).squeeze(1) @ torch.linspace(-1, 1, 16)
            level = self.second(x[:, 1:]).mean((1, 2))
            margin = torch.tanh(shape / 8) + level
            return torch.stack([-margin, margin], 1)

    model = Two()
    renorm.estimate(model, x.split(50))
    return model, list(zip(x.split(20), target.split(20), strict=True))


@pytest.mark.parametrize("per", ["stage", "layer"])
def test_layers_that_need_different_example_weights_get_them(per: Any) -> None:
    model, loader = one_layer_in_its_own_light()
    single = renorm.weigh(copy.deepcopy(model), loader, "cross_entropy")
    found = renorm.weigh(model, loader, "cross_entropy", per=per)
    assert found.gain.mean > single.gain.mean
    assert found.alpha is None
    assert found.alphas == {"first.0": model.first[0].example_weight, "second.0": model.second[0].example_weight}
    assert found.alphas["first.0"] > found.alphas["second.0"] + 0.2
    assert "example weights of their own gains" in str(found)
    assert str(found).splitlines()[-1] == f"{found.alphas['second.0']:6.3f}  second.0"
    assert f"<td>second.0</td><td>{found.alphas['second.0']:.3f}</td>" in found._repr_html_()
    assert found.passes <= 8 + 2 * 4 + 1


@pytest.mark.parametrize(
    ("names", "per", "expected"),
    [
        (["bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"], "stage", [1, 2, 1]),
        (["net.body.bn1", "net.body.layer1.bn1", "net.body.layer1.bn2"], "stage", [1, 2]),
        (["net.bn"], "stage", [1]),
        (["a.bn", "b.bn"], "layer", [1, 1]),
        (["a.bn", "b.bn"], "model", []),
    ],
)
def test_stages_are_the_children_where_the_layers_part(names: list[str], per: Any, expected: list[int]) -> None:
    layers = {name: renorm.BatchNorm1d(1) for name in names}
    assert [len(part) for part in _parts(layers, per)] == expected


def test_a_second_weighing_starts_from_the_model_as_it_is(dependent: nn.Module) -> None:
    model = copy.deepcopy(dependent)
    first = renorm.weigh(model, LOADER, "cross_entropy")
    second = renorm.weigh(model, LOADER, "cross_entropy")
    assert first.alpha > 0
    assert second.before.mean == max(first.curve, key=lambda point: -point.score.mean).score.mean
    assert second.alpha == first.alpha


def test_a_group_norm_network_that_kept_running_statistics_is_weighed_from_a_weight_of_1() -> None:
    """Trained with group norm, so it is judged, and left where nothing is gained, as it is at an example weight of 1.

    Summers & Dinneen 2020 find the best below; this small network has no need of it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), renorm.BatchGroupNorm2d(8, 2, examples_per_group=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        chosen = TRAIN[torch.randint(len(TRAIN), (64,))]
        loss = nn.functional.cross_entropy(model(X[chosen]), Y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model[1].example_weight = 1.0
    with torch.no_grad():
        as_trained = nn.functional.cross_entropy(model.eval()(X[HELD_OUT]), Y[HELD_OUT]).item()
    found = renorm.weigh(model, LOADER, "cross_entropy")
    assert found.before.mean == pytest.approx(as_trained, abs=1e-5)
    assert min(point.score.mean for point in found.curve) <= as_trained + 1e-6
    assert found.alpha == model[1].example_weight == (1.0 if found.is_noise else found.best)


def test_a_table_of_the_curve_can_be_written(dependent: nn.Module, tmp_path: Path) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER)
    found.to_csv(tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["alpha"]) for row in rows if row["data"] == "all"] == [point.alpha for point in found.curve]
    assert len(rows) == len(found.curve) + len(found.grid)
    assert list(tmp_path.iterdir()) == [tmp_path / "curve.csv"]


def test_a_notebook_gets_the_verdict_and_the_curve(dependent: nn.Module) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER)
    html = found._repr_html_()
    assert html.startswith(f"<p>{str(found).splitlines()[-1]}</p><table>")
    assert html.count("<tr>") == 1 + len(found.curve)


def test_the_curve_can_be_drawn(dependent: nn.Module) -> None:
    found = renorm.weigh(copy.deepcopy(dependent), LOADER, "cross_entropy")
    (axes,) = found.plot().axes
    line = next(line for line in axes.lines if line.get_label().startswith("all"))
    assert line.get_xydata().tolist() == [[point.alpha, point.score.mean] for point in found.curve]
    assert axes.get_ylabel() == "cross-entropy"


def test_the_bar_is_shown_only_to_somebody_who_watches(
    independent: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    renorm.weigh(copy.deepcopy(independent), LOADER)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    renorm.weigh(copy.deepcopy(independent), LOADER)
    assert "weighing" in capsys.readouterr().err
    renorm.weigh(copy.deepcopy(independent), LOADER, show_progress=False)
    assert capsys.readouterr().err == ""


def test_a_weight_for_each_layer_is_that_of_a_sweep_by_hand(dependent: nn.Module) -> None:
    """EvalNorm's rule, with the weights that were found."""
    model = copy.deepcopy(dependent)
    found = renorm.weigh(model, LOADER, "cross_entropy", per="layer")
    assert list(found.alphas) == ["1", "5"]
    with torch.no_grad():
        for alphas in (dict(found.alphas), {"1": 0.25, "5": 0.0}, {"1": 0.0, "5": 0.6}):
            for name, alpha in alphas.items():
                model[int(name)].example_weight = alpha
            torch.testing.assert_close(
                model.eval()(X[HELD_OUT]), scores_by_hand(dependent, alphas, X[HELD_OUT]), rtol=1e-5, atol=1e-5
            )


def in_a_light_each() -> list[Tensor]:
    """Batches as `trained(dependent=True)` had them, without labels."""
    generator = torch.Generator().manual_seed(2)
    return [x * 4 ** torch.randn((), generator=generator) for x in X[HELD_OUT].split(50)]


def by_hand_in_training_mode(model: nn.Module, x: Tensor) -> Tensor:
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            x = nn.functional.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)
        else:
            x = module(x)
    return x


def test_without_labels_the_right_class_is_that_of_training_mode(dependent: nn.Module) -> None:
    batches = in_a_light_each()
    found = renorm.weigh(copy.deepcopy(dependent), batches, "training_mode")
    assert found.metric == "training_mode"
    with torch.no_grad():
        classes = [by_hand_in_training_mode(dependent, x).argmax(1) for x in batches]
        for point in found.curve:
            scores = [
                nn.functional.cross_entropy(scores_by_hand(dependent, point.alpha, x), y, reduction="none").double()
                for x, y in zip(batches, classes, strict=True)
            ]
            assert point.score.mean == pytest.approx(torch.cat(scores).mean().item(), rel=1e-4)
            if point.alpha == 0:  # an example's class depends on its batch, so whole batches are drawn
                sizes = torch.tensor([len(x) for x in batches]).double()
                by_batch = bootstrap(torch.stack([score.sum() for score in scores]), sizes).interval
                assert found.before.low == pytest.approx(by_batch.low, rel=1e-4)
                assert found.before.high == pytest.approx(by_batch.high, rel=1e-4)


def test_accuracy_is_won_back_without_labels(dependent: nn.Module) -> None:
    x, accuracies = in_their_own_light(X[HELD_OUT]), []
    for metric in (None, "cross_entropy", "training_mode"):
        model = copy.deepcopy(dependent)
        if metric == "training_mode":
            assert renorm.weigh(model, in_a_light_each(), metric).gain.low > 0
        elif metric is not None:
            renorm.weigh(model, DataLoader(TensorDataset(x, Y[HELD_OUT]), 50), metric)
        with torch.no_grad():
            accuracies.append((model.eval()(x).argmax(1) == Y[HELD_OUT]).double().mean().item())
    before, labelled, unlabelled = accuracies
    assert labelled > before + 0.02
    assert unlabelled - before > 0.8 * (labelled - before)


@pytest.mark.parametrize(
    "form", [lambda x: (x,), lambda x: [x, "nothing"], lambda x: {"input": x}, lambda x: {"input": x, "labels": None}]
)
def test_batches_without_a_target_are_taken_in_any_form(dependent: nn.Module, form: Any) -> None:
    batches = in_a_light_each()[:4]
    expected = renorm.weigh(copy.deepcopy(dependent), batches, "training_mode")
    assert renorm.weigh(copy.deepcopy(dependent), [form(x) for x in batches], "training_mode") == expected


def test_a_batch_size_is_how_many_examples_share_statistics(dependent: nn.Module) -> None:
    x = X[HELD_OUT][:200]
    small = renorm.weigh(copy.deepcopy(dependent), x.split(2), "training_mode")
    model = copy.deepcopy(dependent)
    large = renorm.weigh(model, x.split(50), "training_mode", batch_size=2)
    assert large.before.mean == pytest.approx(small.before.mean, rel=1e-5)
    assert large.before.mean != renorm.weigh(copy.deepcopy(dependent), x.split(50), "training_mode").before.mean
    assert model[1].examples_per_group is None  # as it was


def test_layers_that_say_how_many_examples_share_statistics_are_asked(dependent: nn.Module) -> None:
    x = X[HELD_OUT][:200].split(50)
    ghost = renorm.convert(
        copy.deepcopy(dependent), renorm.GhostBatchNorm, examples_per_group=10, report=lambda report: None
    )
    expected = renorm.weigh(copy.deepcopy(dependent), x, "training_mode", batch_size=10)
    assert renorm.weigh(ghost, x, "training_mode").before.mean == pytest.approx(expected.before.mean, rel=1e-5)


def test_training_mode_moves_no_statistics_and_forwards_a_batch_twice_a_pass(dependent: nn.Module) -> None:
    model, examples = copy.deepcopy(dependent).train(), 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal examples
        examples += len(inputs[0])

    model[0].register_forward_pre_hook(count)
    state = copy.deepcopy(model.state_dict())
    found = renorm.weigh(model, X[HELD_OUT].split(20), "training_mode")
    assert found.passes <= 8
    assert examples / len(HELD_OUT) == pytest.approx(2 * found.passes)
    assert all(module.training for module in model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_where_training_mode_agrees_already_the_model_stays_as_it_was(independent: nn.Module) -> None:
    model = copy.deepcopy(independent)
    assert renorm.weigh(model, X[HELD_OUT].split(50), "training_mode").is_noise
    assert model[1].example_weight == 0


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_outputs_without_classes_have_none_in_training_mode(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match="training_mode is of logits"):
        renorm.weigh(model, [torch.randn(4, 1)], "training_mode", forward=lambda model, x: model(x).reshape(shape))


def test_pixels_have_classes_in_training_mode() -> None:
    model = Segmenter().net
    found = renorm.weigh(model, [x for x, _ in SCENES], "training_mode", per="layer")
    assert 0 <= model[1].example_weight <= 1
    assert found.before.mean > 0


@pytest.mark.parametrize("converted", [False, True])
def test_a_rehearsal_in_training_mode_changes_nothing(dependent: nn.Module, converted: bool) -> None:
    model = copy.deepcopy(dependent).train()
    if converted:
        model = renorm.convert(model, renorm.BatchNorm, report=lambda report: None)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    rehearse(model, in_a_light_each(), metric="training_mode", batch_size=10)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="batch_size must be at most"):
        rehearse(model, in_a_light_each(), metric="training_mode", batch_size=100)


def test_a_single_batch_in_training_mode_is_not_taken_for_certain(dependent: nn.Module) -> None:
    before = renorm.weigh(copy.deepcopy(dependent), [X[HELD_OUT]], "training_mode").before
    assert before.low < before.mean < before.high

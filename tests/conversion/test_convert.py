"""convert and to_batchnorm: what is kept, what is replaced, what is refused."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import renorm
from renorm import ConversionReport, convert, to_batchnorm

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "BatchNorm": (renorm.BatchNorm, {}),
    "BatchRenorm": (renorm.BatchRenorm, {}),
    "GhostBatchNorm": (renorm.GhostBatchNorm, {"examples_per_group": 2}),
    "BatchGroupNorm": (renorm.BatchGroupNorm, {"num_groups": 4}),
}
families = pytest.mark.parametrize(("to", "options"), FAMILIES.values(), ids=FAMILIES)


def silent(report: ConversionReport) -> None:
    """Where a test does not look at the report."""


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8),
    )  # fmt: skip
    return trained(model)


def trained(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 2.0)
                module.num_batches_tracked.fill_(1234)
    return model


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 9, 9)


# --- what becomes of the layers ---------------------------------------------------------------------------------


@families
def test_the_family_picks_the_dimension_of_what_it_replaces(to: Any, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm2d(8), nn.BatchNorm3d(8), nn.SyncBatchNorm(8))
    convert(model, to, **options)
    names = [type(layer).__name__ for layer in model]
    assert names == [to.__name__ + dimension for dimension in ("1d", "2d", "3d", "")]


@families
def test_evaluation_is_bit_equal_after_convert(to: Any, options: dict[str, Any]) -> None:
    model = network().eval()
    x = images()
    expected = model(x)
    options = options | {"num_groups": 8} if to is renorm.BatchGroupNorm else options
    assert torch.equal(convert(model, to, **options)(x), expected)


@families
def test_parameters_and_buffers_are_the_very_same_objects(to: Any, options: dict[str, Any]) -> None:
    model = network()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    keys = list(model.state_dict())
    convert(model, to, **options)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for name, buffer in buffers.items():
        assert model.get_buffer(name) is buffer
    assert list(model.state_dict()) == keys


def test_an_optimizer_made_before_still_trains() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, renorm.BatchRenorm)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(images()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if "weight" in name:
            assert not torch.equal(parameter, before[name]), name


def test_eps_comes_from_the_replaced_layer_and_the_rest_from_the_target() -> None:
    model = convert(network(), renorm.BatchRenorm)
    assert [model[1].eps, model[3][1].eps] == [1e-3, 1e-5]
    assert (model[1].momentum, model[1].tracking, model[1].limits) == (0.01, "std", renorm.Limits())


def test_options_go_to_every_layer() -> None:
    limits = renorm.Limits.over(1000)
    model = convert(
        network(), renorm.BatchRenorm, limits=limits, momentum=0.05, eps=1e-2, examples_per_group=2,
        channels_per_group=2, tracking="total", example_weight=0.1,
    )  # fmt: skip
    for layer in (model[1], model[3][1], model[7]):
        assert (layer.limits, layer.momentum, layer.eps, layer.tracking) == (limits, 0.05, 1e-2, "total")
        assert (layer.examples_per_group, layer.channels_per_group, layer.example_weight) == (2, 2, 0.1)


def test_a_single_class_replaces_layers_of_its_dimension_only() -> None:
    model = network()
    with pytest.warns(UserWarning, match="7: BatchNorm1d left as it is, BatchRenorm2d does not take 1d input"):
        convert(model, renorm.BatchRenorm2d)
    assert isinstance(model[1], renorm.BatchRenorm2d)
    assert type(model[7]) is nn.BatchNorm1d


def test_the_root_may_be_replaced() -> None:
    plain = trained(nn.BatchNorm2d(8))
    weight = plain.weight
    layer = convert(plain, renorm.BatchRenorm)
    assert type(layer) is renorm.BatchRenorm2d
    assert layer.weight is weight
    back = to_batchnorm(layer)
    assert type(back) is nn.BatchNorm2d
    assert back.weight is weight


def test_a_model_that_is_no_norm_is_returned_itself() -> None:
    model = network()
    assert convert(model, renorm.BatchRenorm) is model
    assert to_batchnorm(model) is model


def test_shared_layers_stay_shared() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": nn.Sequential(shared), "c": shared})
    reports: list[ConversionReport] = []
    convert(model, renorm.BatchRenorm, report=reports.append)
    assert model["a"][1] is model["b"][0] is model["c"]
    assert isinstance(model["c"], renorm.BatchRenorm1d)
    assert len(reports[0].replaced) == 1
    to_batchnorm(model)
    assert model["a"][1] is model["b"][0] is model["c"]
    assert type(model["c"]) is nn.BatchNorm1d


def test_layers_with_shared_parameters_keep_them_shared() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    convert(model, renorm.BatchRenorm)
    assert model[0].weight is model[1].weight
    assert model[0].running_mean is not model[1].running_mean


@pytest.mark.parametrize(
    "kind", [{"affine": False}, {"bias": None}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_parameters_and_buffers_that_are_missing_stay_missing(kind: dict[str, Any]) -> None:
    without_bias = "bias" in kind  # for which an older torch has no argument
    plain = nn.BatchNorm2d(4, **({} if without_bias else kind))
    if without_bias:
        plain.bias = None
    keys, x = list(plain.state_dict()), torch.randn(5, 4, 3, 3)
    expected = copy.deepcopy(plain).eval()(x)
    layer = convert(copy.deepcopy(plain), renorm.BatchNorm)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer.eval()(x), expected) or not plain.track_running_stats
    torch.testing.assert_close(layer(x), expected)
    assert layer.affine == plain.affine
    assert list(to_batchnorm(layer).state_dict()) == keys


@families
def test_a_layer_that_no_longer_tracks_keeps_its_buffers_and_evaluates_by_them(
    to: Any, options: dict[str, Any]
) -> None:
    model = trained(nn.Sequential(nn.BatchNorm2d(4)))
    model[0].track_running_stats = False
    buffers, x = dict(model[0].named_buffers()), torch.randn(6, 4, 3, 3)
    expected = model.eval()(x)
    for surgery in (lambda: convert(model, to, **options), lambda: to_batchnorm(model)):
        layer = surgery()[0]
        assert layer.track_running_stats is False
        assert all(layer.get_buffer(name) is buffer for name, buffer in buffers.items())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        model.train()(x)
        assert all(torch.equal(layer.get_buffer(name), buffer) for name, buffer in before.items())
        assert torch.equal(model.eval()(x), expected)


def test_modes_and_requires_grad_are_kept() -> None:
    model = network()
    model[1].eval()
    model[3][1].weight.requires_grad_(False)
    convert(model, renorm.BatchRenorm)
    assert [model[1].training, model[3][1].training, model.training] == [False, True, True]
    assert [model[3][1].weight.requires_grad, model[3][1].bias.requires_grad] == [False, True]
    to_batchnorm(model)
    assert [model[1].training, model[3][1].training] == [False, True]
    assert model[3][1].weight.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_is_kept_and_half_statistics_become_float32(dtype: torch.dtype) -> None:
    plain = trained(nn.BatchNorm2d(8)).to(dtype).eval()
    x = torch.randn(4, 8, 3, 3, dtype=dtype)
    expected = plain(x)
    statistics = plain.running_var
    layer = convert(plain, renorm.BatchRenorm)
    assert layer.weight.dtype == dtype
    assert layer.running_var.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(layer.running_var.to(dtype), statistics)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), expected)


def test_a_half_model_converts_and_trains() -> None:
    model = convert(network().bfloat16(), renorm.BatchRenorm, limits=renorm.Limits.constant())
    model(images().bfloat16()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_layers_on_meta_convert() -> None:
    layer = convert(nn.BatchNorm2d(4, device="meta"), renorm.BatchRenorm)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def test_hooks_are_kept() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.BatchNorm1d(4))
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[0].register_forward_hook(lambda module, args, kwargs, out: calls.append("kwargs"), with_kwargs=True)
    convert(model, renorm.BatchRenorm)
    model(torch.randn(5, 4))
    assert calls == ["pre", "forward", "kwargs"]
    handle.remove()
    model(torch.randn(5, 4))
    assert calls[3:] == ["pre", "kwargs"]


def test_full_backward_hooks_see_the_gradient_of_the_input_after_convert() -> None:
    seen: list[Any] = []
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_input))
    convert(model, renorm.BatchRenorm)
    x = torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()
    assert len(seen) == 1
    assert [gradient.shape for gradient in seen[0]] == [x.shape]
    assert torch.equal(seen[0][0], x.grad)


def test_hooks_that_are_always_called_stay_so() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    convert(model, renorm.BatchRenorm)
    with pytest.raises(ValueError, match="num_features"):
        model(torch.randn(5, 3))
    assert calls == ["always"]


# --- steps --------------------------------------------------------------------------------------------------------


def test_steps_are_kept_unless_they_start_over() -> None:
    assert convert(trained(nn.BatchNorm2d(4)), renorm.BatchRenorm).num_batches_tracked == 1234
    plain = trained(nn.BatchNorm2d(4))
    mean = plain.running_mean.clone()
    layer = convert(plain, renorm.BatchRenorm, steps=0)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, mean)


def test_a_cumulative_average_cannot_start_its_steps_over() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"cannot convert '1': steps=0 .*momentum=None"):
        convert(model, renorm.BatchRenorm, steps=0, momentum=None)
    assert convert(network(), renorm.BatchRenorm, momentum=None)[1].momentum is None


@pytest.mark.parametrize("steps", ["reset", 5, None])
def test_other_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"steps must be 'keep' or 0, got {steps!r}"):
        convert(network(), renorm.BatchRenorm, steps=steps)


# --- selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "replaced"),
    [
        (lambda name, module: name == "3.1", ["3.1"]),
        (lambda name, module: isinstance(module, nn.BatchNorm1d), ["7"]),
        (r"^3\.", ["3.1"]),
        (r"^\d$", ["1", "7"]),
        (re.compile("1"), ["1", "3.1"]),
    ],
)
def test_where_selects_by_function_or_regular_expression(where: Any, replaced: list[str]) -> None:
    reports: list[ConversionReport] = []
    model = convert(network(), renorm.BatchRenorm, where=where, report=reports.append)
    assert [row.name for row in reports[0].replaced] == replaced
    assert [name for name, module in model.named_modules() if isinstance(module, renorm.Norm)] == replaced


def test_nothing_to_replace_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no batch norm layer"):
        convert(nn.Linear(3, 3), renorm.BatchRenorm)
    with pytest.warns(UserWarning, match="no batch norm layer"):
        convert(network(), renorm.BatchRenorm, where="nowhere")


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_lists_every_layer_and_every_momentum_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    model[7].momentum = 0.01
    reports: list[ConversionReport] = []
    convert(model, renorm.BatchRenorm, report=reports.append)
    rows = reports[0].replaced
    assert [(row.name, row.before, row.after) for row in rows] == [
        ("1", "BatchNorm2d", "BatchRenorm2d"),
        ("3.1", "BatchNorm2d", "BatchRenorm2d"),
        ("7", "BatchNorm1d", "BatchRenorm1d"),
    ]
    assert [row.momentum for row in rows] == [(0.1, 0.01), (0.1, 0.01), (0.01, 0.01)]
    text = str(reports[0])
    assert "3 layers replaced" in text
    assert text.count("momentum 0.1 -> 0.01") == 2
    convert(network(), renorm.BatchRenorm, report=print)
    assert "1: BatchNorm2d -> BatchRenorm2d, momentum 0.1 -> 0.01" in capsys.readouterr().out


def test_the_report_goes_to_the_log_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="renorm.convert"):
        convert(network(), renorm.BatchRenorm)
    assert "3 layers replaced" in caplog.text


@pytest.mark.parametrize(
    ("options", "sync", "note"),
    [
        ({}, "batch", "sync='batch'"),
        ({"sync": "running"}, "running", "sync='running'"),
        ({"examples_per_group": 2}, "running", "sync='running'"),
        ({"sync": None}, None, "no longer synchronized"),
    ],
    ids=str,
)
def test_a_synchronized_layer_stays_so_unless_told_otherwise(
    options: dict[str, Any], sync: str | None, note: str
) -> None:
    reports: list[ConversionReport] = []
    layer = convert(nn.SyncBatchNorm(4), renorm.BatchRenorm, report=reports.append, **options)
    assert layer.sync == sync
    assert note in str(reports[0])
    assert layer(torch.randn(5, 4, 3)).shape == (5, 4, 3)


# --- group norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_becomes_batch_group_norm(affine: bool) -> None:
    plain = nn.GroupNorm(4, 8, eps=1e-3, affine=affine)
    weight = plain.weight
    x = torch.randn(4, 8, 3, 3)
    expected = plain(x)
    layer = convert(plain, renorm.BatchGroupNorm, examples_per_group=1)
    assert isinstance(layer, renorm.BatchGroupNorm)
    assert (layer.num_groups, layer.eps, layer.affine) == (4, 1e-3, affine)
    assert layer.weight is weight
    torch.testing.assert_close(layer(x), expected)


def test_group_norm_is_left_alone_by_other_targets() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.InstanceNorm2d(4))
    convert(model, renorm.BatchRenorm)
    assert [type(layer).__name__ for layer in model] == ["GroupNorm", "BatchRenorm2d", "LayerNorm", "InstanceNorm2d"]


def test_batch_norm_becomes_batch_group_norm_with_a_number_of_groups() -> None:
    model = convert(network(), renorm.BatchGroupNorm, num_groups=2, examples_per_group=4)
    assert [model[1].channels_per_group, model[1].examples_per_group] == [4, 4]
    with pytest.raises(TypeError, match=r"cannot convert '1': BatchGroupNorm2d needs num_groups: give convert"):
        convert(network(), renorm.BatchGroupNorm)


# --- passed over --------------------------------------------------------------------------------------------------


class Halved(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_unknown_subclasses_are_passed_over_with_a_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Halved(4))
    reports: list[ConversionReport] = []
    with pytest.warns(UserWarning, match="1: Halved left as it is, its class is not known"):
        convert(model, renorm.BatchRenorm, report=reports.append)
    assert type(model[1]) is Halved
    assert isinstance(model[0], renorm.BatchRenorm2d)
    assert [(row.name, row.kind) for row in reports[0].passed_over] == [("1", "Halved")]


def test_frozen_batch_norm_is_passed_over_with_a_warning() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(nn.BatchNorm2d(4), ops.FrozenBatchNorm2d(4))
    with pytest.warns(UserWarning, match="1: FrozenBatchNorm2d left as it is"):
        convert(model, renorm.BatchRenorm)
    assert isinstance(model[1], ops.FrozenBatchNorm2d)


def test_lazy_layers_are_passed_over_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="LazyBatchNorm2d"):
        model = convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(4)), renorm.BatchRenorm)
    assert isinstance(model[1], renorm.BatchRenorm2d)


def test_layers_of_ours_are_passed_over_and_say_how() -> None:
    model = convert(network(), renorm.BatchRenorm)
    layer = model[1]
    with pytest.warns(UserWarning, match="to_batchnorm first"):
        convert(model, renorm.GhostBatchNorm, examples_per_group=2)
    assert model[1] is layer


def test_selected_away_layers_raise_no_warning() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Halved(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, renorm.BatchRenorm, where="0")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [nn.BatchNorm2d, "BatchRenorm", renorm.BatchRenorm2d(4), None])
def test_a_target_that_is_no_layer_class_is_refused(to: Any) -> None:
    with pytest.raises(TypeError, match="to must be a layer class of renorm"):
        convert(network(), to)


@pytest.mark.parametrize("option", ["num_features", "affine", "bias", "track_running_stats", "device", "dtype"])
def test_options_that_come_from_the_replaced_layer_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} comes from the replaced layer.*got 1"):
        convert(network(), renorm.BatchRenorm, **{option: 1})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels_per_group": 4}, ValueError, "cannot convert '3': channels_per_group must divide the 6 channels"),
        ({"tracking": "no"}, ValueError, "cannot convert '1': tracking must be one of"),
        ({"no_such_option": 1}, TypeError, "^BatchRenorm has no option 'no_such_option'; it has eps, momentum, limits"),
        ({"limit": 1}, TypeError, r"BatchRenorm has no option 'limit' \(did you mean limits\?\)"),
        ({"total_steps": 9}, TypeError, r"did you mean limits=renorm.Limits.over\(total_steps\)\?"),
        ({"rmax": 2}, TypeError, r"did you mean limits=renorm.Limits\(r_max=...\)\?"),
        ({"step": 0}, TypeError, r"BatchRenorm has no option 'step' \(did you mean steps\?\)"),
    ],
)
def test_an_error_names_the_layer_and_leaves_the_model_untouched(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6))
    before = list(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        convert(model, renorm.BatchRenorm, **options)
    assert all(one is other for one, other in zip(model, before, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_limits_for_a_layer_without_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="cannot convert '0': limits"):
        convert(model, renorm.BatchRenorm)
    convert(model, renorm.BatchNorm)


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_is_refused() -> None:
    model = nn.parallel.DistributedDataParallel(network())
    for surgery in (lambda m: convert(m, renorm.BatchRenorm), to_batchnorm):
        with pytest.raises(ValueError, match="before wrapping in DistributedDataParallel"):
            surgery(model)
        with pytest.raises(ValueError, match="DistributedDataParallel at 'part'"):
            surgery(nn.ModuleDict({"part": model}))
    assert type(model.module[1]) is nn.BatchNorm2d


@pytest.mark.usefixtures("process_group")
def test_a_converted_model_trains_in_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(convert(network(), renorm.BatchRenorm))
    for _ in range(2):
        model(images()).square().sum().backward()
    assert model.module[1].num_batches_tracked == 1236


def test_a_compiled_model_is_refused() -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        convert(compiled, renorm.BatchRenorm)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        to_batchnorm(compiled)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_model_in_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel"):
        convert(nn.DataParallel(network()), renorm.BatchRenorm)


# --- and back -----------------------------------------------------------------------------------------------------


@families
def test_back_to_batch_norm_is_exactly_equal_at_evaluation(to: Any, options: dict[str, Any]) -> None:
    model = convert(network(), to, **options)
    for _ in range(3):
        model(images())
    model.eval()
    x = images()
    expected, parameters = model(x), [id(parameter) for parameter in model.parameters()]
    plain = to_batchnorm(model)
    assert torch.equal(plain(x), expected)
    assert [id(parameter) for parameter in plain.parameters()] == parameters
    assert not any(isinstance(module, renorm.Norm) for module in plain.modules())
    assert [type(plain[i]) for i in (1, 7)] == [nn.BatchNorm2d, nn.BatchNorm1d]


def test_there_and_back_is_the_same_model() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = repr(model)
    to_batchnorm(convert(model, renorm.BatchNorm))
    assert repr(model) == text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_channel_groups_write_their_pooled_statistics_into_every_channel() -> None:
    layer = renorm.BatchGroupNorm2d(6, 2)
    layer(torch.randn(8, 6, 3, 3) * 2 + torch.arange(6.0).view(6, 1, 1))
    means, variances = layer.running_mean.view(2, 3), layer.running_var.view(2, 3)
    x = torch.randn(4, 6, 3, 3)
    expected = layer.eval()(x)
    plain = to_batchnorm(layer)
    torch.testing.assert_close(plain.running_mean, means.mean(1).repeat_interleave(3))
    torch.testing.assert_close(plain.running_var, (variances.mean(1) + means.var(1, correction=0)).repeat_interleave(3))
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: renorm.BatchNorm2d(4, example_weight=0.25), "1: example_weight=0.25"),
        (lambda: renorm.BatchNorm2d(4, act="relu"), "1: act='relu'"),
        (lambda: renorm.GhostBatchNorm2d(4, 2, track_running_stats=False), "1: .*track_running_stats=False"),
        (lambda: renorm.Norm(4, channels_per_group=2, track_running_stats=False), "1: .*track_running_stats=False"),
    ],
)
def test_what_batch_norm_cannot_do_is_refused_by_name_and_reason(make: Any, reason: str) -> None:
    model = nn.Sequential(renorm.BatchRenorm2d(4), make())
    layers = list(model)
    with pytest.raises(ValueError, match=f"(?s)nn.BatchNorm cannot do.*{reason}"):
        to_batchnorm(model)
    assert all(one is other for one, other in zip(model, layers, strict=True))


def test_every_obstacle_is_named_at_once() -> None:
    model = nn.Sequential(renorm.BatchNorm2d(4, example_weight=0.5), renorm.BatchNorm2d(4, act="silu"))
    with pytest.raises(ValueError, match=r"(?s)0: example_weight.*1: act"):
        to_batchnorm(model)


def test_without_running_statistics_it_goes_back_if_it_was_batch_norm() -> None:
    layer = renorm.BatchNorm2d(4, track_running_stats=False)
    x = torch.randn(5, 4, 3, 3)
    expected = layer(x)
    plain = to_batchnorm(layer)
    assert plain.track_running_stats is False
    torch.testing.assert_close(plain(x), expected)


def test_layers_of_any_dimension_go_back_to_one_of_any_dimension() -> None:
    layer = trained_norm()
    x = torch.randn(5, 4, 3)
    expected = layer.eval()(x)
    plain = to_batchnorm(layer)
    assert type(plain) is nn.SyncBatchNorm
    assert torch.equal(plain(x), expected)


def trained_norm() -> renorm.Norm:
    layer = renorm.BatchRenorm(4)
    layer(torch.randn(8, 4, 3) + 1)
    return layer


def test_statistics_rounded_to_half_precision_are_a_warning() -> None:
    layer = renorm.BatchRenorm2d(4).half()
    with pytest.warns(UserWarning, match=r"rounded to .*float16"):
        plain = to_batchnorm(nn.Sequential(layer))
    assert plain[0].running_var.dtype == torch.float16
    assert plain.eval()(torch.randn(2, 4, 3, 3).half()).dtype == torch.float16


def test_hooks_and_modes_come_back_too() -> None:
    calls: list[int] = []
    model = nn.Sequential(renorm.BatchRenorm1d(4)).eval()
    model[0].register_forward_hook(lambda *_: calls.append(1))
    to_batchnorm(model)
    assert model[0].training is False
    model(torch.randn(5, 4))
    assert calls == [1]


# --- timm's layer with an activation inside -------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_layers() -> Any:
    return pytest.importorskip("timm.layers")


@families
def test_timm_s_norm_keeps_its_activation_and_drop(timm_layers: Any, to: Any, options: dict[str, Any]) -> None:
    plain = trained(timm_layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)).eval()
    act, drop, weight = plain.act, plain.drop, plain.weight
    keys, x = list(plain.state_dict()), torch.randn(4, 8, 3, 3)
    expected = plain(x)
    options = options | {"num_groups": 8} if to is renorm.BatchGroupNorm else options
    layer = convert(plain, to, **options)
    assert isinstance(layer, getattr(renorm, to.__name__ + "2d"))
    assert layer.act is act
    assert layer.drop is drop
    assert layer.weight is weight
    assert list(layer.state_dict()) == keys
    torch.testing.assert_close(layer(x), expected)
    back = to_batchnorm(layer)
    assert type(back) is timm_layers.BatchNormAct2d
    assert back.act is act
    assert back.drop is drop
    assert torch.equal(back(x), expected)


def test_timm_s_norm_trains_with_its_activation(timm_layers: Any) -> None:
    layer = convert(timm_layers.BatchNormAct2d(4), renorm.BatchRenorm, limits=renorm.Limits.constant())
    x = torch.randn(5, 4, 3, 3)
    bare = renorm.BatchRenorm2d(4, limits=renorm.Limits.constant())
    torch.testing.assert_close(layer(x), torch.relu(bare(x)))


def test_timm_s_subclasses_are_passed_over(timm_layers: Any) -> None:
    class Mine(timm_layers.BatchNormAct2d):
        pass

    with pytest.warns(UserWarning, match="Mine left as it is"):
        convert(nn.Sequential(Mine(4)), renorm.BatchRenorm)


def test_timm_s_norm_converted_copies_and_pickles(timm_layers: Any) -> None:
    layer = convert(timm_layers.BatchNormAct2d(4), renorm.BatchRenorm).eval()
    x = torch.randn(5, 4, 3, 3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "ReLU" in repr(layer)


@pytest.mark.parametrize(
    ("to", "limits", "momentum"),
    [
        (renorm.BatchRenorm, renorm.Limits(), 0.01),
        (renorm.BatchRenorm, renorm.Limits.over(2_600), 0.03),
        (renorm.BatchRenorm, renorm.Limits.over(100), 0.1),
        (renorm.BatchRenorm, renorm.Limits.constant(), 0.01),
        (renorm.BatchNorm, renorm.Limits.over(2_600), 0.1),
    ],
)
def test_momentum_that_is_not_given_suits_the_length_of_the_plain_phase(
    to: type[renorm.Norm], limits: renorm.Limits, momentum: float
):
    model = renorm.convert(nn.Sequential(nn.BatchNorm2d(3)), to, limits=limits)
    assert model[0].momentum == momentum
    given = renorm.convert(nn.Sequential(nn.BatchNorm2d(3)), to, limits=limits, momentum=0.02)
    assert given[0].momentum == 0.02


@pytest.mark.parametrize("limits", [400, (3, 5), "over", renorm.Limits.constant])
def test_limits_of_another_type_are_refused_and_the_model_is_as_it_was(limits: object):
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match=r"cannot convert '0': limits must be renorm.Limits, as Limits.over"):
        renorm.convert(model, renorm.BatchRenorm, limits=limits)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_model_with_our_layers_is_fused_without_a_warning() -> None:
    model = nn.Sequential(renorm.BatchRenorm1d(3), nn.ReLU())
    reports: list[renorm.ConversionReport] = []
    renorm.convert(model, renorm.Norm, where=lambda *_: False, fuse=True, report=reports.append)
    assert len(reports[0].fused) == 1
    assert not reports[0].replaced

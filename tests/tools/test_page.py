"""Every row of the page's table is a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "tools.md"

# What a row begins with, and the tests of it.
ROWS: dict[str, tuple[str, ...]] = {
    "Lightning `BaseFinetuning`, `freeze(train_bn=False)`": (
        "tools/test_lightning.py::test_a_frozen_batch_norm_does_not_move",
    ),
    "Lightning `BaseFinetuning`, `freeze(train_bn=True)`": (
        "tools/test_lightning.py::test_batch_norm_trains_on_in_a_body_that_is_frozen_without_it",
    ),
    "`layer.eval()` or `layer.momentum = 0`": (
        "tools/test_freezing.py::test_the_usual_loop_over_batch_norms_freezes",
        "tools/test_freezing.py::test_a_momentum_of_zero_freezes",
    ),
    "timm `freeze_batch_norm_2d`": (
        "tools/test_freezing.py::test_timm_freezes_and_unfreezes_batch_norm_of_ours",
        "tools/test_freezing.py::test_timm_does_not_take_the_correction_away",
        "tools/test_freezing.py::test_what_the_message_says_is_the_same",
        "tools/test_freezing.py::test_timm_freezes_parameters_alone",
    ),
    "torch `update_bn`": (
        "tools/test_statistics.py::test_statistics_are_those_of_estimate",
        "tools/test_statistics.py::test_afterwards_the_layers_are_as_they_were",
        "tools/test_statistics.py::test_a_cumulative_average_is_better_estimated",
    ),
    "fvcore `update_bn_stats`": ("tools/test_statistics.py::test_statistics_are_those_of_estimate",),
    "Lightning `StochasticWeightAveraging`": (
        "tools/test_lightning.py::test_averaged_weights_get_their_own_statistics",
    ),
    "an average by hand": ("test_state.py::test_steps_are_counted_in_whatever_dtype_others_leave_them",),
    "torch `AveragedModel`": ("tools/test_averages.py::test_averages_are_those_of_torch_s_layers",),
    "Lightning `EMAWeightAveraging`": (
        "integrations/test_lightning.py::test_lightning_averages_the_statistics_with_the_weights",
    ),
    "transformers `from_pretrained`": (
        "tools/test_fresh.py::test_a_new_layer_of_a_head_is_fresh",
        "tools/test_fresh.py::test_layers_without_a_dimension_are_no_more_fresh_than_sync_batch_norm",
        "tools/test_fresh.py::test_a_model_may_say_how_layers_without_a_dimension_begin",
    ),
    "accelerate `prepare`": ("tools/test_parallel.py::test_accelerate_trains_and_restores_the_same",),
    "accelerate `init_empty_weights`": ("tools/test_fresh.py::test_accelerate_fills_empty_weights_from_safetensors",),
    "`model.type(torch.FloatTensor)`": ("test_state.py::test_steps_stay_integers_where_a_layer_has_its_say",),
    "torch `to_empty`": (
        "tools/test_fresh.py::test_memory_made_by_to_empty_counts_nothing",
        "tools/test_fresh.py::test_a_state_dict_is_assigned_to_a_layer_without_memory",
    ),
    "safetensors": ("tools/test_fresh.py::test_safetensors_restores_statistics_and_step",),
    "`torch.save` of a whole model": ("tools/test_replacing.py::test_a_model_is_pickled_whole",),
    "ultralytics' trainer": ("tools/test_optimizers.py::test_ultralytics_decays_no_gamma",),
    "timm `param_groups_weight_decay`": (
        "tools/test_optimizers.py::test_timm_decays_no_gamma",
        "tools/test_optimizers.py::test_timm_s_optimizers_decay_no_gamma",
    ),
    "torchvision `split_normalization_params`": (
        "tools/test_optimizers.py::test_torchvision_tells_norms_from_the_rest",
    ),
    "a recipe by class name": ("tools/test_optimizers.py::test_a_recipe_by_class_name_takes_another_name",),
    "torch-pruning": (
        "tools/test_pruning.py::test_channels_are_taken_out_as_of_torch_s_layers",
        "tools/test_pruning.py::test_channels_that_share_statistics_are_not_taken_apart",
    ),
    "`torch.nn.utils.prune`": (
        "tools/test_pruning.py::test_torch_s_pruning_of_gamma_is_that_of_torch_s_layer",
        "tools/test_pruning.py::test_torch_s_parametrizations_of_gamma_are_used",
    ),
    "PEFT LoRA": (
        "tools/test_peft.py::test_adapters_train_the_same_and_statistics_move_the_same",
        "tools/test_peft.py::test_an_adapter_beside_the_layers_leaves_their_statistics_out_as_of_torch_s",
    ),
    "PEFT `modules_to_save`": ("tools/test_peft.py::test_an_adapter_that_holds_the_layers_saves_their_statistics",),
    "TENT": (
        "tools/test_adaptation.py::test_tent_adapts_as_it_does_batch_norm",
        "tools/test_adaptation.py::test_without_running_statistics_evaluation_goes_by_the_batch_too",
    ),
    "training mode with a momentum": (
        "tools/test_adaptation.py::test_statistics_move_to_a_stream_of_other_data",
        "tools/test_adaptation.py::test_batch_statistics_of_batch_renorm_want_the_limits_off",
    ),
    "`torch.func.replace_all_batch_norm_modules_`": (
        "tools/test_adaptation.py::test_torch_func_replaces_running_statistics",
    ),
    "`SyncBatchNorm.convert_sync_batchnorm`": (
        "tools/test_replacing.py::test_torch_s_synchronized_batch_norm_names_what_to_call_instead",
    ),
    "Lightning `Trainer(sync_batchnorm=True)`": (
        "tools/test_lightning.py::test_sync_batchnorm_names_what_to_call_instead",
    ),
    "timm `convert_splitbn_model`": (
        "tools/test_replacing.py::test_timm_s_split_batch_norm_is_refused_before_it_replaces_anything",
    ),
    "torch `fuse_conv_bn_eval`": (
        "tools/test_replacing.py::test_torch_s_folding_is_exact",
        "tools/test_replacing.py::test_torch_s_folding_loses_nothing",
        "tools/test_replacing.py::test_folding_of_a_linear_layer_is_exact",
    ),
    "ultralytics `model.fuse()`": ("tools/test_replacing.py::test_ultralytics_folds_exactly_or_not_at_all",),
    "timm `reparameterize_model`": ("tools/test_replacing.py::test_timm_reparameterizes_exactly_or_not_at_all",),
    "`torch.utils.mkldnn.to_mkldnn`": ("tools/test_replacing.py::test_mkldnn_evaluates_exactly_or_not_at_all",),
    "torch `optimization.fuse`": ("tools/test_replacing.py::test_torch_fx_s_fuse_leaves_the_layers_alone",),
    "torch.ao eager mode": ("tools/test_quantization.py::test_eager_mode_takes_torch_s_layers",),
    "torch.ao graph mode": (
        "tools/test_quantization.py::test_graph_mode_quantizes_what_is_around_the_layers",
        "tools/test_quantization.py::test_graph_mode_trains_around_the_layers",
    ),
    "torchao `quantize_`": ("tools/test_quantization.py::test_torchao_quantizes_what_is_around_the_layers",),
    "`torch.compile`": ("test_compile.py::test_a_model_compiles_in_whole",),
    "`torch.export`, ONNX": (
        "shipping/test_export.py::test_an_exported_model_computes_the_same_for_every_batch_size",
        "shipping/test_onnx.py::test_a_model_computes_the_same_for_every_batch_size",
    ),
    "`torch.jit.trace`": ("test_transforms.py::test_training_mode_can_be_traced",),
    "`torch.jit.script`": ("tools/test_replacing.py::test_torch_script_is_told_to_trace",),
    "`torch.fx.symbolic_trace`": (
        "tools/test_replacing.py::test_torch_fx_sees_one_call_of_each_layer",
        "tools/test_replacing.py::test_torch_fx_keeps_masks_and_residuals",
    ),
    "torchvision `create_feature_extractor`": ("tools/test_replacing.py::test_torchvision_extracts_features",),
    "torch `FlopCounterMode`": ("tools/test_counting.py::test_torch_counts_the_same_operations",),
    "fvcore `FlopCountAnalysis`": ("tools/test_counting.py::test_fvcore_counts_what_is_around_the_layers",),
    "thop": ("tools/test_counting.py::test_thop_counts_the_same_operations",),
    "torchinfo": ("tools/test_counting.py::test_torchinfo_counts_the_same",),
    "captum `DeepLift`": (
        "tools/test_attribution.py::test_deep_lift_sees_what_it_sees_in_torch_s_layers",
        "tools/test_attribution.py::test_deep_lift_does_not_see_an_activation_inside_a_layer",
        "tools/test_attribution.py::test_deep_lift_takes_an_example_weight_for_none",
    ),
    "captum `IntegratedGradients`": ("tools/test_attribution.py::test_gradients_take_everything_into_account",),
    "captum `LRP`": ("tools/test_attribution.py::test_layer_wise_relevance_asks_for_a_rule",),
    "opacus `make_private`": (
        "tools/test_privacy.py::test_layers_with_running_statistics_are_refused_by_name",
        "tools/test_privacy.py::test_layers_without_running_statistics_are_refused_by_name",
    ),
    "opacus `ModuleValidator`": ("tools/test_privacy.py::test_the_validator_fixes_what_to_batchnorm_gives",),
    "DDP": ("tools/test_parallel.py::test_ddp_trains_the_same",),
    "FSDP with mixed precision": ("tools/test_parallel.py::test_fsdp_leaves_batch_norm_in_full_precision",),
    "`fully_shard`": ("distributed/test_synchronize.py::test_sharded_models_keep_their_statistics_in_float32",),
}


def rows() -> list[str]:
    """First cells of the table, but for those that head others."""
    cells = re.findall(r"^\| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [cell for cell in cells if cell != "tool" and not cell.startswith("**")]


def test_every_row_has_tests_and_every_test_a_row() -> None:
    table = rows()
    assert len(table) == len(ROWS)
    assert [cell for cell, beginning in zip(table, ROWS, strict=True) if not cell.startswith(beginning)] == []


@pytest.mark.parametrize("test", sorted({test for tests in ROWS.values() for test in tests}))
def test_the_tests_of_the_rows_are_there(test: str) -> None:
    file, function = test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

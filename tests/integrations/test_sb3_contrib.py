"""sb3-contrib's CrossQ with our layers, against CrossQ with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import renorm
from renorm.modules import norms

pytest.importorskip("sb3_contrib")
import gymnasium
from sb3_contrib import CrossQ
from sb3_contrib.common.torch_layers import BatchRenorm1d as TheirBatchRenorm1d
from sb3_contrib.crossq.policies import MlpPolicy

from renorm.integrations.sb3_contrib import BatchRenormPolicy

WARMUP, BEFORE, STEPS = 4, 20, 12
OURS = {"policy_class": BatchRenormPolicy}


def trained(policy: Any, steps: int = STEPS, **policy_kwargs: Any) -> CrossQ:
    options = {"net_arch": [8, 8], "renorm_warmup_steps": WARMUP} | policy_kwargs
    model = CrossQ(
        policy, "Pendulum-v1", learning_starts=BEFORE, batch_size=16, policy_kwargs=options, seed=0, device="cpu"
    )
    return model.learn(BEFORE + steps)


def layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, (renorm.BatchRenorm1d, TheirBatchRenorm1d))]


def moves(network: nn.Module) -> list[int]:
    return [int(getattr(layer, "num_batches_tracked", getattr(layer, "steps", -1))) for layer in layers(network)]


@pytest.fixture(scope="module")
def ours() -> CrossQ:
    return trained(BatchRenormPolicy)


@pytest.fixture(scope="module")
def theirs() -> CrossQ:
    return trained("MlpPolicy")


def test_statistics_move_as_often_as_with_their_layers(ours: CrossQ, theirs: CrossQ) -> None:
    assert moves(ours.actor) == moves(theirs.actor) == [STEPS // 3] * 3
    assert moves(ours.critic) == moves(theirs.critic) == [STEPS] * 6
    assert len(norms(ours.policy)) == 9
    assert not any(layer.training for layer in layers(ours.policy))  # as CrossQ leaves them after a gradient step
    ours.actor.set_bn_training_mode(True)
    assert all(layer.training for layer in layers(ours.actor))


def test_training_starts_from_the_weights_that_theirs_starts_from() -> None:
    ours, theirs = (trained(policy, 0).policy for policy in (BatchRenormPolicy, MlpPolicy))
    expected = renorm.translate_state_dict(theirs.state_dict(), ours)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("steps", [WARMUP, WARMUP + 1])
def test_the_correction_sets_in_with_the_batch_that_theirs_does(steps: int) -> None:
    layer = layers(trained(BatchRenormPolicy, 0).actor)[0]
    theirs = TheirBatchRenorm1d(3, warmup_steps=WARMUP)
    layer.train()
    for other in (layer.num_batches_tracked, theirs.steps):
        other.fill_(steps)
    x = torch.randn(4_000, 3) * 2 + 1
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-3, atol=2e-3)


def test_a_model_is_saved_and_loaded(ours: CrossQ, tmp_path: Path) -> None:
    ours.save(tmp_path / "model")
    loaded = CrossQ.load(tmp_path / "model", env=gymnasium.make("Pendulum-v1"), device="cpu")
    assert type(loaded.policy) is BatchRenormPolicy
    for name, value in ours.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value)
    loaded.learn(BEFORE + 3, reset_num_timesteps=False)
    assert moves(loaded.critic)[0] > STEPS


def test_what_their_policy_has_saved_evaluates_the_same_and_trains_on(theirs: CrossQ, tmp_path: Path) -> None:
    theirs.save(tmp_path / "model")
    env = gymnasium.make("Pendulum-v1")
    loaded = CrossQ.load(tmp_path / "model", env=env, device="cpu", custom_objects=OURS)
    assert moves(loaded.actor) == moves(theirs.actor)
    assert moves(loaded.critic) == moves(theirs.critic)
    observations, actions = torch.randn(5, 3), torch.rand(5, 1)
    for model in (loaded, theirs):
        model.policy.set_training_mode(False)
    for value, expected in zip(
        (*loaded.critic(observations, actions), loaded.actor.get_action_dist_params(observations)[0]),
        (*theirs.critic(observations, actions), theirs.actor.get_action_dist_params(observations)[0]),
        strict=True,
    ):
        torch.testing.assert_close(value, expected)
    loaded.learn(BEFORE + 3, reset_num_timesteps=False)
    assert all(np.isfinite(p.detach().numpy()).all() for p in loaded.policy.parameters())


def test_a_policy_alone_loads_from_theirs(theirs: CrossQ, tmp_path: Path) -> None:
    theirs.policy.save(tmp_path / "policy")
    loaded = BatchRenormPolicy.load(tmp_path / "policy", device="cpu")
    observation = np.array([1.0, 0.0, 0.5], dtype=np.float32)
    expected = theirs.policy.predict(observation, deterministic=True)[0]
    np.testing.assert_allclose(loaded.predict(observation, deterministic=True)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{"batch_norm": False}, {"net_arch": []}, {"share_features_extractor": True}])
def test_policies_have_the_layers_that_theirs_have(options: dict[str, Any]) -> None:
    ours, theirs = (trained(policy, 0, **options).policy for policy in (BatchRenormPolicy, MlpPolicy))
    assert [layer.num_features for layer in layers(ours)] == [layer.num_features for layer in layers(theirs)]
    assert not any(isinstance(layer, TheirBatchRenorm1d) for layer in layers(ours))

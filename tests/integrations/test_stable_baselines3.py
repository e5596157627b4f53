"""Batch renormalization in Stable-Baselines3's policies."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import renorm

pytest.importorskip("stable_baselines3")
from stable_baselines3 import DQN, PPO, SAC

from renorm.integrations.stable_baselines3 import BatchRenormMlp

LIMITS = renorm.Limits.constant()


class Line(gymnasium.Env[Any, Any]):
    """Reach 0 from a random place; an action is a push."""

    def __init__(self, discrete: bool) -> None:
        self.observation_space = spaces.Box(-10, 10, (3,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.age = self.np_random.normal(3, 2, 3).astype(np.float32), 0
        return self.place, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = self.place + np.float32(np.mean(action)) * 0.1
        self.age += 1
        return self.place, -float(np.abs(self.place).sum()), False, self.age == 10, {}


def policy(**options: Any) -> dict[str, Any]:
    return {
        "features_extractor_class": BatchRenormMlp,
        "features_extractor_kwargs": {"limits": LIMITS, "units": (8, 6), **options},
        "net_arch": [8],
    }


MODELS: dict[str, Any] = {
    "SAC": lambda: SAC("MlpPolicy", Line(False), learning_starts=8, batch_size=8, policy_kwargs=policy(), seed=0),
    "DQN": lambda: DQN(
        "MlpPolicy", Line(True), learning_starts=8, batch_size=8, train_freq=1, target_update_interval=1,
        policy_kwargs=policy(), seed=0,
    ),
    "PPO": lambda: PPO("MlpPolicy", Line(True), n_steps=16, batch_size=8, n_epochs=2, policy_kwargs=policy(), seed=0),
}  # fmt: skip
UPDATES = {"SAC": 24, "DQN": 24, "PPO": 2 * 2 * 2}
FORWARDS = {"SAC": 2, "DQN": 1, "PPO": 1}  # of a network in an update


def layers(model: nn.Module) -> list[renorm.BatchRenorm1d]:
    return [module for module in model.modules() if isinstance(module, renorm.BatchRenorm1d)]


@pytest.mark.parametrize("algorithm", MODELS)
def test_updates_move_the_statistics_and_rollouts_do_not(algorithm: str) -> None:
    model = MODELS[algorithm]()
    model.learn(32)
    trained = {"SAC": lambda: model.critic, "DQN": lambda: model.q_net, "PPO": lambda: model.policy}[algorithm]()
    assert len(layers(trained)) == 3
    assert {int(layer.num_batches_tracked) for layer in layers(trained)} == {UPDATES[algorithm] * FORWARDS[algorithm]}
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    action = model.predict(np.full((1, 3), 3, np.float32), deterministic=True)[0]
    together = model.predict(np.stack([np.full(3, 3), np.full(3, -9)]).astype(np.float32), deterministic=True)[0]
    np.testing.assert_allclose(together[0], action[0], atol=1e-6)
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("algorithm", ["SAC", "DQN"])
def test_target_networks_get_the_statistics_and_do_not_move_them(algorithm: str) -> None:
    model = MODELS[algorithm]()
    model.learn(32)
    networks = (model.critic, model.critic_target) if algorithm == "SAC" else (model.q_net, model.q_net_target)
    for ours, theirs in zip(*map(layers, networks), strict=True):
        tolerance = 0 if algorithm == "SAC" else 0.1  # DQN copies before an update, SAC after it
        torch.testing.assert_close(theirs.running_mean, ours.running_mean, atol=tolerance, rtol=0)
        assert (theirs.running_mean != 0).any()
        assert (theirs.running_var != 1).any()
        assert not theirs.training
        assert theirs.num_batches_tracked == 0


def test_a_policy_that_is_built_can_be_converted() -> None:
    class Mlp(BatchRenormMlp):
        def __init__(self, space: spaces.Space[Any]) -> None:
            super().__init__(space, LIMITS, (6,))
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU())

    model = SAC(
        "MlpPolicy", Line(False), learning_starts=8, batch_size=8, policy_kwargs={"features_extractor_class": Mlp}
    )
    renorm.convert(model.policy, renorm.BatchRenorm, limits=LIMITS)
    model.learn(32)
    critic, target = layers(model.critic)[0], layers(model.critic_target)[0]
    assert critic.num_batches_tracked == 48
    assert not torch.equal(critic.running_mean, torch.zeros(6))
    assert torch.equal(critic.running_mean, target.running_mean)


@pytest.mark.parametrize(("limits", "is_same"), [(renorm.Limits.constant(1e6, 1e6), True), (None, False)])
def test_ppo_s_ratio_begins_at_one_within_the_limits(limits: renorm.Limits | None, is_same: bool) -> None:
    """What collected the actions, at evaluation, is what is updated, in training mode."""
    model = PPO("MlpPolicy", Line(True), n_steps=16, batch_size=16, n_epochs=1, policy_kwargs=policy(), seed=0)
    model.learn(64)
    for layer in layers(model.policy):
        layer.limits = limits
    observations = torch.randn(16, 3) * 2 + 3
    actions = torch.zeros(16)
    model.policy.set_training_mode(False)
    collected = model.policy.evaluate_actions(observations, actions)[1].detach()
    model.policy.set_training_mode(True)
    updated = model.policy.evaluate_actions(observations, actions)[1].detach()
    assert torch.allclose(collected, updated, atol=1e-5) == is_same

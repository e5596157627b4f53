"""A features extractor with batch renormalization for Stable-Baselines3's policies."""

from __future__ import annotations

from collections.abc import Sequence

from gymnasium import Space
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from ..layers import BatchRenorm1d
from ..limits import Limits


class BatchRenormMlp(BaseFeaturesExtractor):
    """The observation and every hidden layer normalized, for `policy_kwargs`.

    Stable-Baselines3 evaluates while it collects and trains while it learns, and copies the running statistics into
    target networks. It hands out the number of features only: the network after them (`net_arch`) is not normalized.

    Args:
        observation_space: of the environment, flattened.
        limits: of the correction. Its steps are forwards in training mode: an update has one in DQN and PPO, and two of
            each network in SAC.
        units: of the hidden layers; the last ones are the features.
        momentum: of the running statistics.

    Source:
        Bhatt et al. 2024 (CrossQ), for where the layers are; not for its joint forward, which is not here.

    Example:
        >>> from gymnasium.spaces import Box
        >>> extractor = BatchRenormMlp(Box(-1, 1, (3,)), Limits.over(10_000), units=(64,))
        >>> extractor.features_dim
        64
    """

    def __init__(
        self, observation_space: Space[object], limits: Limits, units: Sequence[int] = (256,), momentum: float = 0.01
    ) -> None:
        super().__init__(observation_space, units[-1])
        size = get_flattened_obs_dim(observation_space)
        layers: list[nn.Module] = [nn.Flatten(), BatchRenorm1d(size, momentum=momentum, limits=limits)]
        for inputs, outputs in zip((size, *units), units, strict=False):
            norm = BatchRenorm1d(outputs, momentum=momentum, limits=limits)
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), norm]
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: Tensor) -> Tensor:
        """Features of observations.

        Args:
            observations: preprocessed, (N, *S).

        Returns:
            Features, (N, units[-1]).
        """
        features: Tensor = self.layers(observations)
        return features

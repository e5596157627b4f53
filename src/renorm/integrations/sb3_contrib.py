"""sb3-contrib's CrossQ with batch renormalization of renorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sb3_contrib.common.torch_layers import BatchRenorm1d as TheirBatchRenorm1d
from sb3_contrib.crossq.policies import Actor, CrossQCritic, CrossQPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from ..conversion.state_dicts import translate_state_dict
from ..layers import BatchRenorm1d
from ..limits import Limits
from ..modules import norms, replace_modules


class BatchRenormPolicy(CrossQPolicy):
    """CrossQ's policy with `renorm.BatchRenorm1d` in actor and critics.

    Takes the `policy_kwargs` of "MlpPolicy" and starts from the same weights; statistics move in the same forwards. The
    correction sets in at once after `renorm_warmup_steps` batches of a layer, of which an actor sees one in
    `policy_delay` gradient steps; its limits are 3 and 5. What "MlpPolicy" has saved loads as well: by
    `CrossQ.load(path, env, custom_objects={"policy_class": BatchRenormPolicy})`, or `BatchRenormPolicy.load(path)` for
    a policy alone.

    Source:
        Bhatt et al. 2024 (CrossQ).

    Example:
        >>> from sb3_contrib import CrossQ
        >>> model = CrossQ(BatchRenormPolicy, "Pendulum-v1", policy_kwargs={"net_arch": [64, 64]})
        >>> model.critic.qf0[0]
        BatchRenorm1d(4, eps=0.001, momentum=0.01, affine=True, track_running_stats=True, limits=Limits(r_max=3.0,
            d_max=5.0, start=100001, r_end=100001, d_end=100001), plain batch norm until step 100001)
    """

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """An actor with layers of renorm."""
        actor = _Actor(**self._update_features_extractor(self.actor_kwargs, features_extractor))
        return cast(Actor, _with_ours(actor).to(self.device))

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> CrossQCritic:
        """Critics with layers of renorm."""
        critic = _Critic(**self._update_features_extractor(self.critic_kwargs, features_extractor))
        return cast(CrossQCritic, _with_ours(critic).to(self.device))

    def load_state_dict(self, state_dict: Mapping[str, Any], *options: Any, **named: Any) -> Any:
        """Load a state dict of this policy, or of CrossQ's own.

        Args:
            state_dict: parameters and statistics, under the names of either.
            *options: of nn.Module.load_state_dict.
            **named: of nn.Module.load_state_dict.

        Returns:
            Names that are missing or unexpected.
        """
        return super().load_state_dict(translate_state_dict(state_dict, self), *options, **named)


class _SwitchesOurs(nn.Module):
    """What CrossQ's networks do to their layers, which they look for by type, done to ours."""

    def set_bn_training_mode(self, mode: bool) -> None:
        for layer in norms(self).values():
            layer.train(mode)


class _Actor(_SwitchesOurs, Actor):
    pass


class _Critic(_SwitchesOurs, CrossQCritic):
    pass


def _with_ours(network: Any) -> Any:
    replacements: dict[nn.Module, nn.Module] = {
        layer: _ours(layer) for layer in network.modules() if isinstance(layer, TheirBatchRenorm1d)
    }
    return replace_modules(network, replacements)


def _ours(theirs: Any) -> BatchRenorm1d:
    start = theirs.warmup_steps + 1  # theirs corrects where steps > warmup_steps
    limits = Limits(theirs.rmax, theirs.dmax, start, r_end=start, d_end=start)
    return BatchRenorm1d(theirs.num_features, theirs.eps, theirs.momentum, limits=limits, tracking="var")

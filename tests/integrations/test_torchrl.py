"""Our layer in TorchRL's networks and in its CrossQLoss, against TorchRL's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.integrations.torchrl import BatchRenorm1d

pytest.importorskip("torchrl")
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.modules import MLP
from torchrl.modules import BatchRenorm1d as TheirBatchRenorm1d
from torchrl.modules.distributions import NormalParamExtractor, TanhNormal
from torchrl.modules.tensordict_module.actors import ProbabilisticActor, ValueOperator
from torchrl.modules.tensordict_module.common import SafeModule
from torchrl.objectives import CrossQLoss

OBSERVATIONS, ACTIONS, BATCH, UNITS, CRITICS = 3, 2, 16, 8, 2
LAYERS = (BatchRenorm1d, TheirBatchRenorm1d)
LOSSES = ("loss_actor", "loss_qvalue", "loss_alpha")


def network(layer: type[nn.Module], inputs: int, outputs: int, warmup: int) -> MLP:
    options = [{"num_features": UNITS, "warmup_steps": warmup}] * 2
    return MLP(inputs, outputs, num_cells=[UNITS] * 2, norm_class=layer, norm_kwargs=options, activation_class=nn.ReLU)


def crossq(layer: type[nn.Module], warmup: int = 4) -> CrossQLoss:
    torch.manual_seed(0)
    policy = nn.Sequential(network(layer, OBSERVATIONS, 2 * ACTIONS, warmup), NormalParamExtractor())
    actor = ProbabilisticActor(
        SafeModule(policy, in_keys=["observation"], out_keys=["loc", "scale"]), in_keys=["loc", "scale"],
        spec=Bounded(-torch.ones(ACTIONS), torch.ones(ACTIONS), (ACTIONS,)), distribution_class=TanhNormal,
    )  # fmt: skip
    critic = ValueOperator(network(layer, OBSERVATIONS + ACTIONS, 1, warmup), in_keys=["observation", "action"])
    loss = CrossQLoss(actor, critic, num_qvalue_nets=CRITICS)
    loss.make_value_estimator()
    return loss


def transitions(seed: int) -> TensorDict:
    torch.manual_seed(seed)
    never = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = {
        "done": never, "terminated": never, "reward": torch.randn(BATCH, 1),
        "observation": torch.randn(BATCH, OBSERVATIONS) * 3 + 2,
    }  # fmt: skip
    actions = torch.rand(BATCH, ACTIONS) * 2 - 1
    return TensorDict(
        {"observation": torch.randn(BATCH, OBSERVATIONS) * 3 + 2, "action": actions, "next": following}, [BATCH]
    )


def train(loss: CrossQLoss, steps: int) -> list[Tensor]:
    """Losses of each step; by SGD, since Adam makes whole steps of rounding errors (biases before a norm)."""
    optimizer = torch.optim.SGD(loss.parameters(), 0.01)
    found = []
    for step in range(steps):
        losses = loss(transitions(step))
        optimizer.zero_grad()
        sum(losses[name] for name in LOSSES).backward()
        optimizer.step()
        found.append(torch.stack([losses[name].detach() for name in LOSSES]))
    return found


def test_crossq_trains_as_with_torchrl_s_layer_until_its_factor_grows_beyond_one() -> None:
    """Four steps: the actor's layers see 8 batches, of which 4 corrected; theirs counts up to 2 * warmup_steps."""
    ours, theirs = crossq(BatchRenorm1d), crossq(TheirBatchRenorm1d)
    for found, expected in zip(train(ours, 4), train(theirs, 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_update_moves_the_actor_twice_and_every_critic_once(layer: type[nn.Module]) -> None:
    loss = crossq(layer)
    train(loss, 3)
    counts = {name: value.tolist() for name, value in loss.state_dict().items() if "tracked" in name}
    assert len(counts) == 4
    for name, count in counts.items():
        assert count == (6 if name.startswith("actor") else [3] * CRITICS)


def test_critics_of_one_vmap_keep_statistics_of_their_own() -> None:
    loss = crossq(BatchRenorm1d)
    train(loss, 2)
    first, second = loss.qvalue_network_params["module", "4", "running_mean"]
    assert not torch.allclose(first, second)
    assert loss.qvalue_network_params["module", "1", "weight"].grad.abs().amin() > 0


@pytest.mark.parametrize(("source", "target"), [LAYERS, LAYERS[::-1]])
def test_checkpoints_go_both_ways(source: type[nn.Module], target: type[nn.Module]) -> None:
    old, new = network(source, 5, 2, 2), network(target, 5, 2, 2)
    for seed in range(3):
        torch.manual_seed(seed)
        old(torch.randn(BATCH, 5))
    assert list(old.state_dict()) == list(new.state_dict())
    new.load_state_dict(old.state_dict())
    x = torch.randn(BATCH, 5)
    torch.testing.assert_close(new.eval()(x), old.eval()(x))
    loss, other = crossq(source), crossq(target)
    train(loss, 2)
    other.load_state_dict(loss.state_dict())
    loaded, saved = (found.qvalue_network_params["module", "4", "running_var"] for found in (other, loss))
    assert torch.equal(loaded, saved)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 2)])
@pytest.mark.parametrize("seen", [0, 3, 5])
def test_a_layer_computes_what_torchrl_s_does(shape: tuple[int, ...], seen: int) -> None:
    options: dict[str, Any] = {"momentum": 0.2, "eps": 1e-3, "max_r": 1.5, "max_d": 0.5, "warmup_steps": 3}
    ours, theirs = BatchRenorm1d(5, **options), TheirBatchRenorm1d(5, **options)
    for layer in (ours, theirs):
        layer.num_batches_tracked.fill_(seen)
    x = torch.randn(shape) * 2 + 1
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_a_smooth_warmup_relaxes_the_limits() -> None:
    limits = BatchRenorm1d(5, max_r=3, max_d=5, warmup_steps=10, smooth=True).limits
    assert limits is not None
    assert [limits.at(step) for step in (0, 5, 10, 20)] == [(1, 0), (2, 2.5), (3, 5), (3, 5)]

"""CrossQ: SAC without target networks, with batch renormalization in critics and actor.

    pip install --no-build-isolation ".[examples]"
    python examples/crossq.py                    # 3 methods x 3 seeds on Pendulum-v1
    python examples/crossq.py --steps 400 --seeds 1 --norm renorm --out /tmp/crossq

Source: Bhatt et al. 2024, "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample Efficiency and
Simplicity". Theirs: normalization of the input and after each ReLU, policy delay 3, Adam's beta1 0.5, learning rate
1e-3. Ours: critics of 256 units instead of 2048, and limits that are ramped over this training.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import RescaleAction
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

import renorm
from common import LABELS, descend, draw_curve, options, replace_file, save_csv, spread

HIDDEN, BATCH_SIZE, GAMMA, LEARNING_RATE, POLICY_DELAY = 256, 256, 0.99, 1e-3, 3
MOMENTUM, EPS = 0.01, 1e-3  # of all normalization layers
RANDOM_STEPS, EVALUATIONS, EPISODES = 500, 15, 10
LINES = {"renorm": "-", "batch": "--", "none": ":"}


class Row(NamedTuple):
    """One evaluation of one run."""

    norm: str
    seed: int
    step: int
    episode_return: float


def norm_layer(norm: str, features: int, updates: int) -> nn.Module:
    """The normalization of `features` units in a network that is updated `updates` times."""
    if norm == "renorm":
        return renorm.BatchRenorm1d(features, EPS, MOMENTUM, limits=renorm.Limits.over(updates))
    return renorm.BatchNorm1d(features, EPS, MOMENTUM) if norm == "batch" else nn.Identity()


def network(norm: str, inputs: int, outputs: int, updates: int) -> nn.Sequential:
    """Two hidden layers; the input is normalized, and what comes out of each ReLU."""
    layers: list[nn.Module] = [norm_layer(norm, inputs, updates)]
    for size in (inputs, HIDDEN):
        layers += [nn.Linear(size, HIDDEN), nn.ReLU(), norm_layer(norm, HIDDEN, updates)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


class Agent:
    """A squashed Gaussian actor, two critics, and the entropy's weight.

    Args:
        norm: "renorm", "batch" or "none".
        observations: length of an observation.
        actions: length of an action; actions are from -1 to 1.
        updates: number of critic updates to come.
    """

    def __init__(self, norm: str, observations: int, actions: int, updates: int) -> None:
        # Limits count a layer's own batches: the actor's come once in POLICY_DELAY steps.
        self.actor = network(norm, observations, 2 * actions, max(1, updates // POLICY_DELAY))
        self.critics = nn.ModuleList(network(norm, observations + actions, 1, updates) for _ in range(2))
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.target_entropy = -actions
        adam = partial(torch.optim.Adam, lr=LEARNING_RATE, betas=(0.5, 0.999))
        self.actor_optimizer, self.critic_optimizer = adam(self.actor.parameters()), adam(self.critics.parameters())
        self.alpha_optimizer = adam([self.log_alpha])
        self.updates = 0

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (N, A) and their log probabilities (N,)."""
        center, log_std = self.actor(obs).chunk(2, dim=1)
        normal = torch.distributions.Normal(center, log_std.clamp(-20, 2).exp())
        raw = normal.rsample()
        log_slope = 2 * (np.log(2) - raw - softplus(-2 * raw))  # of tanh: log(1 - tanh(raw)^2)
        return raw.tanh(), (normal.log_prob(raw) - log_slope).sum(1)

    def values(self, obs: Tensor, action: Tensor) -> Tensor:
        """Both critics' values, (2, N)."""
        x = torch.cat([obs, action], 1)
        return torch.stack([critic(x).squeeze(1) for critic in self.critics])

    @torch.no_grad()
    def act(self, obs: np.ndarray, explore: bool) -> np.ndarray:
        """Actions (N, A) for observations (N, O), by the running statistics."""
        self.actor.eval()
        x = torch.as_tensor(obs, dtype=torch.float32)
        action = self.sample(x)[0] if explore else self.actor(x).chunk(2, dim=1)[0].tanh()
        self.actor.train()
        return action.numpy()

    def update(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, ended: Tensor) -> None:
        """One step of the critics, and in every POLICY_DELAY-th call one of the actor and the entropy's weight."""
        self.updates += 1
        self._update_critics(obs, action, reward, next_obs, ended)
        if self.updates % POLICY_DELAY == 0:
            self._update_actor(obs)

    def _update_critics(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, ended: Tensor) -> None:
        with torch.no_grad(), renorm.freeze(self.actor, statistics="running"):
            next_action, next_log_prob = self.sample(next_obs)
        # One joint forward: values and targets are normalized by the same statistics, those of both halves.
        both = self.values(torch.cat([obs, next_obs]), torch.cat([action, next_action]))
        value, next_value = both.chunk(2, dim=1)
        soft_value = next_value.detach().amin(0) - self.log_alpha.detach().exp() * next_log_prob
        target = reward + GAMMA * (1 - ended) * soft_value
        descend(self.critic_optimizer, mse_loss(value, target.expand_as(value)))

    def _update_actor(self, obs: Tensor) -> None:
        action, log_prob = self.sample(obs)
        # The policy's actions are no batch that the critics learn from: they neither move nor make the statistics.
        with renorm.freeze(self.critics, statistics="running"):
            value = self.values(obs, action).amin(0)
        descend(self.actor_optimizer, (self.log_alpha.detach().exp() * log_prob - value).mean())
        descend(self.alpha_optimizer, -self.log_alpha * (log_prob.detach().mean() + self.target_entropy))


def evaluate(agent: Agent, env_id: str) -> float:
    """Mean return of EPISODES episodes without exploration, from the same starts in every call."""
    envs = gymnasium.make_vec(env_id, EPISODES, vectorization_mode="sync", wrappers=[rescaled])
    obs, _ = envs.reset(seed=10_000)
    total, running = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while running.any():
        obs, reward, terminated, truncated, _ = envs.step(agent.act(obs, explore=False))
        total += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return round(float(total.mean()), 1)


def rescaled(env: gymnasium.Env) -> RescaleAction:
    """The environment, with actions from -1 to 1."""
    return RescaleAction(env, np.float32(-1), np.float32(1))


def train(norm: str, seed: int, steps: int, env_id: str) -> list[Row]:
    """One run: a row for every evaluation."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    env = rescaled(gymnasium.make(env_id))
    observations, actions = env.observation_space.shape[0], env.action_space.shape[0]
    start = min(RANDOM_STEPS, steps // 2)
    agent = Agent(norm, observations, actions, updates=steps - start)
    evaluate_at = {round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    shapes = {"obs": (observations,), "action": (actions,), "reward": (), "next_obs": (observations,), "ended": ()}
    replay = {name: torch.zeros(steps, *shape) for name, shape in shapes.items()}
    rows: list[Row] = []
    obs, _ = env.reset(seed=seed)
    for t in range(steps):
        action = random.uniform(-1, 1, actions) if t < start else agent.act(obs[None], explore=True)[0]
        next_obs, reward, terminated, truncated, _ = env.step(np.float32(action))
        # The end of an episode's time is no end of the task: its value goes on.
        for name, value in zip(replay, (obs, action, reward, next_obs, terminated), strict=True):
            replay[name][t] = torch.as_tensor(value)
        obs = env.reset()[0] if terminated or truncated else next_obs
        if t >= start:
            batch = torch.as_tensor(random.integers(t + 1, size=BATCH_SIZE))
            agent.update(**{name: data[batch] for name, data in replay.items()})
        if t + 1 in evaluate_at:
            rows.append(Row(norm, seed, t + 1, evaluate(agent, env_id)))
    env.close()
    return rows


def draw(path: Path, rows: list[Row], env_id: str) -> None:
    """Draw the return of each method during the training."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for norm in dict.fromkeys(row.norm for row in rows):
        points = [(row.step, row.episode_return) for row in rows if row.norm == norm]
        draw_curve(axes, points, norm, LINES[norm], LABELS[norm])
    axes.set_title(f"SAC without target networks on {env_id}")
    axes.set_xlabel("environment step")
    axes.set_ylabel(f"return, mean of {EPISODES} evaluation episodes")
    axes.grid(alpha=0.3)
    seeds = len({row.seed for row in rows})
    figure.legend(loc="outside lower center", ncols=3, title=f"line: mean, band: range, seeds: {seeds}")
    figure.savefig(path, dpi=150, format="png")


def print_table(rows: list[Row]) -> None:
    """Print the return at the end and on average over the training, mean and standard deviation over seeds."""
    print(f"\n{'norm':8} {'last return':>18} {'mean over training':>20}")
    for norm in dict.fromkeys(row.norm for row in rows):
        seeds = {row.seed for row in rows if row.norm == norm}
        runs = [[row.episode_return for row in rows if (row.norm, row.seed) == (norm, seed)] for seed in seeds]
        last, average = spread([run[-1] for run in runs], 1), spread([mean(run) for run in runs], 1)
        print(f"{norm:8} {last:>18} {average:>20}")


def main() -> None:
    """Train every method with every seed; files are written anew after each run."""
    parser = options(__doc__.splitlines()[0], steps=6_000)
    parser.add_argument(
        "--env", default="Pendulum-v1", help="a gymnasium task whose observations and actions are vectors"
    )
    args = parser.parse_args()
    check_task(parser, args.env)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small
    rows: list[Row] = []
    for seed in range(args.seeds):
        for norm in dict.fromkeys(args.norm):
            rows += train(norm, seed, args.steps, args.env)
            print(f"{norm:8} seed {seed}: last return {rows[-1].episode_return:.1f}", flush=True)
            save_csv(args.out / "crossq.csv", ("norm", "seed", "step", "return"), rows)
            replace_file(args.out / "crossq.png", partial(draw, rows=rows, env_id=args.env))
    print_table(rows)


def check_task(parser: argparse.ArgumentParser, env_id: str) -> None:
    """Refuse a task that is not there, or that the networks cannot take."""
    try:
        env = gymnasium.make(env_id)
    except gymnasium.error.Error as error:
        parser.error(f"--env {env_id}: {error}")
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            parser.error(f"--env {env_id}: observations and actions must be vectors of real numbers, got {space}")
    env.close()


if __name__ == "__main__":
    main()

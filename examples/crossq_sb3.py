"""sb3-contrib's CrossQ on Pendulum, with its own batch renorm layer and with renorm's.

    python examples/crossq_sb3.py [--seeds 5] [--steps 3000] [--out examples/results]

Everything but the layer is the same: CrossQ's defaults, networks of 256 units, the correction from a layer's 300th
batch on (the default of 100,000 would not come within so few steps), first weights and exploration of a seed.

Expected, as written down before the first run: no difference in returns beyond that between seeds. The layers differ by
eps, which theirs adds twice once the correction is on, and by N / (N - 1) in the variance of a batch of N = 512 (the
actor's: 256). Neither should matter on states of size 1 and hidden layers that are not nearly constant.

Written to crossq_sb3.csv: the mean return of 10 evaluation episodes, from the same starts, after every 300 steps.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sb3_contrib import CrossQ
from sb3_contrib.crossq.policies import MlpPolicy
from scipy import stats
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from common import draw_curve, positive, replace_file, save_csv, spread
from renorm.integrations.sb3_contrib import BatchRenormPolicy

TASK = "Pendulum-v1"
POLICIES = {"sb3-contrib": MlpPolicy, "renorm": BatchRenormPolicy}
COLOURS = {"sb3-contrib": "batch", "renorm": "renorm"}  # those of METHODS
UNITS, WARMUP = 256, 300
EPISODES, EVALUATIONS = 10, 10


class Row(NamedTuple):
    """An evaluation."""

    layer: str
    seed: int
    step: int
    episode_return: float


def train(layer: str, seed: int, steps: int) -> list[Row]:
    """One run: a row for every evaluation."""
    policy_kwargs = {"net_arch": [UNITS, UNITS], "renorm_warmup_steps": WARMUP}
    model = CrossQ(POLICIES[layer], TASK, policy_kwargs=policy_kwargs, seed=seed, device="cpu")
    rows = []
    for at in sorted({round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)} - {0}):
        model.learn(at - model.num_timesteps, reset_num_timesteps=False)
        starts = make_vec_env(TASK, EPISODES, seed=10_000)
        average, _ = evaluate_policy(model, starts, EPISODES)
        rows.append(Row(layer, seed, at, round(float(average), 1)))
    return rows


def by_seed(rows: list[Row], layer: str) -> list[list[float]]:
    """The returns of each seed's run."""
    runs: dict[int, list[float]] = {}
    for row in rows:
        if row.layer == layer:
            runs.setdefault(row.seed, []).append(row.episode_return)
    return list(runs.values())


def interval(values: list[float]) -> str:
    """Mean and 95% interval, by Student's t over seeds."""
    if len(values) < 2:
        return f"{mean(values):.1f}"
    low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
    return f"{mean(values):.1f} ({low:.1f} to {high:.1f})"


def print_table(rows: list[Row]) -> None:
    """Print each layer's returns, mean and standard deviation over seeds, and the differences by seed."""
    last = {layer: [run[-1] for run in by_seed(rows, layer)] for layer in POLICIES}
    average = {layer: [mean(run) for run in by_seed(rows, layer)] for layer in POLICIES}
    print(f"\n{'layer':12} {'last return':>22} {'mean over training':>26}")
    for layer in POLICIES:
        print(f"{layer:12} {spread(last[layer], 1):>22} {spread(average[layer], 1):>26}")
    differences = (
        interval([ours - theirs for ours, theirs in zip(found["renorm"], found["sb3-contrib"], strict=True)])
        for found in (last, average)
    )
    print("{:12} {:>22} {:>26}".format("difference", *differences))


def draw(path: Path, rows: list[Row]) -> None:
    """Draw the return with each layer during the training."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for layer in dict.fromkeys(row.layer for row in rows):
        points = [(row.step, row.episode_return) for row in rows if row.layer == layer]
        draw_curve(axes, points, COLOURS[layer], "-", f"layer of {layer}")
    axes.set_title(f"sb3-contrib's CrossQ on {TASK}")
    axes.set_xlabel("environment step")
    axes.set_ylabel(f"return, mean of {EPISODES} evaluation episodes")
    axes.grid(alpha=0.3)
    seeds = len({row.seed for row in rows})
    figure.legend(loc="outside lower center", ncols=2, title=f"line: mean, band: range, seeds: {seeds}")
    figure.savefig(path, dpi=150, format="png")


def main() -> None:
    """Train with each layer and every seed; files are written anew after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--steps", type=positive, default=3_000, help="environment steps of a run (default: 3,000)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table, picture")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small
    rows: list[Row] = []
    for seed in range(args.seeds):
        for layer in POLICIES:
            rows += train(layer, seed, args.steps)
            print(f"{layer:12} seed {seed}: last return {rows[-1].episode_return:.1f}", flush=True)
            save_csv(args.out / "crossq_sb3.csv", ("layer", "seed", "step", "return"), rows)
            replace_file(args.out / "crossq_sb3.png", partial(draw, rows=rows))
    print_table(rows)


if __name__ == "__main__":
    main()

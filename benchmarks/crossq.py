"""Gradient steps of sb3-contrib's CrossQ with its own layer and with ours, written to crossq.csv.

    python benchmarks/crossq.py [--quick] [--out benchmarks/results]

Both policies of a case run interleaved in one process on one thread; times are the processor's, of one gradient step on
average over three, of which one updates the actor too. Ratios are over sb3-contrib's layer, of two times of the same
round, with median and quartiles of all rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from sb3_contrib import CrossQ
from sb3_contrib.crossq.policies import CrossQPolicy, MlpPolicy

from command import run
from contenders import RENORM, SB3_CONTRIB
from csvfiles import Row
from harness import Budget, Step, interleave, ratio
from renorm.integrations.sb3_contrib import BatchRenormPolicy
from settings import Setting

POLICIES = {SB3_CONTRIB: MlpPolicy, RENORM: BatchRenormPolicy}
PHASES = {"plain": 100_000, "corrected": 0}  # batches before the correction
_UNITS, _QUICK_UNITS = (256, 1_024), (8,)
_BATCH, _ACTOR_EVERY = 256, 3
_BUDGET = Budget(seconds=40, least_rounds=20, warmup=2)
_QUICK_BUDGET = Budget(seconds=0, least_rounds=3, warmup=1)


def gradient_step(policy: type[CrossQPolicy], units: int, warmup: int) -> Step:
    """Gradient steps of CrossQ on Pendulum's random transitions.

    Args:
        policy: class.
        units: of both hidden layers, of actor and critics alike.
        warmup: batches before the correction.

    Returns:
        A step with the part step.
    """
    model = CrossQ(
        policy, "Pendulum-v1", learning_starts=1_000, policy_delay=_ACTOR_EVERY, seed=0, device="cpu",
        policy_kwargs={"net_arch": [units, units], "renorm_warmup_steps": warmup},
    )  # fmt: skip
    model.learn(1_000)  # fills the replay buffer

    def step() -> dict[str, float]:
        start = time.process_time()
        model.train(_ACTOR_EVERY, _BATCH)
        return {"step": (time.process_time() - start) / _ACTOR_EVERY}

    return step


def settings(quick: bool) -> list[Setting]:
    """One: kept memory and one thread."""
    return [Setting("kept", 1)]


def work(setting: Setting, quick: bool) -> Iterator[Row]:
    """Measure everything in this process."""
    for units in _QUICK_UNITS if quick else _UNITS:
        for phase, warmup in PHASES.items():
            steps = {name: gradient_step(policy, units, warmup) for name, policy in POLICIES.items()}
            samples = interleave(steps, _QUICK_BUDGET if quick else _BUDGET)
            for name, found in samples.items():
                case = {"units": units, "batch": _BATCH, "phase": phase, "contender": name}
                yield case | found.row("step") | ratio(found, samples[SB3_CONTRIB])


if __name__ == "__main__":
    run(__file__, __doc__, settings, work, "sb3_contrib", "stable_baselines3", "gymnasium")

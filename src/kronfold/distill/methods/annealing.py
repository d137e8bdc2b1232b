"""Annealing-KD: first regress onto the teacher's logits, made less and less flat, then learn from the labels alone.

Jafari et al. 2021, "Annealing Knowledge Distillation" (arXiv 2104.07163, EACL 2021), as described in its section 3.
Phase 1 is the squared error between the student's logits and Φ(T) times the teacher's, with Φ(T) = 1 - (T - 1) / T_max
and T going from T_max down to 1 in whole numbers, each for an equal share of the phase. Phase 2 is cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.method import Method
from kronfold.distill.signals import Moment
from kronfold.options.healing import ObjectiveConfig


@dataclass(frozen=True)
class AnnealingOptions(method.MethodOptions):
    """The schedule.

    Args:
        max_temperature: T_max, a whole number: how many steps the annealing has.
        regression: share of the training that is phase 1.
    """

    max_temperature: int = 7
    regression: float = 0.7

    def faults(self) -> list[str]:
        faults = method.whole_faults(1, max_temperature=self.max_temperature)
        if isinstance(self.regression, bool) or not isinstance(self.regression, int | float):
            return [*faults, f"regression={self.regression!r} must be a number"]
        return (
            faults if 0 < self.regression < 1 else [*faults, f"regression={self.regression} must lie between 0 and 1"]
        )


class Annealing(Method):
    """`kl` is the weight of the regression (reported as `logit_mse`), `ce` that of the last phase."""

    options_type: ClassVar = AnnealingOptions

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        if not (config.kl > 0 and config.ce > 0):
            raise InputError(
                f"Method annealing has two phases, weighed by kl (now {config.kl}) and by ce (now {config.ce}); "
                "both must be above 0."
            )

    def annealing(self, moment: Moment) -> int:
        """T of phase 1, from max_temperature to 1; 0 in phase 2."""
        done = moment.progress / self.options.regression
        return max(0, self.options.max_temperature - int(done * self.options.max_temperature + 1e-9)) if done < 1 else 0

    def weights(self, moment: Moment) -> dict[str, float]:
        return {"logit_mse": self.config.kl} if self.annealing(moment) else {"ce": self.config.ce}

    def temperature(self, moment: Moment) -> float:
        """What the teacher's logits are divided by: 1 / Φ(T)."""
        annealing = self.annealing(moment) or 1
        return 1 / (1 - (annealing - 1) / self.options.max_temperature)

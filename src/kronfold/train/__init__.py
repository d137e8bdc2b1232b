"""Training: distillation on transformers.Trainer, healing, exact resume."""

from kronfold.options.healing import HealConfig
from kronfold.train.heal import HealResult, bf16_is_fast, heal
from kronfold.train.store_teacher import store_teacher
from kronfold.train.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "HealConfig", "HealResult", "bf16_is_fast", "heal", "store_teacher"]

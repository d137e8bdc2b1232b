"""transformers.Trainer with a frozen teacher and an objective; everything else is the stock loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from kronfold.base.errors import InputError, OutputError
from kronfold.distill import Objective, ObjectiveConfig, check_head, check_pair


class DistillationTrainer(Trainer):
    """Trains `model` towards `teacher`; checkpoints are plain `save_pretrained` directories.

    The teacher is no part of the trained model: it is put into eval mode, runs without gradients, and appears
    neither in the state dict nor in the optimiser. Its `requires_grad` flags are not touched. The head is
    applied in chunks (see `kronfold.distill.chunked`), so full logits never exist. Every named loss gets a
    column of its own in `state.log_history`, a mean over the logged steps like `loss`.

    Args:
        model: the student. Called with `logits_to_keep=1`; its forward hooks and any DDP wrapper run as usual.
        teacher: may be None when the objective needs none (the dense fine-tuning control: weight of `kl` 0).
        objective: weights, temperature and chunk size.
        train_dataset: items of `input_ids` and `labels`, in the order wanted: it is read from first to last.

    Raises:
        InputError: no teacher though the objective needs one, a pair that does not fit, or a head that is not
            all there is to the logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        objective: ObjectiveConfig | None = None,
        *,
        args: TrainingArguments,
        **options: Any,
    ) -> None:
        self.objective: Objective = Objective(objective)
        if self.objective.config.needs_teacher and teacher is None:
            raise InputError("This objective needs a teacher (kl is above 0); pass one, or set kl to 0.")
        check_pair(model, teacher if self.objective.config.needs_teacher else None)
        check_head(model)
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs are for torchrun; nn.DataParallel would copy the student each step
        super().__init__(model=model, args=args, **options)
        # The objective shifts labels and divides by num_items_in_batch, whatever the signature of the student
        # says.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher: PreTrainedModel | None = None
        self.teacher_head: nn.Module | None = None
        if teacher is not None and self.objective.config.needs_teacher:
            check_head(teacher)
            self._adopt(teacher)
        self._running: dict[str, Tensor] = {}
        self._running_since = 0

    def _adopt(self, teacher: PreTrainedModel) -> None:
        nn.Module.to(teacher, self.args.device)
        self.teacher = teacher.eval()
        head = teacher.get_output_embeddings()
        # Autocast keeps the low-precision copy of a trained weight, but casts a frozen one anew for every
        # chunk. The same cast, done once, spares that.
        self.teacher_head = copy.deepcopy(head).to(torch.bfloat16) if self.args.bf16 else head

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch; `inputs` are `labels` (batch, length) and what the models take."""
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        with self.accelerator.autocast():
            teacher_hidden = self._teacher_hidden(features)
            out = model(**features, output_hidden_states=True, logits_to_keep=1, use_cache=False)
            head = self.accelerator.unwrap_model(model).get_output_embeddings()
            loss, named = self.objective(
                out.hidden_states[-1], head, teacher_hidden, self.teacher_head, labels, num_items_in_batch
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # num_items_in_batch counts all processes, and DDP averages gradients where we want their sum.
            scale = self.accelerator.num_processes
            loss, named = loss * scale, {name: value * scale for name, value in named.items()}
        if model.training:
            self._remember(named)
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.no_grad()
    def _teacher_hidden(self, features: dict[str, Any]) -> Tensor | None:
        """(batch, length, width) after the teacher's final norm; its head is left to the objective."""
        if self.teacher is None:
            return None
        return self.teacher.base_model(**features, use_cache=False).last_hidden_state

    def _remember(self, named: dict[str, Tensor]) -> None:
        """Add up on the device; reading a number here would wait for it in every micro-step."""
        if not self._running:
            self._running_since = self.state.global_step
            self._running = {name: torch.zeros_like(value) for name, value in named.items()}
        for name, value in named.items():
            self._running[name] += value

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own words for a full disk
            raise OutputError(
                f"Could not write a checkpoint in {self.args.output_dir}: {error}. Earlier checkpoints are whole. "
                "Free some space and resume, or choose another place."
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each named loss, as a mean over the steps since the last log, to training logs."""
        if self._running and "loss" in logs:
            steps = self.state.global_step - self._running_since
            means = self.accelerator.reduce(torch.stack(list(self._running.values())), "mean") / steps
            logs.update(zip(self._running, means.tolist(), strict=True))
            self._running = {}
        super().log(logs, start_time)

"""The order in which blocks are seen: one long seeded stream, so that a position is just a number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments

from kronfold.base.errors import InputError, OutputError
from kronfold.distill import Moment, Objective, ObjectiveConfig, Signals, check_head, check_pair, is_classifier
from kronfold.distill.attention import run_with_attention
from kronfold.distill.losses import LOSSES, TopK
from kronfold.distill.objective import Extra
from kronfold.distill.pairs import Pair
from kronfold.distill.stored import StoredTeacher
from kronfold.train import checkpoints, sharded, zero
from kronfold.train.watch import WatchedTrainer, sound


class ShuffledStream(Dataset):
    """Exactly `length` items: `data` shuffled, then shuffled anew, and so on, as one map-style dataset.

    Read from first to last, every batch is full and item i depends on (seed, i) only, not on how items are
    grouped into batches, micro-batches or processes. So a run resumes exactly, and any split of the global
    batch sees the same data.

    `start`: items of the stream that earlier stages have read; item 0 here is item `start` of the whole.
    """

    def __init__(self, data: Dataset, length: int, seed: int, start: int = 0) -> None:
        self.data = data
        self.length = length
        self.seed = seed
        self.start = start
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        size = len(self.data)  # type: ignore[arg-type]
        epoch, position = divmod(self.start + index, size)
        if epoch != self._epoch:
            # One generator per epoch; an odd multiplier keeps (seed, epoch) pairs of neighbouring seeds
            # apart.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = self._shuffled(epoch, size, generator)
            self._epoch = epoch
        return self.data[self._order[position]]

    def _shuffled(self, epoch: int, size: int, generator: torch.Generator) -> list[int]:
        """The order of one epoch (from 0)."""
        return torch.randperm(size, generator=generator).tolist()


# One forward pass of a student or teacher, with the signals that the method asked for and nothing more.


def observed(
    model: PreTrainedModel, call: Callable[..., Any], hidden: bool, layers: Collection[int]
) -> tuple[Any, Signals]:
    """(output, signals) of `call`, which runs `model` (perhaps inside a wrapper) and passes on keyword arguments."""

    def run(**more: Any) -> Any:
        return call(**more, **({"output_hidden_states": True} if hidden else {}))

    out, attentions = run_with_attention(model, run, layers)
    return out, Signals(tuple(out.hidden_states) if hidden else (), attentions)


# transformers.Trainer with a frozen teacher and an objective; everything else is the stock loop.


class DistillationTrainer(WatchedTrainer):
    """Trains `model` towards `teacher`; checkpoints are plain `save_pretrained` directories.

    The teacher is no part of the trained model: it is put into eval mode, runs without gradients, and appears
    neither in the state dict nor in the optimiser. Its `requires_grad` flags are not touched. Every named loss gets a
    column of its own in `state.log_history`, a mean over the logged steps like `loss`. Parameters of the method
    (projections) are trained too, and lie in `method.pt` beside the optimiser's state.

    Causal language models: the head is applied in chunks (see `kronfold.distill.chunked`), so full logits never exist.
    Sequence classification and regression (any `...ForSequenceClassification`): batches hold `input_ids`,
    `attention_mask` and `labels` (batch,), padded by the collator given as `data_collator`; `evaluate` and `predict`
    hand the logits to `compute_metrics` as always. `num_items_in_batch` counts sequences then, not tokens.

    Where accelerate's configuration asks for FSDP2, a copy of the student is trained in shards (`trainer.model`). The
    student itself receives the weights at every checkpoint and at the end of `train` (`kronfold.train.sharded`).

    Args:
        model: the student. Called with `logits_to_keep=1`; its forward hooks and any DDP wrapper run as usual.
        teacher: may be None when the objective needs none (the dense fine-tuning control: weight of `kl` 0). Of an
            offline teacher the rows are expected in the items of the dataset, as `StoredTeacher.beside` gives them.
        objective: method, weights, temperature and chunk size.
        train_dataset: items of `input_ids` and `labels`, in the order wanted: it is read from first to last.

    Raises:
        InputError: no teacher though the objective needs one, a pair or method that does not fit, or a head that is
            not all there is to the logits. NotFiniteError, DivergedError: in `train`, see `WatchedTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | StoredTeacher | None = None,
        objective: ObjectiveConfig | None = None,
        *,
        args: TrainingArguments,
        **options: Any,
    ) -> None:
        self.objective: Objective = Objective(objective)
        check_objective(self.objective, model, teacher, args.seed)
        if isinstance(teacher, StoredTeacher):
            teacher, args.remove_unused_columns = None, False  # its rows are columns that no model asks for
        teacher = teacher if self.objective.needs_teacher else None
        self.classifies = is_classifier(model)
        for one in () if self.classifies else (model, *([teacher] if teacher is not None else [])):
            check_head(one)
        self.whole: PreTrainedModel | None = None
        if sharded.asked():
            if teacher is not None:
                sharded.check_teacher(teacher)
            self.whole, model = model, sharded.twin(model)
        if args.n_gpu > 1:
            args._n_gpu = 1  # several GPUs are for torchrun; nn.DataParallel would copy the student each step
        super().__init__(model=model, args=args, **options)
        # The objective shifts labels and divides by num_items_in_batch, whatever the signature of the student
        # says.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not self.classifies
        self.teacher: PreTrainedModel | None = None
        self.teacher_head: nn.Module | None = None
        if teacher is not None:
            self._adopt(teacher)
        self.objective.method.to(self.args.device)
        if self.objective.method.companions:
            self.add_callback(checkpoints.MethodGradients(self.objective.method, self.accelerator))
        self._running: dict[str, Tensor] = {}
        self._running_steps: dict[str, set[int]] = {}
        self._kind: frozenset[str] = frozenset()

    def _adopt(self, teacher: PreTrainedModel) -> None:
        teacher = self.objective.method.acting_teacher(teacher)
        nn.Module.to(teacher, self.args.device)
        self.teacher = teacher.eval()
        if self.classifies:
            return
        head = teacher.get_output_embeddings()
        # Autocast keeps the low-precision copy of a trained weight, but casts a frozen one anew for every
        # chunk. The same cast, done once, spares that.
        frozen = not self.objective.method.trains_teacher
        self.teacher_head = copy.deepcopy(head).to(torch.bfloat16) if self.args.bf16 and frozen else head

    def create_accelerator_and_postprocess(self) -> None:
        if self.whole is None:
            super().create_accelerator_and_postprocess()
            return
        # Reducing after every micro-batch keeps gradients in shards; waiting for the last would hold whole ones.
        self.args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        super().create_accelerator_and_postprocess()
        sharded.enable(self.accelerator)
        self.is_fsdp_enabled = True

    def train(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`; the student holds the trained weights afterwards, on the training device."""
        if self.whole is None:
            found = super().train(*args, **options)
            if self.is_deepspeed_enabled:
                zero.settle(self.deepspeed, self.model)
            return found
        try:
            with sharded.views_allowed():
                found = super().train(*args, **options)
            sharded.gather(self.model, self.whole)
        finally:
            nn.Module.to(self.whole, self.args.device)
        return found

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stock optimiser; parameters of the method are a group of their own, without weight decay."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.whole is None:
            self._add_companions(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stock schedule. By now accelerate has split the student, and put the shards into the optimiser."""
        if self.whole is not None:
            sharded.keep_head_whole(self.model)
            self._add_companions(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _add_companions(self, optimizer: Any) -> None:
        if own := self.objective.method.companions:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch; `inputs` are `labels` and what the models take."""
        features = {name: value for name, value in inputs.items() if name != "labels"}
        compute = self._classifier_loss if self.classifies else self._causal_loss
        with self._autocast():
            loss, named, outputs = compute(model, features, inputs["labels"], num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # num_items_in_batch counts all processes, and DDP averages gradients where we want their sum.
            scale = self.accelerator.num_processes
            loss, named = loss * scale, {name: value * scale for name, value in named.items()}
        if model.training:
            self._remember(named)
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def _autocast(self) -> Any:
        """accelerate's, which leaves it to DeepSpeed where that runs; teacher and losses are ours there too."""
        if self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()

    def _causal_loss(
        self, model: nn.Module, features: dict[str, Any], labels: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(loss, named losses, nothing) of blocks of text."""
        teacher_hidden, teacher_signals, top = None, Signals(), TopK.taken_from(features)
        if self.teacher is not None:
            run = self.teacher.base_model  # its head is left to the objective
            out, teacher_signals = self._watch_teacher(lambda **more: run(**features, use_cache=False, **more))
            teacher_hidden = out.last_hidden_state
            assert self.teacher_head is not None
            self._look_at_teacher(teacher_hidden, self.teacher_head(teacher_hidden[:, -1:]))
        if top is not None:
            self.watch.add_teacher(~top.log_probs.isnan().any())
        out, signals = self._watch_student(
            model, lambda **more: model(**features, logits_to_keep=1, use_cache=False, **more), hidden=True
        )
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        head = head if self.whole is None else sharded.Bare(head)
        loss, named = self.objective(
            out.hidden_states[-1], head, teacher_hidden, self.teacher_head, labels, items,
            moment=self._moment, signals=(signals, teacher_signals), extra=self._extra(model, head, features),
            teacher_top=top,
        )  # fmt: skip
        return self._through_all(loss, out), named, {}

    def _classifier_loss(
        self, model: nn.Module, features: dict[str, Any], labels: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(loss, named losses, logits) of padded sequences."""
        teacher_logits, teacher_signals = None, Signals()
        if self.teacher is not None:
            teach = self.teacher
            out, teacher_signals = self._watch_teacher(lambda **more: teach(**features, use_cache=False, **more))
            teacher_logits = out.logits
            self._look_at_teacher(teacher_logits)
        hidden = self.objective.method.hidden
        out, signals = self._watch_student(model, lambda **more: model(**features, use_cache=False, **more), hidden)
        mask = features.get("attention_mask")
        loss, named = self.objective.classify(
            out.logits, teacher_logits, labels, torch.ones_like(features["input_ids"]) if mask is None else mask,
            items, moment=self._moment, signals=(signals, teacher_signals), extra=self._extra(model, None, features),
        )  # fmt: skip
        return self._through_all(loss, out), named, {"logits": out.logits.detach()}

    def _through_all(self, loss: Tensor, out: Any) -> Tensor:
        """DDP waits for a gradient of every parameter that the outputs depend on; FSDP2 follows the outputs alone.

        An objective without a loss of the logits gives none to the head, nor to blocks above the last it compares; then
        zeros are sent there.
        """
        reached = any(name in LOSSES for name in self.objective.method.weights(self._moment))
        if self.whole is None and (self.accelerator.num_processes == 1 or reached):
            return loss
        ends = [out.logits, *(out.hidden_states or ())[-1:]]
        return loss + 0 * sum(end.float().sum() for end in ends)

    def _watch_student(self, model: nn.Module, call: Any, hidden: bool) -> tuple[Any, Signals]:
        return observed(self.accelerator.unwrap_model(model), call, hidden, self.objective.method.attention.student)

    def _watch_teacher(self, call: Any) -> tuple[Any, Signals]:
        assert self.teacher is not None
        method = self.objective.method
        with torch.set_grad_enabled(method.trains_teacher and torch.is_grad_enabled()):
            return observed(self.teacher, call, method.hidden, method.attention.teacher)

    def _look_at_teacher(self, *outputs: Tensor) -> None:
        """A teacher that is trained too may diverge like the student, so it is no culprit."""
        if not self.objective.method.trains_teacher:
            self.watch.add_teacher(torch.stack([sound(one) for one in outputs]).all())

    def _extra(self, model: nn.Module, head: nn.Module | None, features: dict[str, Any]) -> Extra | None:
        """The method's terms on inputs of its own, if it makes any."""
        objective = self.objective
        if not objective.method.makes_inputs:
            return None
        assert self.teacher is not None
        # Unwrapped: the gradients of this second run of the student add up in the same parameters.
        student = self.accelerator.unwrap_model(model)
        settings = objective.method.temperature(self._moment), objective.config.chunk_tokens
        pair = Pair(student, self.teacher, head, self.teacher_head, *settings)
        learning = model.training and torch.is_grad_enabled()
        return lambda batch: objective.method.extra_terms(pair, features, batch, learning)

    @property
    def _moment(self) -> Moment:
        return Moment(self.state.global_step, max(1, self.state.max_steps))

    def _remember(self, named: dict[str, Tensor]) -> None:
        """Add up on the device; reading a number here would wait for it in every micro-step."""
        self._kind = frozenset(named)
        for name, value in named.items():
            self._running[name] = self._running[name] + value if name in self._running else value
            self._running_steps.setdefault(name, set()).add(self.state.global_step)

    def loss_kind(self) -> frozenset[str]:
        return self._kind

    def _own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        yield from super()._own_parameters()
        yield from self.objective.method.named_parameters(prefix="method")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own words for a full disk
            raise OutputError(
                f"Could not write a checkpoint in {self.args.output_dir}: {error}. Earlier checkpoints are whole. "
                "Free some space and resume, or choose another place."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.whole is None:
            super().save_model(output_dir, _internal_call)
            return
        sharded.gather(self.model, self.whole)
        if self.args.should_save:
            self.whole.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.whole is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded.read_weights(resume_from_checkpoint, self.whole)
        sharded.scatter(self.whole, self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.whole is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            sharded.save_state(self.optimizer, self.lr_scheduler, output_dir if self.args.should_save else None)
        if self.args.should_save:
            checkpoints.save_method(self.objective.method, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.whole is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            sharded.load_state(self.optimizer, self.lr_scheduler, checkpoint)
            self.use_own_learning_rate()
        if checkpoint is not None:
            checkpoints.load_method(self.objective.method, checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each named loss, as a mean over the steps since the last log, to training logs."""
        if self._running and "loss" in logs:
            # a method may change its losses on the way, so each has a number of steps of its own
            sums = self.accelerator.reduce(torch.stack(list(self._running.values())), "mean").tolist()
            steps = [len(self._running_steps[name]) for name in self._running]
            logs.update({name: s / n for name, s, n in zip(self._running, sums, steps, strict=True)})
            self._running, self._running_steps = {}, {}
        super().log(logs, start_time)


def check_objective(
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredTeacher | None,
    seed: int,
    block: int | None = None,
) -> None:
    """Everything that can be wrong between an objective and a pair, and `objective.bind`. Raises InputError."""
    config = objective.config
    if isinstance(teacher, StoredTeacher):
        teacher.check_objective(config)
        teacher.check_student(student)
        check_pair(student, None, block)
        objective.bind(student, None, seed)
        return
    if objective.needs_teacher and teacher is None:
        cause = "kl is above 0" if config.weights.get("kl") else f"method {config.method} compares with one"
        way_out = "set kl to 0" if config.weights.get("kl") and config.method == "kd" else "choose method kd with kl 0"
        raise InputError(f"This objective needs a teacher ({cause}); pass one, or {way_out}.")
    teacher = teacher if objective.needs_teacher else None
    check_pair(student, teacher, block)
    objective.bind(student, teacher, seed)

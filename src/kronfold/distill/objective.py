"""What the student is trained on: a method, named losses with their weights, a temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.distill import method as methods
from kronfold.distill.attention import attention_fault
from kronfold.distill.chunked import chunked_loss, head_parameters
from kronfold.distill.losses import IGNORE, LOSSES, REGRESSION_LOSSES, TopK, count_tokens
from kronfold.distill.method import Method, Shape
from kronfold.distill.methods import METHODS
from kronfold.distill.signals import START, Batch, Moment, Signals, at_least_float32, causal_weights, sequence_weights
from kronfold.options.healing import ObjectiveConfig

Extra = Callable[[Batch], tuple[dict[str, Tensor], Tensor | None]]


class Objective:
    """A config made callable. For language models it shifts the labels: position i predicts token i + 1.

    Raises InputError: an unknown method or option (with near names), an option that cannot be used, no
    weight above 0.

    Attributes:
        method: the method, which `bind` must have seen the pair for, if it has terms of its own. Its parameters are to
            be trained with the student.
    """

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        self.config = config or ObjectiveConfig()
        self.method: Method = METHODS.get(self.config.method)(self.config)
        if not self.config.weights and not self.method.term_weights:
            raise InputError("Every weight of the objective is 0; set at least one of ce, kl.")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of the objective is compared with a teacher."""
        return self.method.needs_teacher

    def bind(self, student: PreTrainedModel, teacher: PreTrainedModel | None, seed: int = 0) -> None:
        """Check the method against the pair and build its projections, the same for the same seed.

        Raises InputError, every reason a method has: layers out of range, heads that differ, no attention maps.
        """
        teacher = teacher if self.needs_teacher else None
        shapes = [Shape.of(m) for m in (student, teacher) if m is not None]
        methods.bind(self.method, shapes[0], shapes[1] if teacher is not None else None, seed)
        wanted = self.method.attention
        self.method.attach(student, teacher)
        for role, model, layers in (("student", student, wanted.student), ("teacher", teacher, wanted.teacher)):
            fault = attention_fault(model, layers, wanted.values) if model is not None and layers else None
            if fault:
                raise InputError(f"Method {self.config.method} needs the attention of the {role}: {fault}")

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: nn.Module,
        teacher_hidden: Tensor | None,
        teacher_head: nn.Module | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        *,
        moment: Moment = START,
        signals: tuple[Signals, Signals] | None = None,
        extra: Extra | None = None,
        teacher_top: TopK | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and each named loss by itself (unweighted, detached).

        Args:
            student_hidden: (batch, length, width), after the final norm.
            teacher_hidden: (batch, length, teacher width); None when `needs_teacher` is False.
            labels: (batch, length), the input tokens themselves, IGNORE where nothing is to be learnt.
            num_items_in_batch: predicted tokens of the whole batch that this micro-batch is a part of.
                Everything is divided by it, so gradients of micro-batches add up to exactly those of the
                batch. Default: those of this micro-batch, which makes each value a per-token mean.
            moment: where the training stands, for methods with a schedule.
            signals: of student and teacher, for methods with terms beyond the logits. These are means over the
                predicting positions, divided as all else.
            extra: gives terms, and a number to add, on inputs of the method's own (`Method.extra_terms`).
            teacher_top: (batch, length, ...), instead of teacher_hidden and teacher_head, for methods that
                `learns_from_top_k`; at the temperature of the method.

        Raises:
            InputError: the objective needs a teacher and none is given.
        """
        # The last position predicts nothing. Ignoring it keeps the hidden states in place; slicing would copy
        # them.
        shifted = torch.full_like(labels, IGNORE)
        shifted[:, :-1] = labels[:, 1:]
        items = count_tokens(shifted).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        weights = self.method.weights(moment)
        sides = (student_hidden, student_head), (teacher_hidden, teacher_head)
        total, named = self._chunked(*sides, shifted, weights, moment, items, teacher_top)
        if partner := self.method.partner_weights(moment):
            other, taught = self._chunked(sides[1], sides[0], shifted, partner, moment, items)
            total, named = total + other, named | {f"teacher_{name}": value for name, value in taught.items()}
        if signals is None:
            return total, named
        batch = Batch(causal_weights(shifted, items, at_least_float32(student_hidden).dtype), moment)
        return self._with_terms(total, named, weights, signals, batch, extra)

    def _chunked(
        self,
        learner: tuple[Tensor | None, nn.Module | None],
        other: tuple[Tensor | None, nn.Module | None],
        shifted: Tensor,
        weights: Mapping[str, float],
        moment: Moment,
        items: Tensor | int,
        top: TopK | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the logits of `learner` (hidden states, head), the other side held fixed."""
        (hidden, head), (other_hidden, other_head) = learner, other
        assert hidden is not None
        assert head is not None
        chosen = {name: weight for name, weight in weights.items() if name in LOSSES}
        if not chosen:
            return hidden.new_zeros((), dtype=at_least_float32(hidden).dtype), {}
        total, sums = chunked_loss(
            hidden.flatten(0, 1),
            head,
            head_parameters(head),
            shifted.flatten(),
            chosen,
            teacher_hidden=None if other_hidden is None else other_hidden.detach().flatten(0, 1),
            teacher_head=other_head,
            teacher_top=None if top is None else top.flat(),
            temperature=self.method.temperature(moment),
            chunk_tokens=self.config.chunk_tokens,
        )
        return total / items, dict(zip(chosen, sums / items, strict=True))

    def classify(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        *,
        moment: Moment = START,
        signals: tuple[Signals, Signals] | None = None,
        extra: Extra | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for sequence classification and regression.

        Regression is what a single logit means: `ce` then is the squared error to the label, `kl` that to the
        teacher's prediction, and they are reported as `label_mse` and `teacher_mse`.

        Args:
            student_logits, teacher_logits: (batch, classes).
            labels: (batch,), integers; numbers for regression.
            attention_mask: (batch, length), 0 on padding; the positions that terms of the method are means over.
            num_items_in_batch: sequences of the whole batch. Default: those of this micro-batch.
        """
        items = len(labels) if num_items_in_batch is None else num_items_in_batch
        weights = self.method.weights(moment)
        student = at_least_float32(student_logits)
        teacher = None if teacher_logits is None else at_least_float32(teacher_logits)
        total, named = self._plain(student, teacher, labels, weights, moment, items)
        if (partner := self.method.partner_weights(moment)) and teacher is not None:
            other, taught = self._plain(teacher, student, labels, partner, moment, items)
            total, named = total + other, named | {f"teacher_{name}": value for name, value in taught.items()}
        if signals is None:
            return total, named
        batch = Batch(sequence_weights(attention_mask, items, student.dtype), moment)
        return self._with_terms(total, named, weights, signals, batch, extra)

    def _plain(
        self,
        learner: Tensor,
        other: Tensor | None,
        labels: Tensor,
        weights: Mapping[str, float],
        moment: Moment,
        items: Tensor | int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of logits (batch, classes), the other side held fixed."""
        total, named = learner.new_zeros(()), {}
        for name in [name for name in weights if name in LOSSES]:
            plain = (name, LOSSES.get(name))
            reported, loss = REGRESSION_LOSSES.get(name, plain) if learner.shape[-1] == 1 else plain
            fixed = None if other is None else other.detach()
            value = loss.function(learner, fixed, labels, self.method.temperature(moment)) / items
            total, named[reported] = total + weights[name] * value, value.detach()
        return total, named

    def _with_terms(
        self,
        total: Tensor,
        named: dict[str, Tensor],
        weights: Mapping[str, float],
        signals: tuple[Signals, Signals],
        batch: Batch,
        extra: Extra | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms, as_it_is = extra(batch) if extra else ({}, None)
        for name, value in {**self.method.terms(*signals, batch), **terms}.items():
            if name in weights:
                total, named[name] = total + weights[name] * value, value.detach()
        return (total if as_it_is is None else total + as_it_is), named

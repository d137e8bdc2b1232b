"""Intermediate-layer distillation (ILKD), as KnGPT2 heals and fine-tunes, and the cosine loss of DistilGPT2.

Edalati et al. 2021, "Kronecker Decomposition for GPT Compression" (arXiv 2110.08152): mean squared error of the
embedding outputs, KL of the attention maps and mean squared error of the hidden states of every layer, plus cross
entropy, each with a weight (the paper does not give them). The paper sums over layers; here each term is the mean over
the compared layers, so that a weight means the same at every depth.

Sanh et al. 2019, "DistilBERT" (arXiv 1910.01108), section 2, and the DistilGPT2 made the same way: cosine of the last
hidden states. Weights of DistilGPT2: kl 5 at temperature 2, cosine 1, ce 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.method import AttentionLayers, Method, Shape, hidden_pairs, layer_map
from kronfold.distill.signals import Batch, Signals, attention_divergence, cosine_distance, squared_error

_NAMES = ("embedding", "attention", "hidden", "cosine")
_PAPER = {"embedding": 1.0, "attention": 1.0, "hidden": 1.0}


@dataclass(frozen=True)
class IntermediateOptions(method.MethodOptions):
    """Weights, and which teacher block each student block follows.

    A weight that is not given is 0; with none given, embedding, attention and hidden are 1 as in KnGPT2.

    Args:
        embedding: weight of the mean squared error of the embedding outputs.
        attention: weight of KL(teacher ‖ student) of the attention maps, head by head.
        hidden: weight of the mean squared error of the hidden states after each block.
        cosine: weight of 1 - cosine of the last hidden states.
        teacher_layers: auto, kept, uniform, or a teacher block for each student block (`layer_map`).
    """

    embedding: float | None = None
    attention: float | None = None
    hidden: float | None = None
    cosine: float | None = None
    teacher_layers: str | tuple[int, ...] = "auto"

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0, by name."""
        given = {name: getattr(self, name) for name in _NAMES if getattr(self, name) is not None}
        return {name: float(value) for name, value in (given or _PAPER).items() if value > 0}

    def faults(self) -> list[str]:
        given = {name: getattr(self, name) for name in _NAMES if getattr(self, name) is not None}
        faults = method.weight_faults(**given) + method.layers_faults(teacher_layers=self.teacher_layers)
        if given and not faults and not self.weights:
            faults.append(f"the weights of {', '.join(given)} are 0; give one of {', '.join(_NAMES)} a positive weight")
        return faults


class Intermediate(Method):
    """Compares embeddings, attention maps and hidden states; projects the student's where widths differ."""

    options_type: ClassVar = IntermediateOptions
    needs_teacher_always = True

    @property
    def term_weights(self) -> dict[str, float]:
        return self.options.weights

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        assert teacher is not None  # the objective refuses to run without one
        chosen = layer_map(self.options.teacher_layers, student, teacher)
        weights = self.term_weights
        self.hidden = bool(weights.keys() & {"embedding", "hidden", "cosine"})
        self.pairs = hidden_pairs(chosen, teacher.layers)
        if "attention" in weights:
            if student.heads != teacher.heads:
                raise InputError(
                    f"Attention maps are compared head by head; the student has {student.heads} heads and the teacher "
                    f"{teacher.heads}. Set attention to 0, or take rail, alp or pkd, which compare hidden states."
                )
            self.attention = AttentionLayers(tuple(range(student.layers)), chosen)
        if "embedding" in weights:
            self.project("embedding", student.width, teacher.width)
        for index, _ in self.pairs if "hidden" in weights else self.pairs[-1:] if "cosine" in weights else []:
            self.project(f"hidden_{index}", student.width, teacher.width)

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        def mine(index: int) -> Tensor:
            return self.projected(f"hidden_{index}", student.hidden_states[index])

        found = {}
        for name in self.term_weights:
            if name == "embedding":
                embedded = self.projected("embedding", student.hidden_states[0])
                found[name] = batch.mean(squared_error(embedded, teacher.hidden_states[0]))
            elif name == "attention":
                both = zip(self.attention.student, self.attention.teacher, strict=True)
                parts = [attention_divergence(student.attentions[s], teacher.attentions[t], batch) for s, t in both]
                found[name] = sum(parts[1:], parts[0]) / len(parts)
            elif name == "hidden":
                errors = [squared_error(mine(s), teacher.hidden_states[t]) for s, t in self.pairs]
                found[name] = batch.mean(sum(errors[1:], errors[0]) / len(errors))
            else:
                found[name] = batch.mean(cosine_distance(mine(self.pairs[-1][0]), teacher.hidden_states[-1]))
        return found

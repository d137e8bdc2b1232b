"""MATE-KD: a generator rewrites masked words so that teacher and student disagree; the student learns there as well.

Rashid et al. 2021, "MATE-KD: Masked Adversarial TExt, a Companion to Knowledge Distillation" (arXiv 2105.05912), as
described there. Words are masked at random, a generator fills the gaps, its choice made differentiable by the
straight-through Gumbel-softmax. In some steps the generator is moved to raise the divergence of teacher and student,
in all steps the student is moved to lower it on the text that came out.

The paper's generator is a masked language model (DistilRoBERTa). Here it must share the vocabulary of two causal
models, so it is made from the teacher: a copy of its first blocks with its embedding and head, which stay fixed. What
fills a gap is what this small causal model would say next after the words on its left, so it starts with plausible
text, needs no training of its own first, and works for every teacher. A learned vector stands in the gaps it reads.

What is drawn for a sequence follows from the seed, the step and its words, so it is the same however a batch is split.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.method import Method
from kronfold.distill.pairs import Pair
from kronfold.distill.signals import Batch, Moment
from kronfold.models.families import family_of


@dataclass(frozen=True)
class MATEOptions(method.MethodOptions):
    """The generator and when it learns.

    Args:
        adversarial: weight of T² KL(teacher ‖ student) on rewritten text.
        masked: share of the words that are rewritten (the first word of a text never is).
        every: the generator learns in one of so many steps; the paper has 10 of its steps for 100 of the student.
        generator_layers: blocks of the teacher that the generator copies.
        gumbel_temperature: of the straight-through softmax.
    """

    adversarial: float = 1.0
    masked: float = 0.3
    every: int = 10
    generator_layers: int = 2
    gumbel_temperature: float = 1.0

    def faults(self) -> list[str]:
        faults = method.weight_faults(
            adversarial=self.adversarial, masked=self.masked, gumbel_temperature=self.gumbel_temperature
        )
        faults += method.whole_faults(1, every=self.every, generator_layers=self.generator_layers)
        if not faults and not (self.adversarial > 0 and 0 < self.masked <= 1 and self.gumbel_temperature > 0):
            faults.append("adversarial and gumbel_temperature must be above 0, masked above 0 and at most 1")
        return faults


class Generator(nn.Module):
    """The first blocks of a model, filling gaps from the left. Only blocks, norm and the gap's vector are trained.

    Args:
        teacher: copied, not kept. layers: how many of its blocks. Raises InputError for more than it has.
    """

    def __init__(self, teacher: PreTrainedModel, layers: int) -> None:
        super().__init__()
        blocks = _blocks(teacher)
        if layers > len(teacher.get_submodule(blocks)):
            count = len(teacher.get_submodule(blocks))
            raise InputError(f"generator_layers={layers}: the teacher has {count} blocks; give at most that many.")
        parts = copy.deepcopy([teacher.base_model, teacher.get_output_embeddings()])
        self.base: PreTrainedModel = parts[0].float().requires_grad_(True)
        self.head: nn.Module | None = None if parts[1] is None else parts[1].float()
        _truncate(self.base, blocks.removeprefix(f"{teacher.base_model_prefix}."), layers)
        for fixed in (self.base.get_input_embeddings(), self.head):
            if fixed is not None:
                fixed.requires_grad_(False)
        table = embedding_table(self.base)
        self.gap = nn.Parameter(table.mean(0).detach().clone())

    def forward(self, ids: Tensor, gaps: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, length, width): the state that the word at each position is guessed from, one to the left of it."""
        embedded = self.base.get_input_embeddings()(ids)
        embedded = torch.where(gaps.unsqueeze(-1), self.gap.to(embedded.dtype), embedded)
        hidden = self.base(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return F.pad(hidden[:, :-1], (0, 0, 1, 0))

    def logits(self, states: Tensor) -> Tensor:
        """(words, vocabulary) of states (words, width)."""
        return self.head(states) if self.head is not None else states @ embedding_table(self.base).T


class MATE(Method):
    """`ce` and `kl` on the text as always, and the divergence on rewritten text, reported as `adversarial`."""

    options_type: ClassVar = MATEOptions
    needs_teacher_always = True
    makes_inputs = True

    @property
    def term_weights(self) -> dict[str, float]:
        return {"adversarial": self.options.adversarial}

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        assert teacher is not None
        self.generator = Generator(teacher, self.options.generator_layers).eval()

    def extra_terms(
        self, pair: Pair, features: Mapping[str, Any], batch: Batch, learning: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        gaps = self.gaps(features, batch.moment)
        learns = learning and batch.moment.step % self.options.every == 0
        ascent = self._ascent(pair, features, gaps, batch) if learns else None
        with torch.no_grad():
            states = self.generator(features["input_ids"], gaps, features.get("attention_mask"))
            ids = features["input_ids"].clone()
            for row, (chosen, noise) in enumerate(self._rows(features["input_ids"], gaps, batch.moment)):
                ids[row, chosen] = (self.generator.logits(states[row, chosen]) + noise).argmax(-1)
        rewritten = {**features, "input_ids": ids}
        return {"adversarial": pair.divergence(rewritten, rewritten, batch)}, ascent

    def _ascent(self, pair: Pair, features: Mapping[str, Any], gaps: Tensor, batch: Batch) -> Tensor:
        """A number that is 0 and whose gradient moves the generator, and nothing else, to raise the divergence."""
        own = self.companions
        if not gaps.any():
            return sum((0 * p).sum() for p in own)  # type: ignore[return-value]  # every process takes part
        inputs = self.rewritten_embeddings(features, gaps, batch.moment, [pair.student, pair.teacher])
        rest = {name: value for name, value in features.items() if name != "input_ids"}
        student, teacher = ({**rest, "inputs_embeds": embedded} for embedded in inputs)
        apart = pair.divergence(student, teacher, batch, through_teacher=True)
        with torch.autocast(apart.device.type, enabled=False):  # autocast is for forward alone
            found = torch.autograd.grad(apart, own, allow_unused=True)
        slope = sum(-(g.detach() * p).sum() for g, p in zip(found, own, strict=True) if g is not None)
        assert isinstance(slope, Tensor)
        return slope - slope.detach()

    def rewritten_embeddings(
        self, features: Mapping[str, Any], gaps: Tensor, moment: Moment, models: list[Any]
    ) -> list[Tensor]:
        """Embeddings (batch, length, width) of the rewritten text in each model, differentiable in the generator."""
        ids = features["input_ids"]
        states = self.generator(ids, gaps, features.get("attention_mask"))
        tables = [embedding_table(model).detach() for model in models]
        embedded = [model.get_input_embeddings()(ids).detach().clone() for model in models]
        for row, (chosen, noise) in enumerate(self._rows(ids, gaps, moment)):
            # a sequence at a time, computed anew in backward: (gaps, vocabulary) is the largest thing here
            words = checkpoint(self._embed, states[row, chosen], noise, *tables, use_reentrant=False)
            for one, filled in zip(embedded, words, strict=True):
                one[row, chosen] = filled.to(one.dtype)
        return embedded

    def _embed(self, states: Tensor, noise: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """Straight-through Gumbel-softmax: forward a word, backward the mixture of all words."""
        soft = torch.softmax((self.generator.logits(states).float() + noise) / self.options.gumbel_temperature, dim=-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        choice = hard + soft - soft.detach()
        return tuple(choice.to(table.dtype) @ table for table in tables)

    def gaps(self, features: Mapping[str, Any], moment: Moment) -> Tensor:
        """(batch, length), True at the words to rewrite: never the first of a text, never padding."""
        ids, mask = features["input_ids"], features.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        first = real & (real.cumsum(1) == 1)
        draws = [torch.rand(r.shape, generator=g, device=r.device) for r, g in self._draws(ids, moment, "gaps")]
        return real & ~first & (torch.stack(draws) < self.options.masked)

    def _rows(self, ids: Tensor, gaps: Tensor, moment: Moment) -> Any:
        """For each sequence (positions of its gaps, Gumbel noise (gaps, vocabulary))."""
        vocabulary = self.generator.base.config.vocab_size
        for gap, (_, generator) in zip(gaps, self._draws(ids, moment, "words"), strict=True):
            chosen = gap.nonzero().squeeze(-1)
            uniform = torch.rand(len(chosen), vocabulary, generator=generator, device=ids.device).clamp(1e-20, 1 - 1e-7)
            yield chosen, -(-uniform.log()).log()

    def _draws(self, ids: Tensor, moment: Moment, what: str) -> Any:
        """For each sequence (its words, a random generator that depends on seed, step, words and purpose)."""
        for row in ids:
            words = row.cpu().numpy().astype("<i8").tobytes()
            digest = hashlib.sha256(f"{self.seed} {moment.step} {what} ".encode() + words).digest()
            yield row, torch.Generator(row.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def embedding_table(model: PreTrainedModel) -> Tensor:
    """(vocabulary, width): the embedding of every word, also of a structured embedding."""
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        return embedding.weight[: model.config.vocab_size]
    device = next(embedding.parameters()).device
    return embedding(torch.arange(model.config.vocab_size, device=device))


def _blocks(model: PreTrainedModel) -> str:
    """Dotted name of the list of blocks, in a classifier too, which keeps them where the language model has them."""
    return family_of(model).blocks


def _truncate(base: PreTrainedModel, blocks: str, layers: int) -> None:
    parent, _, leaf = blocks.rpartition(".")
    setattr(base.get_submodule(parent), leaf, nn.ModuleList(base.get_submodule(blocks)[:layers]))
    base.config.num_hidden_layers = layers

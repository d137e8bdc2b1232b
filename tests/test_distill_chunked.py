"""The chunked head and losses against the straightforward full-logits computation, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronfold.base.errors import InputError
from kronfold.distill import IGNORE, chunked_loss, head_parameters
from kronfold.structures.levels import FactorizedEmbedding, TiedHead
from train_examples import gpt2, llama

TOKENS, WIDTH, VOCABULARY = 37, 12, 53
WEIGHTS = {"kl": 0.7, "ce": 1.3}


class Recorder(nn.Module):
    """Passes on to a head and notes the size of the largest logits it returned."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.largest = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        self.largest = max(self.largest, logits.numel())
        return logits


class SmallFactors(nn.Module):
    """A head of several small parameters, with a last operation that keeps its own output for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(5, WIDTH))
        self.up = nn.Parameter(torch.randn(VOCABULARY, 5))
        self.bias = nn.Parameter(torch.randn(VOCABULARY))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(F.linear(F.linear(hidden, self.down), self.up, self.bias))


def tied_factors() -> nn.Module:
    """A head without parameters of its own."""
    embedding = FactorizedEmbedding(VOCABULARY, WIDTH, [{"block": 2, "permute": True}], dtype=torch.float64)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    return TiedHead(embedding)


HEADS = {
    "linear": lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    "linear with bias": lambda: nn.Linear(WIDTH, VOCABULARY),
    "small factors": SmallFactors,
    "tied factors": tied_factors,
}


def case(head: str = "linear", dtype: torch.dtype = torch.float64):
    torch.manual_seed(3)
    student_head, teacher_head = HEADS[head]().to(dtype), nn.Linear(WIDTH + 4, VOCABULARY).to(dtype)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    teacher_hidden = torch.randn(TOKENS, WIDTH + 4, dtype=dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::5] = IGNORE
    return hidden, student_head, teacher_hidden, teacher_head, labels


def straightforward(hidden, head, teacher_hidden, teacher_head, labels, temperature):
    """The textbook losses on full logits."""
    student, teacher = head(hidden), teacher_head(teacher_hidden).detach()
    kept = labels != IGNORE
    q, p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    kl = temperature**2 * (p.exp() * (p - q)).sum(-1)[kept].sum()
    ce = F.cross_entropy(student, labels, ignore_index=IGNORE, reduction="sum")
    return WEIGHTS["kl"] * kl + WEIGHTS["ce"] * ce, torch.stack([kl, ce])


def chunked(hidden, head, teacher_hidden, teacher_head, labels, temperature, chunk_tokens):
    return chunked_loss(
        hidden,
        head,
        head_parameters(head),
        labels,
        WEIGHTS,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("chunk_tokens", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_value_and_gradients_equal_full_logits(head, temperature, chunk_tokens):
    hidden, student_head, *rest = case(head)
    inputs = [hidden, *head_parameters(student_head)]
    expected, expected_sums = straightforward(hidden, student_head, *rest, temperature)
    total, sums = chunked(hidden, student_head, *rest, temperature, chunk_tokens)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)
    # 3 x: backward must scale by what comes from above.
    for found, true in zip(
        torch.autograd.grad(3 * total, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        assert (found - true).norm() <= 1e-12 * true.norm()


def test_row_blocks_within_a_chunk_change_nothing(monkeypatch):
    hidden, head, *rest = case()
    whole = torch.autograd.grad(chunked(hidden, head, *rest, 2.0, 16)[0], hidden)[0]
    monkeypatch.setattr("kronfold.distill.chunked._CACHED_ELEMENTS", 3 * VOCABULARY)
    rows = torch.autograd.grad(chunked(hidden, head, *rest, 2.0, 16)[0], hidden)[0]
    torch.testing.assert_close(rows, whole, rtol=1e-12, atol=1e-15)


def test_gradcheck_by_finite_differences():
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(3, 5).double(), nn.Linear(3, 5).double()
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([1, IGNORE, 4, 0])

    def loss(hidden, *parameters):
        return chunked_loss(
            hidden,
            head,
            parameters,
            labels,
            WEIGHTS,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            temperature=2.0,
            chunk_tokens=3,
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, *head.parameters()))


def test_logits_alive_are_bounded_by_the_chunk():
    hidden, head, teacher_hidden, teacher_head, labels = case()
    student, teacher = Recorder(head), Recorder(teacher_head)
    chunked(hidden, student, teacher_hidden, teacher, labels, 1.0, 8)[0].backward()
    assert (student.largest, teacher.largest) == (8 * VOCABULARY, 8 * VOCABULARY)


def test_between_forward_and_backward_only_the_gradients_are_kept():
    hidden, head, *rest = case()
    total, _ = chunked(hidden, head, *rest, 1.0, 8)
    kept = sum(t.numel() for t in total.grad_fn.saved_tensors)
    assert kept == hidden.numel() + sum(p.numel() for p in head.parameters())


def test_no_grad_gives_the_values_and_no_graph():
    hidden, head, *rest = case()
    with torch.no_grad():
        total, sums = chunked(hidden, head, *rest, 2.0, 8)
    expected, expected_sums = straightforward(hidden, head, *rest, 2.0)
    assert not total.requires_grad
    torch.testing.assert_close((total, sums), (expected.detach(), expected_sums.detach()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen):
    hidden, head, *rest = case()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    wanted = list(head.parameters()) if frozen == "hidden" else [hidden]
    found = torch.autograd.grad(chunked(hidden, head, *rest, 1.0, 8)[0], wanted)
    true = torch.autograd.grad(straightforward(hidden, head, *rest, 1.0)[0], wanted)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-14)


def test_under_bf16_autocast_it_stays_near_float32():
    hidden, head, *rest = case(dtype=torch.float32)
    expected = torch.autograd.grad(straightforward(hidden, head, *rest, 1.0)[0], [hidden, *head.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = chunked(hidden, head, *rest, 1.0, 8)
    found = torch.autograd.grad(total, [hidden, *head.parameters()])
    assert total.dtype == torch.float32
    for gradient, true in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - true).norm() < 0.02 * true.norm()  # bfloat16 has 8 bits; measured 0.004


@pytest.mark.parametrize("model", [gpt2(), llama(tied=True)], ids=["gpt2", "llama"])
def test_tied_head_adds_up_with_the_input_embedding(model):
    model = copy.deepcopy(model).double().eval()
    embedding = model.get_input_embeddings().weight
    assert head_parameters(model)[0] is embedding
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()
    total, _ = chunked_loss(
        out.hidden_states[-1].flatten(0, 1),
        model.get_output_embeddings(),
        head_parameters(model),
        labels,
        {"ce": 1.0},
        chunk_tokens=5,
    )
    (found,) = torch.autograd.grad(total, embedding, retain_graph=True)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
    (true,) = torch.autograd.grad(expected, embedding)
    assert (found - true).norm() <= 1e-10 * true.norm()


def test_head_without_parameters_of_its_own_names_them():
    source = nn.Linear(WIDTH, VOCABULARY, bias=False)

    class Reader(nn.Module):
        def forward(self, hidden):
            return F.linear(hidden, source.weight)

        def source_parameters(self):
            return iter([source.weight])

    assert head_parameters(Reader()) == [source.weight]
    assert head_parameters(source) == [source.weight]


def test_a_loss_without_its_teacher_and_an_unknown_loss_are_refused():
    hidden, head, _, _, labels = case()
    with pytest.raises(InputError, match="'kl' compares with a teacher, but none was given"):
        chunked_loss(hidden, head, head_parameters(head), labels, {"kl": 1.0})
    with pytest.raises(InputError, match="Unknown loss 'mse'"):
        chunked_loss(hidden, head, head_parameters(head), labels, {"mse": 1.0})

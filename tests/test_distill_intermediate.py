"""Method `intermediate` by its oracles: each term by hand, layer maps, projections, options and refusals."""

from __future__ import annotations

import pytest
import torch

from kronfold.base.errors import InputError
from kronfold.distill import METHODS, Batch, Objective, ObjectiveConfig, Signals
from kronfold.distill.method import Shape, hidden_pairs, layer_map
from train_examples import gpt2, llama

TWELVE, SIX = Shape(12, 768, 12), Shape(6, 768, 12)


def config(**options) -> ObjectiveConfig:
    return ObjectiveConfig(kl=0, ce=0, method="intermediate", options=options)


def bound(student=SIX, teacher=TWELVE, **options):
    objective = Objective(config(**options))
    objective.method.bind(student, teacher)
    return objective.method


def states(layers: int, seed: int, width: int = 4) -> Signals:
    torch.manual_seed(seed)
    return Signals(tuple(torch.randn(2, 3, width, dtype=torch.float64) for _ in range(layers + 1)))


# two sequences, the last position of the second does not count
WEIGHTS = torch.tensor([[0.2, 0.2, 0.2], [0.2, 0.2, 0.0]], dtype=torch.float64)


def naive(mine, other, value) -> float:
    counted = [(b, t) for b in range(2) for t in range(3) if WEIGHTS[b, t] > 0]
    return sum(value(mine[b, t], other[b, t]).item() for b, t in counted) / len(counted)


def square(x, y):
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)


def test_terms_by_hand():
    shapes = Shape(2, 4, 2), Shape(4, 4, 2)
    method = bound(*shapes, embedding=1, hidden=1, cosine=1)
    mine, other = states(2, 0), states(4, 1)
    other.hidden_states[2][1, 2] = float("inf")  # padding may hold anything
    found = method.terms(mine, other, Batch(WEIGHTS))
    s, t = mine.hidden_states, other.hidden_states
    assert found["embedding"].item() == pytest.approx(naive(s[0], t[0], square))
    # block 0 follows block 1 of the teacher, the last the last
    expected = (naive(s[1], t[2], square) + naive(s[2], t[4], square)) / 2
    assert found["hidden"].item() == pytest.approx(expected)
    cosine = naive(s[2], t[4], lambda x, y: 1 - x @ y / (x.norm() * y.norm()))
    assert found["cosine"].item() == pytest.approx(cosine)


def test_layer_maps():
    assert layer_map("uniform", SIX, TWELVE) == (1, 3, 5, 7, 9, 11)
    assert layer_map("uniform", TWELVE, TWELVE) == tuple(range(12))
    assert layer_map("uniform", Shape(5, 8, 2), TWELVE) == (2, 4, 7, 9, 11)
    kept = Shape(6, 768, 12, kept=(0, 2, 4, 7, 9, 11))
    assert layer_map("kept", kept, TWELVE) == layer_map("auto", kept, TWELVE) == kept.kept
    assert layer_map("auto", kept, SIX) == tuple(range(6))  # a teacher that is truncated too
    assert layer_map("auto", SIX, TWELVE) == layer_map("uniform", SIX, TWELVE)
    assert layer_map([0, 0, 1, 1, 2, 2], SIX, TWELVE) == (0, 0, 1, 1, 2, 2)


def test_hidden_states_after_the_final_norm_are_compared_with_each_other_only():
    assert hidden_pairs((0, 2, 4, 6, 8, 10), 12) == [(1, 1), (2, 3), (3, 5), (4, 7), (5, 9), (6, 12)]
    assert hidden_pairs((11, 11), 12) == [(2, 12)]


def test_weights_not_named_are_zero_and_without_any_those_of_the_paper_hold():
    assert config().options == {}
    assert METHODS.get("intermediate")(config()).term_weights == {"embedding": 1, "attention": 1, "hidden": 1}
    assert METHODS.get("intermediate")(config(cosine=2)).term_weights == {"cosine": 2}
    assert Objective(config(cosine=2)).needs_teacher


def test_signals_are_asked_for_only_where_needed():
    assert not bound(attention=1).hidden
    assert bound(attention=1).attention.teacher == (1, 3, 5, 7, 9, 11)
    assert bound(hidden=1).attention.student == ()
    assert bound(hidden=1).hidden


def test_projections_stand_where_widths_differ():
    narrow = Shape(6, 5, 12)
    assert not list(bound().parameters())
    assert set(bound(narrow, embedding=1).projections) == {"embedding"}
    assert set(bound(narrow, cosine=1).projections) == {"hidden_6"}
    method = bound(narrow, hidden=1)
    assert set(method.projections) == {f"hidden_{i}" for i in range(1, 7)}
    assert {p.shape for p in method.parameters()} == {(768, 5)}


def test_binding_is_seeded_and_leaves_the_random_state_alone():
    def weight(seed):
        objective = Objective(config(embedding=1))
        objective.bind(gpt2(0), llama_wide(), seed)
        return objective.method.projections["embedding"].weight

    def llama_wide():
        return gpt2_of_width(24)

    torch.manual_seed(5)
    expected = torch.rand(1)
    student, teacher = gpt2(0), gpt2_of_width(24)
    torch.manual_seed(5)
    objective = Objective(config(embedding=1))
    objective.bind(student, teacher, 1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(weight(1), objective.method.projections["embedding"].weight)
    assert not torch.equal(weight(1), weight(2))


def gpt2_of_width(width):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=width, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": 1}, "Unknown option 'hiden' of method 'intermediate'. Did you mean 'hidden'"),
        ({"hidden": -1}, "hidden=-1 must be a finite number"),
        ({"hidden": "much"}, "hidden='much' must be a finite number"),
        ({"hidden": 0, "cosine": 0}, "the weights of hidden, cosine are 0"),
        ({"hidden": 1, "teacher_layers": 3}, "teacher_layers=3 must be auto, kept, uniform or a list"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        Objective(config(**options))


@pytest.mark.parametrize(
    ("options", "student", "message"),
    [
        ({"hidden": 1, "teacher_layers": "unifrom"}, SIX, "Unknown layer map 'unifrom'. Did you mean 'uniform'"),
        ({"hidden": 1, "teacher_layers": [0, 1]}, SIX, r"names 2 teacher blocks \[0, 1\], one is needed .* 6 blocks"),
        ({"hidden": 1, "teacher_layers": [0, 2, 4, 6, 8, 12]}, SIX, "Block 12 is out of range: the teacher .* 0 to 11"),
        ({"hidden": 1, "teacher_layers": "kept"}, SIX, "config of this student has none"),
        ({"attention": 1}, Shape(6, 768, 8), "student has 8 heads and the teacher 12"),
    ],
)
def test_pairs_that_do_not_fit(options, student, message):
    with pytest.raises(InputError, match=message):
        bound(student, **options)


def test_unknown_methods_and_keys_list_the_near_ones():
    with pytest.raises(InputError, match="Unknown distillation method 'intermediat'. Did you mean 'intermediate'"):
        Objective(ObjectiveConfig(method="intermediat"))
    with pytest.raises(
        InputError, match="Unknown option 'temprature' of method 'intermediate'. Did you mean 'temperature'"
    ):
        Objective(ObjectiveConfig(method="intermediate", temprature=2))
    flat = {"method": "intermediate", "ce": 1, "kl": 0, "embedding": 1, "attention": 1, "hidden": 1}
    found = ObjectiveConfig(**flat)
    assert found == ObjectiveConfig(
        ce=1, kl=0, method="intermediate", options={"embedding": 1, "attention": 1, "hidden": 1}
    )
    assert list(Objective(found).method.weights(None)) == ["ce", "embedding", "attention", "hidden"]


def test_a_model_without_attention_maps_is_refused_before_training(monkeypatch):
    student, teacher = llama(0), llama(1)
    for model in (student, teacher):
        model.config._attn_implementation_internal = "flash_attention_2"
        monkeypatch.setattr(type(model.base_model), "forward", _silent(type(model.base_model).forward))
    with pytest.raises(InputError, match="Method intermediate needs the attention of the student: .*no attention maps"):
        Objective(config(attention=1)).bind(student, teacher)


def _silent(forward):
    def run(self, *args, output_attentions=None, **kwargs):
        return forward(self, *args, **kwargs)

    return run

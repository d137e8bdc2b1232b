"""Each method against what its paper says: schedules, samples, weights and planted cases, not trained models."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2ForSequenceClassification

import pico
from kronfold.base.errors import InputError
from kronfold.distill import Batch, Moment, Objective, ObjectiveConfig, Signals
from kronfold.distill.attention import run_with_attention
from kronfold.distill.method import Shape, bind
from kronfold.distill.methods.mate import embedding_table
from kronfold.distill.pairs import Pair
from train_examples import gpt2, llama

WEIGHTS = torch.tensor([[0.2, 0.2, 0.2], [0.2, 0.2, 0.0]], dtype=torch.float64)


def method(name, student=(3, 4), teacher=(5, 4), seed=0, **options):
    config = ObjectiveConfig(kl=1.0, ce=0.5, temperature=2.0, method=name, options=options)
    built = Objective(config).method
    bind(built, Shape(*student, 2), Shape(*teacher, 2), seed)
    return built


def states(layers, seed, width=4):
    torch.manual_seed(seed)
    return Signals(tuple(torch.randn(2, 3, width, dtype=torch.float64) for _ in range(layers + 1)))


def at(step, steps=100):
    return Moment(step, steps)


# --- annealing --------------------------------------------------------------------------------------------------------


def test_annealing_temperatures_at_given_steps():
    annealing = method("annealing", max_temperature=5, regression=0.5)
    found = [annealing.annealing(at(step)) for step in (0, 9, 10, 19, 20, 29, 30, 39, 40, 49, 50, 99, 100)]
    assert found == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0]
    # Φ(T) = 1 - (T - 1) / T_max: at 5 of 5 a fifth of the teacher's logits, at 1 all of them
    factors = [1 / annealing.temperature(at(step)) for step in (0, 10, 20, 30, 40)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_annealing_phases_and_their_weights():
    annealing = method("annealing", max_temperature=5, regression=0.5)
    assert annealing.weights(at(49)) == {"logit_mse": 1.0}
    assert annealing.weights(at(50)) == {"ce": 0.5}
    with pytest.raises(InputError, match="two phases"):
        Objective(ObjectiveConfig(kl=1, ce=0, method="annealing"))
    with pytest.raises(InputError, match="max_temperature=2.5 must be a whole number, 1 or above; regression=1.0"):
        Objective(ObjectiveConfig(method="annealing", max_temperature=2.5, regression=1.0))


@pytest.mark.parametrize("step", [0, 30, 49, 70])
def test_annealing_loss_by_hand(step):
    config = ObjectiveConfig(kl=2.0, ce=0.5, method="annealing", options={"max_temperature": 5, "regression": 0.5})
    torch.manual_seed(0)
    z, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    loss, named = Objective(config).classify(z, t, labels, torch.ones(4, 2), moment=at(step))
    factor = {0: 0.2, 30: 0.8, 49: 1.0}.get(step)
    expected = 0.5 * F.cross_entropy(z, labels) if factor is None else 2 * (z - factor * t).square().mean()
    assert loss.item() == pytest.approx(expected.item())
    assert list(named) == ["ce" if factor is None else "logit_mse"]


# --- rail -------------------------------------------------------------------------------------------------------------


def test_rail_draws_sorted_uniformly_reproducibly_and_covers_the_teacher():
    rail = method("rail", student=(4, 4), teacher=(6, 4))
    draws = [tuple(rail.draw(at(step))) for step in range(2000)]
    assert all(list(d) == sorted(set(d)) and len(d) == 3 for d in draws)
    assert set().union(*draws) == set(range(5))  # all but the last block, which is no intermediate layer
    counts = Counter(draws)
    assert set(counts) == set(combinations(range(5), 3))
    # 10 choices, 200 of each expected; a chi-squared of 9 degrees of freedom exceeds 33 once in 8,000 seeds
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 33
    again = method("rail", student=(4, 4), teacher=(6, 4))
    assert [tuple(again.draw(at(step))) for step in (1999, 7, 500)] == [draws[1999], draws[7], draws[500]]
    other = method("rail", student=(4, 4), teacher=(6, 4), seed=1)
    assert [tuple(other.draw(at(step))) for step in range(50)] != draws[:50]


def test_rail_keeps_a_draw_for_as_long_as_asked():
    rail = method("rail", student=(4, 4), teacher=(6, 4), every=10)
    draws = [tuple(rail.draw(at(step))) for step in range(100)]
    assert all(len(set(draws[i : i + 10])) == 1 for i in range(0, 100, 10))
    assert len(set(draws)) > 3


@pytest.mark.parametrize("form", ["layerwise", "concatenated"])
def test_rail_term_by_hand(form):
    rail = method("rail", form=form)
    mine, other = states(3, 0), states(5, 1)
    other.hidden_states[2][1, 2] = float("nan")  # padding
    moment = at(3)

    def pooled(state, row):
        return state[row, : 3 if row == 0 else 2].mean(0)

    expected = 0.0
    for row, weight in ((0, 0.6), (1, 0.4)):
        pairs = [
            (pooled(mine.hidden_states[i + 1], row), pooled(other.hidden_states[block + 1], row))
            for i, block in enumerate(rail.draw(moment))
        ]
        unit = [(s / s.norm(), t / t.norm()) for s, t in pairs]
        if form == "layerwise":
            distance = sum((s - t).square().sum() for s, t in unit) / len(unit)
        else:  # each side is one vector of norm √2
            distance = sum((s - t).square().sum() for s, t in unit) / 2
        expected += weight * distance.item()
    found = rail.terms(mine, other, Batch(WEIGHTS, moment))["random_layers"]
    assert found.item() == pytest.approx(expected)


# --- alp --------------------------------------------------------------------------------------------------------------


def test_alp_weights_sum_to_one_and_become_a_fixed_map_when_one_layer_matches():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    candidates = (9 * directions[:4]).expand(2, 3, 4, 6)  # four orthogonal teacher layers
    state = candidates[..., 2, :]
    soft = method("alp").layer_weights(state, candidates)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    sharp = method("alp", sharpness=5.0).layer_weights(state, candidates)
    fixed = torch.tensor([0.0, 0, 1, 0], dtype=torch.float64).expand(2, 3, 4)
    torch.testing.assert_close(sharp, fixed, rtol=0, atol=1e-12)
    flat = method("alp", sharpness=0.0).layer_weights(state, candidates)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25))


def test_alp_term_by_hand_and_zero_for_a_matching_layer():
    alp, mine, other = method("alp"), states(3, 0), states(5, 1)
    total = 0.0
    for j in (1, 2):
        for row, position in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            h = mine.hidden_states[j][row, position]
            layers = [other.hidden_states[i][row, position] for i in (1, 2, 3, 4)]
            alpha = torch.softmax(torch.stack([h @ layer for layer in layers]) / 2, 0)
            mixture = sum(a * layer for a, layer in zip(alpha, layers, strict=True))
            total += 0.2 * (h - mixture).square().mean().item() / 2
    assert alp.terms(mine, other, Batch(WEIGHTS))["projected"].item() == pytest.approx(total)

    eye = 50 * torch.eye(4, dtype=torch.float64)
    spread = tuple(eye[i % 4].expand(2, 3, 4) for i in range(6))
    matching = Signals((spread[0], spread[2], spread[3], spread[0]))
    found = method("alp").terms(matching, Signals(spread), Batch(WEIGHTS))["projected"]
    assert found.item() == pytest.approx(0, abs=1e-12)


# --- pkd, minilm ------------------------------------------------------------------------------------------------------


def test_pkd_term_by_hand():
    pkd, mine, other = method("pkd", student=(3, 4), teacher=(6, 4)), states(3, 0), states(6, 1)
    assert pkd.pairs == [(1, 2), (2, 4)]  # every second, the last left out
    total = 0.0
    for s, t in pkd.pairs:
        for row, position in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            x, y = mine.hidden_states[s][row, position], other.hidden_states[t][row, position]
            total += 0.2 * (x / x.norm() - y / y.norm()).square().sum().item() / 2
    assert pkd.terms(mine, other, Batch(WEIGHTS))["patient"].item() == pytest.approx(total)
    with pytest.raises(InputError, match="none is left"):
        method("pkd", student=(1, 4))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_minilm_terms_by_hand(family):
    student, teacher = pico.family(family, 0).double(), pico.family(family, 3).double()
    ids = pico.ids(student, rows=2, length=6)
    minilm = method("minilm", student=(2, 32), teacher=(2, 32))
    assert (minilm.attention.student, minilm.attention.teacher, minilm.attention.values) == ((1,), (1,), True)

    def look(model):
        return Signals((), run_with_attention(model, lambda **more: model(ids, use_cache=False, **more), (1,))[1])

    signals = look(student), look(teacher)
    weights = torch.full((2, 6), 1 / 12, dtype=torch.float64)
    found = minilm.terms(*signals, Batch(weights))
    maps = []
    for model, signal in zip((student, teacher), signals, strict=True):
        eager = copy.deepcopy(model)
        eager.config._attn_implementation_internal = "eager"
        probabilities = eager(ids, output_attentions=True).attentions[1]
        value = signal.attentions[1].value.repeat_interleave(4 // signal.attentions[1].value.shape[1], dim=1)
        scores = value @ value.transpose(-1, -2) / value.shape[-1] ** 0.5
        scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), -1e30)
        maps.append((probabilities, scores.softmax(-1)))
    for index, name in enumerate(("attention", "values")):
        p, q = maps[1][index], maps[0][index]
        expected = torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0).sum(-1).mean()
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(InputError, match="2 heads and the teacher 3"):
        bind(Objective(ObjectiveConfig(method="minilm")).method, Shape(2, 6, 2), Shape(2, 6, 3))
    with pytest.raises(InputError, match="Block 4 is out of range"):
        method("minilm", teacher=(4, 4), teacher_layer=4)


# --- ctcd -------------------------------------------------------------------------------------------------------------


def test_ctcd_trains_both_and_each_side_is_fixed_for_the_other():
    config = ObjectiveConfig(
        kl=0.7, ce=0.3, temperature=2.0, method="ctcd", options={"teacher_ce": 0.4, "teacher_kl": 0.6}
    )
    torch.manual_seed(0)
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])

    def soft(learner, other):
        p, q = (other.detach() / 2).log_softmax(-1), (learner / 2).log_softmax(-1)
        return 4 * (p.exp() * (p - q)).sum(-1).mean()

    loss, named = Objective(config).classify(z, t, labels, torch.ones(5, 2))
    mine = 0.3 * F.cross_entropy(z, labels) + 0.7 * soft(z, t)
    theirs = 0.4 * F.cross_entropy(t, labels) + 0.6 * soft(t, z)
    assert list(named) == ["kl", "ce", "teacher_ce", "teacher_kl"]
    assert loss.item() == pytest.approx((mine + theirs).item())
    found = torch.autograd.grad(loss, [z, t])
    torch.testing.assert_close(found[0], torch.autograd.grad(mine, z)[0])
    torch.testing.assert_close(found[1], torch.autograd.grad(theirs, t)[0])


def test_ctcd_keeps_a_copy_and_leaves_the_given_teacher_alone():
    student, teacher = gpt2(0), gpt2(1).eval()
    objective = Objective(ObjectiveConfig(method="ctcd"))
    objective.bind(student, teacher)
    partner = objective.method.acting_teacher(teacher)
    assert partner is not teacher
    assert not {id(p) for p in partner.parameters()} & {id(p) for p in teacher.parameters()}
    assert {id(p) for p in objective.method.companions} == {id(p) for p in partner.parameters()}


# --- mate -------------------------------------------------------------------------------------------------------------


def mate(student, teacher, **options):
    objective = Objective(
        ObjectiveConfig(method="mate", options={"generator_layers": 1, "every": 1, "masked": 0.5, **options})
    )
    objective.bind(student, teacher, seed=0)
    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    return objective.method, Pair(student, teacher, *heads, temperature=1.0, chunk_tokens=7)


def text(rows=6, length=12):
    return {"input_ids": torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(2))}


def even(features):
    shape = features["input_ids"].shape
    return torch.full(shape, 1 / (shape[0] * shape[1]))


def test_mate_raises_the_divergence_of_a_planted_pair():
    """The student is its teacher, but reads the words 40 to 60 as others. The generator must learn to write those."""
    teacher, features = gpt2(1, dropout=0.0).eval(), text(4)
    table = teacher.transformer.wte.weight.data
    table.mul_(20)  # as large as those of a trained model, so that one word can be preferred to another
    student = copy.deepcopy(teacher)
    student.lm_head.weight = torch.nn.Parameter(table.clone())  # untied: it still says them right
    student.transformer.wte.weight.data[40:61] = table[:21]
    method_, pair = mate(student, teacher)

    @torch.no_grad()
    def measured():
        """(divergence on rewritten text, probability of the misread words in the gaps)"""
        apart, share = 0.0, 0.0
        for step in range(1000, 1006):  # draws that were not trained on
            moment = Moment(step, 1)
            gaps = method_.gaps(features, moment)
            batch = Batch(even(features), moment)
            apart += method_.extra_terms(pair, features, batch, False)[0]["adversarial"].item() / 6
            states = method_.generator(features["input_ids"], gaps, None)[gaps]
            share += method_.generator.logits(states).softmax(-1)[:, 40:61].sum(-1).mean().item() / 6
        return apart, share

    before = measured()
    adam = torch.optim.Adam(method_.companions, lr=0.02)
    for step in range(15):
        _, ascent = method_.extra_terms(pair, features, Batch(even(features), Moment(step, 100)), True)
        assert ascent.item() == 0
        adam.zero_grad()
        ascent.backward()
        adam.step()
    after = measured()
    assert after[0] > 1.4 * before[0]
    assert before[1] < 0.5 < 0.8 < after[1]


def test_mate_gradients_of_the_max_step_reach_the_generator_only_and_point_uphill():
    student, teacher, features = gpt2(0, dropout=0.0).eval(), gpt2(1, dropout=0.0).eval(), text()
    method_, pair = mate(student, teacher)
    batch = Batch(even(features), Moment(0, 10))
    _, ascent = method_.extra_terms(pair, features, batch, True)
    ascent.backward()
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method_.generator.base.h[0].parameters())
    assert method_.generator.gap.grad.abs().max() > 0
    assert all(p.grad is None for p in method_.generator.base.get_input_embeddings().parameters())
    # the gradient is minus that of the divergence through the straight-through embeddings
    inputs = method_.rewritten_embeddings(
        features, method_.gaps(features, batch.moment), batch.moment, [student, teacher]
    )
    apart = pair.divergence(*({"inputs_embeds": e} for e in inputs), batch, through_teacher=True)
    uphill = torch.autograd.grad(apart, method_.generator.gap)[0]
    torch.testing.assert_close(method_.generator.gap.grad, -uphill)


def test_mate_student_gradients_are_those_of_the_min_step_alone():
    student, teacher, features = gpt2(0, dropout=0.0).eval(), gpt2(1, dropout=0.0).eval(), text()
    method_, pair = mate(student, teacher, every=2)
    found = []
    for learning in (True, False):
        terms, ascent = method_.extra_terms(pair, features, Batch(even(features), Moment(0, 10)), learning)
        assert (ascent is None) is not learning
        student.zero_grad()
        (terms["adversarial"] + (0 if ascent is None else ascent)).backward()
        found.append([p.grad.clone() for p in student.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert method_.extra_terms(pair, features, Batch(even(features), Moment(1, 10)), True)[1] is None
    assert all(p.grad is None for p in teacher.parameters())


def test_mate_embeddings_are_whole_words_forward_and_mixtures_backward():
    student, teacher, features = gpt2(0).eval(), gpt2(1).eval(), text()
    method_, _ = mate(student, teacher)
    moment = Moment(3, 10)
    gaps = method_.gaps(features, moment)
    assert 0.2 < gaps.float().mean() < 0.7
    assert not gaps[:, 0].any()
    (embedded,) = method_.rewritten_embeddings(features, gaps, moment, [teacher])
    table = embedding_table(teacher)
    distances = torch.cdist(embedded, table).min(-1)
    assert distances.values.max() < 1e-3
    kept = ~gaps
    assert torch.equal(distances.indices[kept], features["input_ids"][kept])
    assert (distances.indices[gaps] != features["input_ids"][gaps]).float().mean() > 0.5


def test_mate_draws_depend_on_seed_step_and_words_not_on_the_batch():
    student, teacher, features = gpt2(0).eval(), gpt2(1).eval(), text()
    method_, _ = mate(student, teacher)
    whole = method_.gaps(features, Moment(3, 10))
    parts = [method_.gaps({"input_ids": part}, Moment(3, 10)) for part in features["input_ids"].split(2)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, method_.gaps(features, Moment(4, 10)))
    padded = {**features, "attention_mask": torch.ones(6, 12, dtype=torch.long)}
    padded["attention_mask"][0, 8:] = 0
    padded["attention_mask"][1, :3] = 0
    for step in range(8):
        gaps = method_.gaps(padded, Moment(step, 10))
        assert not gaps[0, 8:].any()
        assert not gaps[1, :4].any()


@pytest.mark.parametrize("make", [lambda: (gpt2(0), gpt2(1)), lambda: (llama(0), llama(1, tied=True))])
def test_mate_generator_is_the_start_of_the_teacher(make):
    student, teacher = (model.eval() for model in make())
    method_, _ = mate(student, teacher, generator_layers=2)
    ids = text()["input_ids"]
    states = method_.generator(ids, torch.zeros_like(ids, dtype=torch.bool), None)
    expected = teacher(ids).logits[:, :-1]  # two blocks of two, no gaps: what the teacher says next
    torch.testing.assert_close(method_.generator.logits(states[:, 1:]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="generator_layers=3: the teacher has 2 blocks"):
        mate(student, teacher, generator_layers=3)


def test_mate_generator_of_a_classifier_reads_its_embedding_as_head():
    teacher = GPT2ForSequenceClassification(gpt2(1).config)
    teacher.config.pad_token_id = 0
    objective = Objective(ObjectiveConfig(method="mate", options={"generator_layers": 1}))
    objective.bind(copy.deepcopy(teacher), teacher)
    assert objective.method.generator.logits(torch.zeros(2, 16)).shape == (2, 61)

"""One contract for every method: it trains, micro-batches add up, widths may differ, classification works."""

from __future__ import annotations

import copy
import functools
import gc
import tempfile

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    TrainingArguments,
)

from kronfold.base.errors import CheckpointError, InputError
from kronfold.distill import METHODS, ObjectiveConfig
from kronfold.train import DistillationTrainer, heal
from train_examples import VOCABULARY, Blocks, KillAfter, Stop

# method -> options that switch on everything it has
METHOD_OPTIONS = {
    "kd": {},
    "annealing": {"max_temperature": 4, "regression": 0.6},
    "pkd": {"patient": 1.0},
    "minilm": {"attention": 1.0, "values": 1.0},
    "rail": {"random_layers": 1.0},
    "alp": {"projected": 1.0},
    "mate": {"adversarial": 0.5, "every": 2, "generator_layers": 1},
    "ctcd": {"teacher_ce": 1.0, "teacher_kl": 0.5},
    "intermediate": {"embedding": 1.0, "attention": 1.0, "hidden": 1.0, "cosine": 0.5},
}
NAMES = sorted(METHOD_OPTIONS)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """The Trainer collects garbage after every run, for which it walks over all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pair(width=16, heads=2, student_layers=2):
    """(student, teacher): the teacher is 16 wide, 4 blocks deep, with 2 heads, and has learnt something."""
    return model(0, student_layers, width, heads), copy.deepcopy(taught())


@functools.cache
def taught():
    """A model that has learnt the language of `Blocks` in part."""
    teacher = model(1, 4)
    config = ObjectiveConfig(kl=0, ce=1)
    heal(teacher, None, Blocks(240), steps=30, batch_size=8, learning_rate=1e-2, bf16=False, objective=config)
    return teacher


def model(seed, layers, width=16, heads=2, kind=GPT2LMHeadModel, **options):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )  # fmt: skip
    made = kind(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def objective(name, **options):
    return ObjectiveConfig(
        kl=1.0, ce=0.5, temperature=2.0, chunk_tokens=50, method=name, options=METHOD_OPTIONS[name] | options
    )


class Sentences(Dataset):
    """Sequences of unequal length; the class is whether the first token is even, the number its share of the most."""

    def __init__(self, count=24, classes=2):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(1, VOCABULARY, (count, 10), generator=generator)
        self.lengths = torch.randint(4, 11, (count,), generator=generator)
        self.classes = classes

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        length = int(self.lengths[index])
        first = int(self.ids[index, 0])
        ids = self.ids[index].clone()
        ids[length:] = 0
        mask = (torch.arange(10) < length).long()
        label = first % 2 if self.classes > 1 else first / VOCABULARY
        return {"input_ids": ids, "attention_mask": mask, "labels": label}


def trainer(place, student, teacher, data, config, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        **options,
    }
    args = TrainingArguments(output_dir=str(place), use_cpu=True, report_to="none", disable_tqdm=True, **arguments)
    return DistillationTrainer(student, teacher, config, args=args, train_dataset=data)


def losses(loop, name="loss"):
    return [log[name] for log in loop.state.log_history if name in log and "train_runtime" not in log]


@torch.no_grad()
def divergence(student, teacher):
    """KL(teacher ‖ student) per token on all blocks."""
    ids = torch.stack([Blocks(24)[i]["input_ids"] for i in range(24)])
    z, t = (model.eval()(ids).logits.log_softmax(-1) for model in (student, teacher))
    return (t.exp() * (t - z)).sum(-1).mean().item()


@torch.no_grad()
def task_loss(model, data):
    items = [data[i] for i in range(len(data))]
    ids, mask = (torch.stack([item[key] for item in items]) for key in ("input_ids", "attention_mask"))
    logits, labels = model.eval()(ids, attention_mask=mask).logits, torch.tensor([item["labels"] for item in items])
    return logits, (F.cross_entropy(logits, labels) if data.classes > 1 else (logits[:, 0] - labels).square().mean())


def test_every_method_is_in_the_table():
    assert METHODS.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_text_with_a_narrower_student(tmp_path, name):
    student, teacher = pair(12)
    loop = trainer(tmp_path, student, teacher, Blocks(240), objective(name))
    before, apart = copy.deepcopy(teacher.state_dict()), divergence(student, teacher)
    loop.train()
    assert all(torch.tensor(losses(loop)).isfinite())
    assert divergence(student, teacher) < 0.9 * apart
    for term in loop.objective.method.term_weights:
        column = losses(loop, term)
        assert len(column) == 5
        assert column[-1] < column[0]
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in teacher.parameters())


@functools.cache
def taught_classifier(labels):
    teacher = model(1, 3, kind=GPT2ForSequenceClassification, num_labels=labels)
    config = ObjectiveConfig(kl=0, ce=1)
    with tempfile.TemporaryDirectory() as place:
        trainer(place, teacher, None, Sentences(240, labels), config, max_steps=40, logging_steps=40).train()
    return teacher


@pytest.mark.parametrize("labels", [2, 1])
@pytest.mark.parametrize("name", NAMES)
def test_it_fine_tunes_a_classifier_and_a_regression(tmp_path, name, labels):
    student, teacher = model(0, 2, kind=GPT2ForSequenceClassification, num_labels=labels), taught_classifier(labels)
    data = Sentences(96, labels)
    loop = trainer(tmp_path, student, copy.deepcopy(teacher), data, objective(name), max_steps=12)
    before = task_loss(student, data)[1]
    loop.train()
    assert all(torch.tensor(losses(loop)).isfinite())
    logits, after = task_loss(student, data)
    assert after < before
    torch.testing.assert_close(torch.from_numpy(loop.predict(data).predictions), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["text", "classes"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_whole_batch(tmp_path, name, task):
    """One step of plain gradient descent is the same for 8 sequences at once and 3 + 3 + 2."""
    moved = []
    for size, accumulate in ((8, 1), (3, 3)):
        kind = {} if task == "text" else {"kind": GPT2ForSequenceClassification, "num_labels": 3}
        width = 12 if task == "text" else 16
        student, teacher = model(0, 2, width, **kind), model(1, 4, **kind)
        data = Blocks(8, ignore=3) if task == "text" else Sentences(8)
        loop = trainer(
            tmp_path, student, teacher, data, objective(name), max_steps=1, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=size, learning_rate=1.0, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        loop.train()
        everything = [*student.named_parameters(), *loop.objective.method.named_parameters()]
        moved.append({n: p.detach().clone() for n, p in everything})
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-5)


# one of each kind: a schedule, projections, draws by step, a generator, a second model. kd: tests/test_train_heal.py
@pytest.mark.parametrize("name", ["annealing", "intermediate", "rail", "mate", "ctcd"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one_and_the_student_stays_a_plain_model(tmp_path, name):
    options = {
        "steps": 3, "batch_size": 6, "micro_batch": 3, "bf16": False, "learning_rate": 1e-2,
        "objective": objective(name),
    }  # fmt: skip
    whole, teacher = pair(12)
    true = heal(whole, teacher, Blocks(20), **options)
    student = pair(12)[0]
    with pytest.raises(Stop):
        heal(student, teacher, Blocks(20), output_dir=tmp_path, save_steps=2, callbacks=[KillAfter(2)], **options)
    student = model(7, 2, 12)
    found = heal(student, teacher, Blocks(20), output_dir=tmp_path, resume=True, save_steps=2, **options)
    assert found.resumed_from == 2
    torch.testing.assert_close(student.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [entry["loss"] for entry in found.losses[-1:]] == [entry["loss"] for entry in true.losses[-1:]]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(loaded.state_dict(), student.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["intermediate", "minilm", "mate", "ctcd"])
def test_it_runs_in_bfloat16(name):
    student, teacher = pair(12)
    result = heal(student, teacher, Blocks(8), steps=2, batch_size=4, bf16=True, log_every=1, objective=objective(name))
    exact = heal(*pair(12), Blocks(8), steps=2, batch_size=4, bf16=False, log_every=1, objective=objective(name))
    for found, expected in zip(result.losses, exact.losses, strict=True):
        for term in found:
            assert found[term] == pytest.approx(expected[term], rel=0.05, abs=5e-3), term


def test_projections_are_trained_clipped_saved_and_missed(tmp_path):
    student, teacher = pair(12)
    options = {"steps": 2, "bf16": False, "output_dir": tmp_path, "objective": objective("intermediate")}
    heal(student, teacher, Blocks(20), save_steps=1, **options)
    states = [torch.load(tmp_path / f"checkpoint-{i}" / "method.pt", weights_only=True) for i in (1, 2)]
    assert {key.split(".")[1] for key in states[0]} == {"embedding", "hidden_1", "hidden_2"}
    assert all(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "method.pt").unlink()
    with pytest.raises(CheckpointError, match="parameters of this run's method"):
        heal(pair(12)[0], teacher, Blocks(20), resume=True, save_steps=1, **options)


def test_a_torn_method_file_is_passed_by(tmp_path, caplog):
    teacher = pair(12)[1]
    options = {"steps": 4, "bf16": False, "output_dir": tmp_path, "save_steps": 2}
    options["objective"] = objective("intermediate")
    whole = pair(12)[0]
    heal(whole, teacher, Blocks(20), **options)
    torn = tmp_path / "checkpoint-4" / "method.pt"
    torn.write_bytes(torn.read_bytes()[:-50])
    student = model(7, 2, 12)
    assert heal(student, teacher, Blocks(20), resume=True, **options).resumed_from == 2
    assert "method.pt is cut off" in caplog.text
    torch.testing.assert_close(student.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_refusals_come_before_anything_is_written(tmp_path):
    student, teacher = pair()
    config = objective("intermediate")
    with pytest.raises(InputError, match="needs a teacher"):
        heal(student, None, Blocks(), steps=1, output_dir=tmp_path / "out", objective=config)
    with pytest.raises(InputError, match="method intermediate compares with one"):
        none = ObjectiveConfig(kl=0, ce=1, method="intermediate")
        heal(student, None, Blocks(), steps=1, output_dir=tmp_path / "out", objective=none)
    with pytest.raises(InputError, match="out of range"):
        far = objective("intermediate", teacher_layers=[0, 4])
        heal(student, teacher, Blocks(), steps=1, output_dir=tmp_path / "out", objective=far)
    with pytest.raises(InputError, match="predicts 61 tokens and the teacher 70"):
        other = GPT2LMHeadModel(GPT2Config(vocab_size=70, n_positions=32, n_embd=16, n_layer=2, n_head=2))
        heal(student, other, Blocks(), steps=1, output_dir=tmp_path / "out", objective=config)
    assert not (tmp_path / "out").exists()


def test_classifiers_that_do_not_fit_are_refused(tmp_path):
    kind = {"kind": GPT2ForSequenceClassification}
    student = model(0, 2, num_labels=2, **kind)
    with pytest.raises(InputError, match="2 classes and the teacher 3"):
        trainer(tmp_path, student, model(1, 4, num_labels=3, **kind), Sentences(), objective("kd"))
    with pytest.raises(InputError, match="GPT2ForSequenceClassification and the teacher a GPT2LMHeadModel"):
        trainer(tmp_path, student, model(1, 4), Sentences(), objective("kd"))
    student.config.pad_token_id = None
    with pytest.raises(InputError, match="student has no padding token"):
        trainer(tmp_path, student, None, Sentences(), ObjectiveConfig(kl=0, ce=1))

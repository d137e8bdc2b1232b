"""heal(): it heals, counts its tokens, resumes bitwise, leaves models and stdout as they were, refuses bad input."""

from __future__ import annotations

import copy
import errno
import json
import shutil

import pytest
import torch

from kronfold.base.errors import CheckpointError, DataError, InputError, OutputError
from kronfold.distill import ObjectiveConfig
from kronfold.train import HealConfig, heal
from kronfold.train.trainer import ShuffledStream
from train_examples import VOCABULARY, Blocks, KillAfter, Stop, gpt2

CE = ObjectiveConfig(kl=0, ce=1)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_heals_and_reports(capsys):
    teacher, data = gpt2(1, dropout=0.0), Blocks(64)
    heal(teacher, None, data, steps=60, objective=CE, learning_rate=1e-2, bf16=False)
    student, seen = gpt2(0, dropout=0.0), []
    result = heal(
        student, teacher, data, tokens=8 * 16 * 60 - 5, batch_size=8, micro_batch=4, learning_rate=1e-2, bf16=False,
        log_every=20, progress=lambda step, total, logs: seen.append((step, total, logs.get("kl"))),
    )  # fmt: skip
    assert (result.steps, result.tokens) == (60, 60 * 8 * 16)  # the budget is rounded up to whole steps
    assert [(e["step"], e["tokens"]) for e in result.losses] == [(1, 128), (20, 2560), (40, 5120), (60, 7680)]
    assert result.losses[-1]["kl"] < 0.5 * result.losses[0]["kl"]
    assert [s[:2] for s in seen] == [(i, 60) for i in range(1, 61)]
    assert seen[25][2] == result.losses[1]["kl"]
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == 7680
    assert result.tokens_per_second > 0
    assert capsys.readouterr().out == ""


def test_models_are_left_as_found():
    student, teacher = gpt2(0).eval(), gpt2(1).train()
    student.bfloat16()
    before = weights(teacher)
    for bf16 in (True, False):
        heal(student, teacher, Blocks(), steps=2, bf16=bf16, learning_rate=1e-3)
        assert not student.training
        assert teacher.training
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(student.__dict__)
        assert all(p.requires_grad and p.grad is None for m in (student, teacher) for p in m.parameters())
    assert student.config.use_cache
    assert student.dtype == torch.float32
    torch.testing.assert_close(weights(teacher), before, rtol=0, atol=0)


def test_bf16_runs_the_student_in_bfloat16():
    kinds = set()
    student = gpt2(0)
    hook = student.transformer.h[0].mlp.register_forward_hook(lambda m, i, out: kinds.add(out.dtype))
    result = heal(student, gpt2(1), Blocks(), steps=2, bf16=True)
    assert result.bf16
    assert torch.bfloat16 in kinds
    kinds.clear()
    heal(student, gpt2(1), Blocks(), steps=2, bf16=False)
    hook.remove()
    assert kinds == {torch.float32}


def test_dropout_is_off_unless_asked_for_and_the_rates_come_back():
    student = gpt2(0, dropout=0.5)
    rates = []
    watch = student.transformer.drop.register_forward_pre_hook(lambda module, _: rates.append(module.p))
    heal(student, None, Blocks(), steps=1, objective=CE)
    heal(student, None, Blocks(), steps=1, objective=CE, dropout=True)
    watch.remove()
    assert rates == [0.0, 0.0, 0.5, 0.5]  # the check of the head and one step, twice
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_same_seed_same_result_other_seed_other_result():
    results = []
    for seed in (3, 3, 4):
        student = gpt2(0)
        heal(student, gpt2(1), Blocks(), steps=3, batch_size=4, seed=seed, bf16=False)
        results.append(student.lm_head.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_dense_control_needs_no_teacher():
    student, data = gpt2(0), Blocks(64)
    result = heal(student, None, data, steps=30, objective=CE, learning_rate=1e-2, bf16=False, log_every=10)
    assert "kl" not in result.losses[0]
    assert result.losses[-1]["ce"] < result.losses[0]["ce"] - 0.3


@pytest.mark.parametrize("killed_at", [3, 8])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, killed_at):
    """N steps = k + resume + (N - k), with dropout, in the middle of and after the first pass over the data."""
    teacher, data = gpt2(1), Blocks(10)  # 2 x 2 blocks a step: an epoch ends within step 3
    options = {"steps": 10, "batch_size": 4, "micro_batch": 2, "bf16": False, "log_every": 2, "dropout": True}
    whole = gpt2(0)
    true = heal(whole, teacher, data, **options)
    options["save_steps"] = 2

    student = gpt2(0)
    with pytest.raises(Stop):
        heal(student, teacher, data, output_dir=tmp_path, callbacks=[KillAfter(killed_at)], **options)
    with pytest.raises(CheckpointError, match="student was"):
        heal(gpt2(5), teacher, data, output_dir=tmp_path, resume=True, **options)
    with pytest.raises(CheckpointError, match="teacher was"):
        heal(gpt2(0), gpt2(5), data, output_dir=tmp_path, resume=True, **options)
    student = gpt2(0)  # its weights come from the checkpoint
    found = heal(student, teacher, data, output_dir=tmp_path, resume=True, **options)
    assert found.resumed_from == killed_at - killed_at % 2
    assert (found.steps, found.tokens) == (true.steps, true.tokens)
    assert found.seconds_in_all == pytest.approx(found.seconds * 10 / (10 - found.resumed_from))
    assert true.seconds_in_all == pytest.approx(true.seconds)
    torch.testing.assert_close(weights(student), weights(whole), rtol=0, atol=0)
    assert [(e["step"], e["loss"], e["kl"]) for e in found.losses] == [
        (e["step"], e["loss"], e["kl"]) for e in true.losses
    ]

    again = gpt2(0)
    done = heal(again, teacher, data, output_dir=tmp_path, resume=True, **options)
    assert (done.steps, done.resumed_from, done.tokens_per_second) == (10, 10, 0)
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    "damaged", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "files.json"]
)
def test_a_damaged_newest_checkpoint_is_passed_by(tmp_path, damaged, caplog):
    teacher, data = gpt2(1), Blocks(10)
    options = {"steps": 6, "batch_size": 2, "bf16": False, "save_steps": 2}
    whole = gpt2(0)
    heal(whole, teacher, data, output_dir=tmp_path, **options)
    torn = tmp_path / "checkpoint-6" / damaged
    content = torn.read_bytes()
    if damaged == "trainer_state.json":
        torn.unlink()
    elif damaged == "optimizer.pt":  # one flipped bit, which every reader would take for a number
        torn.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    else:
        torn.write_bytes(content[:-100])
    student = gpt2(0)
    result = heal(student, teacher, data, output_dir=tmp_path, resume=True, **options)
    assert result.resumed_from == 4
    assert "checkpoint-6 is not whole" in caplog.text
    torch.testing.assert_close(weights(student), weights(whole), rtol=0, atol=0)


def test_a_full_disk_says_so_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    teacher, data, options = gpt2(1), Blocks(10), {"steps": 4, "batch_size": 2, "bf16": False, "save_steps": 2}
    whole, save = gpt2(0), torch.save
    heal(whole, teacher, data, **{**options, "save_steps": None})

    def full(content, path, *args):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path, *args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="Could not write a checkpoint.*No space left on device"):
        heal(gpt2(0), teacher, data, output_dir=tmp_path, **options)
    monkeypatch.undo()
    student = gpt2(0)
    assert heal(student, teacher, data, output_dir=tmp_path, resume=True, **options).resumed_from == 2
    torch.testing.assert_close(weights(student), weights(whole), rtol=0, atol=0)


def test_resume_without_a_whole_checkpoint_starts_afresh(tmp_path):
    teacher, data, options = gpt2(1), Blocks(10), {"steps": 2, "batch_size": 2, "bf16": False, "save_steps": 2}
    first = heal(gpt2(0), teacher, data, output_dir=tmp_path, resume=True, **options)
    assert first.resumed_from is None
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()
    assert heal(gpt2(0), teacher, data, output_dir=tmp_path, resume=True, **options).resumed_from is None


def test_output_of_another_run_is_not_touched(tmp_path):
    teacher, data, options = gpt2(1), Blocks(10), {"steps": 2, "batch_size": 2, "bf16": False}
    heal(gpt2(0), teacher, data, output_dir=tmp_path, **options)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="earlier healing"):
        heal(gpt2(0), teacher, data, output_dir=tmp_path, **options)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.0005 and is now 0\.5"):
        heal(gpt2(0), teacher, data, output_dir=tmp_path, resume=True, learning_rate=0.5, **options)
    with pytest.raises(CheckpointError, match=r"blocks was 10 and is now 11"):
        heal(gpt2(0), teacher, Blocks(11), output_dir=tmp_path, resume=True, **options)
    (tmp_path / "heal.json").unlink()
    with pytest.raises(CheckpointError, match=r"no heal\.json"):
        heal(gpt2(0), teacher, data, output_dir=tmp_path, resume=True, **options)
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path.name != "heal.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either as tokens or as steps"),
        ({"steps": 1, "tokens": 1}, "only one of them"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1 \(given: 0\)"),
        (
            {"steps": 1, "batch_size": 0, "learning_rate": -1.0},
            r"2 faults:\n  batch_size: .*given: 0\)\n  learning_rate: .*-1\.0",
        ),
        ({"steps": 1, "warmup": 1.0}, r"warmup: .*given: 1\.0"),
        ({"steps": 1, "schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"steps": 1, "bf16": "maybe"}, "bf16.*given: 'maybe'"),
        ({"steps": 1, "learn_rate": 1.0}, "learn_rate: unknown key. Did you mean 'learning_rate'"),
        ({"steps": 1, "save_steps": 1}, "output_dir"),
        ({"steps": 1, "resume": True}, "output_dir"),
    ],
)
def test_options_that_cannot_be_used_change_nothing(options, message):
    student = gpt2(0)
    before = weights(student)
    with pytest.raises(InputError, match=message):
        heal(student, gpt2(1), Blocks(), **options)
    torch.testing.assert_close(weights(student), before, rtol=0, atol=0)


def test_pairs_and_data_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="needs a teacher"):
        heal(gpt2(0), None, Blocks(), steps=1)
    with pytest.raises(InputError, match="predicts 61 tokens and the teacher 64"):
        heal(gpt2(0), gpt2(1, vocabulary=64), Blocks(), steps=1)
    with pytest.raises(InputError, match="longer than the 32 positions"):
        heal(gpt2(0), gpt2(1), Blocks(length=40), steps=1)
    with pytest.raises(DataError, match="no blocks"):
        heal(gpt2(0), gpt2(1), Blocks(count=0), steps=1)
    with pytest.raises(DataError, match="one token"):
        heal(gpt2(0), gpt2(1), Blocks(length=1), steps=1)
    ragged = [Blocks(length=8)[0], Blocks(length=9)[0]]
    with pytest.raises(DataError, match=r"the first is int64 \(8,\) and the last int64 \(9,\)"):
        heal(gpt2(0), gpt2(1), ragged, steps=1)


def test_a_diverged_run_says_so():
    student = gpt2(0)
    with torch.no_grad():
        student.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(InputError, match="The loss is nan at step 1: the healing has diverged"):
        heal(student, None, Blocks(), steps=2, objective=CE, bf16=False)
    assert "forward" not in student.__dict__


def test_the_stream_is_seeded_passes_over_everything_and_depends_on_the_position_only():
    data = list(range(10))
    stream = ShuffledStream(data, 35, seed=1)
    items = [stream[i] for i in range(len(stream))]
    passes = [items[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(p) == data for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert [stream[i] for i in (33, 4, 12)] == [items[i] for i in (33, 4, 12)]
    assert [ShuffledStream(data, 35, seed=2)[i] for i in range(10)] != passes[0]
    with pytest.raises(IndexError):
        stream[35]


def test_config_steps_and_defaults():
    assert HealConfig(tokens=1000).steps_for(300) == 4
    assert HealConfig(steps=7).steps_for(300) == 7
    assert copy.deepcopy(HealConfig(steps=7)) == HealConfig(steps=7)
    assert gpt2().config.vocab_size == VOCABULARY

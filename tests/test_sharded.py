"""A student in shards (FSDP2, two processes on a CPU) gives what a whole one gives: losses, weights, checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold  # noqa: F401  (so that from_pretrained knows structured checkpoints)
import process_jobs as jobs
import sharded_jobs
from kronfold.base.errors import CheckpointError, InputError
from kronfold.train import sharded
from test_processes import TESTS, launch
from train_examples import KillAfter, Stop, gpt2

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **sharded_jobs.WRAPPED}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(directory, facts) of sharded_jobs by two processes; before that, one process healed half of a run."""
    place = tmp_path_factory.mktemp("sharded")
    with pytest.raises(Stop):
        half = {"output_dir": place / "of-one", "save_steps": 2, "callbacks": [KillAfter(5)]}
        jobs.healed(sharded_jobs.resumable(), 1, **half)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FSDP.items():
            patch.setenv(name, value)
        launch(TESTS / "sharded_jobs.py", place)
    return place, torch.load(place / "facts.pt", weights_only=False)


@pytest.mark.parametrize("name", list(sharded_jobs.healings()))
def test_shards_heal_as_a_whole(together, name):
    job, two = sharded_jobs.healings()[name], together[1][name]
    before = [p.detach().clone() for p in job["student"].parameters()]
    one, weights, companions = jobs.healed(job, 1)
    assert (two["steps"], two["tokens"], two["companions"]) == (one["steps"], one["tokens"], companions)
    assert len(two["losses"]) == one["steps"]
    for first, second in zip(one["losses"], two["losses"], strict=True):
        assert second == pytest.approx(first, abs=1e-5)
    for found, expected in zip(two["weights"], weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    for found, expected in zip(two["student"], job["student"].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    moved = max((p - b).abs().max().item() for p, b in zip(job["student"].parameters(), before, strict=True))
    assert moved > 5e-3  # the bounds above are small beside what the training did


def test_each_process_holds_its_shard_and_afterwards_the_whole(together):
    for facts in together[1].values():
        assert facts["split"]
        assert sum(facts["shares"]) == pytest.approx(1)
        assert max(facts["shares"]) < 0.6
        assert facts["plain"], "the student still has parts of FSDP2 in it"
        assert facts["equal"], "the two processes hold different students"


def test_the_two_ways_to_split_are_both_there(together):
    """With the same student, data and seed, splitting block by block or not is no matter of the result."""
    blockwise, whole = together[1]["grouped"], together[1]["unwrapped"]
    for first, second in zip(blockwise["student"], whole["student"], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-4)


def test_a_checkpoint_of_shards_is_that_of_any_run(together):
    place, _ = together
    files = [{path.name for path in (place / run / "checkpoint-4").iterdir()} for run in ("of-one", "of-two")]
    assert files[0] - files[1] == {"rng_state.pth", "training_args.bin"}
    assert files[1] - files[0] == {"rng_state_0.pth", "rng_state_1.pth"}
    models = [AutoModelForCausalLM.from_pretrained(place / run / "checkpoint-4") for run in ("of-one", "of-two")]
    tokens = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(models[0](tokens).logits, models[1](tokens).logits, rtol=0, atol=2e-4)
    states = [torch.load(place / run / "checkpoint-4" / "optimizer.pt") for run in ("of-one", "of-two")]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, entry in states[0]["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(states[1]["state"][index][name], value, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_in_shards_and_out_of_them(together):
    place, facts = together
    whole, weights, companions = jobs.healed(sharded_jobs.resumable(), 1)
    assert companions > 0
    back = {"output_dir": place / "of-two", "resume": True, "save_steps": 2}
    found, out_of_them, _ = jobs.healed(sharded_jobs.resumable(), 1, **back)
    for resumed, reached in ((facts["resumed"], facts["resumed"]["weights"]), (found, out_of_them)):
        assert resumed["resumed_from"] == 4
        for tensor, expected in zip(reached, weights, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-4)
        for first, second in zip(whole["losses"], resumed["losses"], strict=True):
            assert second == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(
    ("setting", "job", "words"),
    [
        ({"FSDP_VERSION": "1"}, "kd", "set `fsdp_version: 2`"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "kd", "cannot use fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "kd", "cannot use fsdp_activation_checkpointing"),
        ({}, "mate", "Method mate runs the student a second time.*DDP"),
    ],
)
def test_what_shards_cannot_do_is_said_before_training(monkeypatch, setting, job, words):
    for name, value in {**FSDP, "LOCAL_RANK": "0", **setting}.items():
        monkeypatch.setenv(name, value)
    student = jobs.healings()[job]["student"]
    before = [p.detach().clone() for p in student.parameters()]
    with pytest.raises(InputError, match=words):
        jobs.healed({**jobs.healings()[job], "student": student}, 1)
    assert all(torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))


def test_teachers_that_differ_are_noticed(together):
    kind, words = json.loads((together[0] / "refused").read_text())
    assert kind == "InputError"
    assert "different teachers" in words
    assert "fsdp_cpu_ram_efficient_loading: false" in words


def test_shards_need_a_launcher_and_a_configuration(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert not sharded.asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharded.asked()  # one process without a launcher: nothing to split
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert sharded.asked()


def test_a_state_of_another_student_is_refused(tmp_path):
    model = gpt2(0)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    sharded.save_state(optimizer, scheduler, str(tmp_path))
    other = torch.optim.AdamW(gpt2(0, layers=1).parameters())
    with pytest.raises(CheckpointError, match="another student or method"):
        sharded.load_state(other, scheduler, str(tmp_path))

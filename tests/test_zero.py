"""DeepSpeed's ZeRO on two processes on a CPU gives what one process without it gives, and leaves a plain student."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import process_jobs as jobs
import zero_jobs
from kronfold.base.errors import CheckpointError, InputError
from kronfold.train import checkpoints, zero
from test_processes import TESTS, launch

pytest.importorskip("deepspeed", reason="pip install kronfold[deepspeed]")
if shutil.which("c++") is None:
    pytest.skip("DeepSpeed compiles what it needs on a CPU", allow_module_level=True)


def configured(patch, place, **config):
    """Set what `accelerate launch --use_deepspeed --deepspeed_config_file FILE` sets."""
    file = place / "deepspeed.json"
    file.write_text(json.dumps(config))
    patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    patch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))


@pytest.fixture(scope="module", autouse=True)
def no_stale_lock():
    """A compiler that was killed leaves the lock of its extension, and everyone after it would wait for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    for lock in Path(get_default_build_root()).rglob("lock"):
        if time.time() - lock.stat().st_mtime > 300:
            lock.unlink(missing_ok=True)


@pytest.fixture(scope="module", params=[1, 2])
def together(request, tmp_path_factory):
    """(directory, facts) of zero_jobs by two processes, for a stage of ZeRO; the rest is left to healing."""
    place = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        configured(patch, place, zero_optimization={"stage": request.param})
        launch(TESTS / "zero_jobs.py", place)
    return place, torch.load(place / "facts.pt", weights_only=False)


def test_it_heals_as_one_process_without_it(together):
    for name, job in zero_jobs.healings().items():
        two, before = together[1][name], [p.detach().clone() for p in job["student"].parameters()]
        one, _, _ = jobs.healed(job, 1)
        assert (two["steps"], two["tokens"]) == (one["steps"], one["tokens"])
        for first, second in zip(one["losses"], two["losses"], strict=True):
            first, second = ({k: v for k, v in logs.items() if k != "grad_norm"} for logs in (first, second))
            assert second == pytest.approx(first, abs=1e-5), name
        for found, expected in zip(two["student"], job["student"].parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        moved = max((p - b).abs().max().item() for p, b in zip(job["student"].parameters(), before, strict=True))
        assert moved > 5e-3  # the bound above is small beside what the training did


def test_the_optimiser_is_split_and_the_student_is_left_plain(together):
    for name in zero_jobs.healings():
        facts = together[1][name]
        assert facts["equal"], "the two processes hold different students"
        assert facts["plain"], "the student's parameters still carry what DeepSpeed hung on them"
        assert sum(facts["parts"]) == pytest.approx(facts["numbers"], rel=0.05)  # padded to equal parts
        assert facts["parts"][0] == facts["parts"][1]


def test_a_stopped_run_goes_on(together):
    _, facts = together
    assert facts["resumed"]["resumed_from"] == 4
    for found, expected in zip(facts["resumed"]["student"], facts["factorized"]["student"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_its_checkpoints_are_whole_and_go_on_under_it_alone(together, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(together[0] / "run", run)
    newest = checkpoints.newest_whole(run)
    assert newest is not None
    assert newest.name == "checkpoint-6"
    with pytest.raises(CheckpointError, match="deepspeed_processes was 2 and is now None"):
        jobs.healed(zero_jobs.resumable(), 1, output_dir=run, save_steps=2, resume=True)
    state = next((newest / "global_step6").glob("*optim_states.pt"))
    state.write_bytes(state.read_bytes()[:-100])
    assert "optim_states.pt has" in checkpoints.damage(newest)


def test_methods_with_parameters_of_their_own_are_refused(together):
    kind, words = together[1]["refused"]
    assert kind == "InputError"
    assert "Method intermediate trains parameters of its own" in words


def test_a_file_that_contradicts_healing_is_refused_by_name(together):
    kind, words = together[1]["differs"]
    assert kind == "InputError"
    assert "gradient_clipping=7.0 vs hf max_grad_norm=1.0" in words


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "asks for 3.*FSDP2"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, {}, "leave fp16 out"),
        ({"zero_optimization": {"stage": 2}}, {"bf16": True}, "runs in float32"),
    ],
)
def test_what_it_cannot_do_is_said_before_training(monkeypatch, tmp_path, config, options, words):
    configured(monkeypatch, tmp_path, **config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    job = {**jobs.healings()["kd"], **options}
    before = [p.detach().clone() for p in job["student"].parameters()]
    with pytest.raises(InputError, match=words):
        jobs.healed(job, 1)
    assert all(torch.equal(p, b) for p, b in zip(job["student"].parameters(), before, strict=True))
    assert not torch.distributed.is_initialized()


def test_without_the_package_or_a_launcher_the_way_out_is_named(monkeypatch, tmp_path):
    configured(monkeypatch, tmp_path, zero_optimization={"stage": 2})
    with pytest.raises(InputError, match="accelerate launch"):
        jobs.healed(jobs.healings()["kd"], 1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install kronfold\\[deepspeed\\]"):
        jobs.healed(jobs.healings()["kd"], 1)

"""Two processes of one job give what one gives: losses, weights, perplexity, files, and one message when it fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pico
import process_jobs as jobs
from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.base.processes import split_batch
from kronfold.jobs.run import RunOptions, run
from train_examples import KillAfter, Stop

TESTS = Path(__file__).parent


def launch(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node 2` on this machine, a thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS), *sys.path])
    # gloo would otherwise ask the network for this machine's name, and DeepSpeed, which accelerate loads where it is
    # installed, would say on stdout that it found no GPU
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **more}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(directory, facts) of process_jobs by two processes; before that, one process healed half of a run."""
    place = tmp_path_factory.mktemp("together")
    with pytest.raises(Stop):
        half = {"output_dir": place / "of-one", "save_steps": 2, "callbacks": [KillAfter(5)]}
        jobs.healed(jobs.healings()["kd"], 1, **half)
    done = launch(TESTS / "process_jobs.py", place)
    assert done.stdout == ""
    return place, json.loads((place / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone():
    return {name: jobs.healed(job, 1) for name, job in jobs.healings().items()}


@pytest.mark.parametrize("name", ["kd", "accumulated", "offline", "wider", "no logits", "mate"])
def test_two_processes_heal_as_one(together, alone, name):
    place, facts = together
    (one, weights, companions), two = alone[name], facts["healed"][name]
    assert two["equal"], "the two processes hold different weights"
    assert (two["steps"], two["tokens"], two["companions"]) == (one["steps"], one["tokens"], companions)
    assert len(two["losses"]) == one["steps"]
    for first, second in zip(one["losses"], two["losses"], strict=True):
        assert second == pytest.approx(first, abs=1e-5)
    trained = torch.load(place / f"{name}.pt")
    torch.testing.assert_close(trained, weights, rtol=0, atol=2e-4)
    moved = max((a - b).abs().max().item() for a, b in zip(weights, _untrained(name), strict=False))
    assert moved > 5e-3  # the bound above is small beside what the training did


def _untrained(name):
    """Parameters in the optimiser's order: those with weight decay first."""
    student = jobs.healings()[name]["student"]
    return sorted(student.parameters(), key=lambda p: p.dim() < 2)


def test_methods_have_parameters_of_their_own_here(alone):
    assert alone["wider"][2] > 0  # a projection to the teacher's width
    assert alone["wider"][1][-1].shape == (24, 16)
    assert alone["mate"][2] > 5  # the generator


def test_only_the_main_process_reports_and_writes(together):
    place, facts = together
    assert facts["reported"] == [list(range(1, 9)), []]
    assert (place / "written").read_text() == "by one"
    assert {path.name for path in (place / "of-two").iterdir()} == {"checkpoint-2", "checkpoint-4", "heal.json"}


def test_an_error_of_the_main_process_is_that_of_all(together):
    _, facts = together
    own, others = facts["wrong"]
    assert own[0] == "JSONDecodeError"
    assert (others[0], "JSONDecodeError" in others[1]) == ("RuntimeError", True)
    own, others = facts["refused"]
    assert own == others
    assert own[0] == "OutputError"
    assert "holds checkpoints of an earlier healing" in own[1]


def test_a_run_is_resumed_by_another_number_of_processes(together, alone):
    place, facts = together
    whole, weights, _ = alone["kd"]
    assert facts["resumed"]["resumed_from"] == 4
    torch.testing.assert_close(torch.load(place / "resumed.pt"), weights, rtol=0, atol=2e-4)

    found, trained, _ = jobs.healed(jobs.healings()["kd"], 1, output_dir=place / "of-two", resume=True, save_steps=2)
    assert found["resumed_from"] == 4
    torch.testing.assert_close(trained, weights, rtol=0, atol=2e-4)
    for resumed in (facts["resumed"], found):
        for first, second in zip(whole["losses"], resumed["losses"], strict=True):
            assert second == pytest.approx(first, abs=1e-5)


def test_measuring_is_exact(together):
    _, facts = together
    one = json.loads(json.dumps(jobs.measured()))
    assert one["sliding"]["protocol"]["windows"] % 4  # some process has a batch more, and the last is short
    assert facts["measured"] == one  # to the last bit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("job")
    pico.model_directory(place / "model", n_layer=2, n_embd=16)
    (place / "train.txt").write_text(pico.TEXT * 80)
    (place / "eval.txt").write_text(pico.TEXT * 12)
    return place


def test_run_is_the_same_job(place):
    texts = {"train_text": str(place / "train.txt"), "eval_text": str(place / "eval.txt")}
    options = RunOptions(str(place / "model"), "tqcompressor", heal_tokens=3 * 2048, controls=("dense",), **texts)
    one = run(options, place / "one")
    done = launch(
        "-m", "kronfold", "run", options.model, "--train-text", options.train_text, "--eval-text", options.eval_text,
        "-o", place / "two", "--heal-tokens", options.heal_tokens, "--controls", "dense", "--device", "cpu", "--json",
    )  # fmt: skip
    two = json.loads(done.stdout)  # one document, from one process
    assert json.loads((place / "two" / "results.json").read_text()) == two
    assert two["machine"]["processes"] == 2
    assert done.stderr.count("evaluate the teacher ...") == 1
    assert {p.name for p in (place / "two").iterdir()} == {p.name for p in (place / "one").iterdir()} | {"report.html"}
    assert not [path.name for path in place.iterdir() if path.name.startswith((".", "two."))]
    assert two["teacher"]["perplexity"] == one["teacher"]["perplexity"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    for first, second in zip(one["stages"], two["stages"], strict=True):
        for row, other in zip(first["rows"], second["rows"], strict=True):
            assert (other["name"], other["spec"]) == (row["name"], row["spec"])
            assert other["relative_error"] == pytest.approx(row["relative_error"], rel=1e-2)  # of weights healed before
        assert second["tokens"] == first["tokens"]
        assert [entry["loss"] for entry in second["losses"]] == pytest.approx(
            [entry["loss"] for entry in first["losses"]], abs=1e-3  # bfloat16 where the machine has it
        )  # fmt: skip
    dense = [document["controls"]["dense_finetuned"]["perplexity"] for document in (one, two)]
    assert dense[1] == pytest.approx(dense[0], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compress", "demo", "-o", "nowhere"], "compress runs in one process"),  # met by both
        (["eval", "PLACE/model", "--eval-text", "PLACE/text-RANK.txt", "--device", "cpu"], "text-1.txt"),
        (["eval", "--no-such-option"], "No such option"),  # before any command runs
    ],
    ids=["both", "the second", "not understood"],
)
def test_errors_end_all_with_one_message(place, words, expected):
    program = place / "program.py"
    program.write_text(
        "import os, sys\nfrom kronfold.cli.main import main\n"
        "main([a.replace('RANK', os.environ['RANK']) for a in sys.argv[1:]])\n"
    )
    (place / "text-0.txt").write_text(pico.TEXT * 12)
    done = launch(program, *(word.replace("PLACE", str(place)) for word in words), check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count(expected) == 1, done.stderr
    ours = [line for line in done.stderr.splitlines() if re.match("Error: |Internal error|.*─ Error ─", line)]
    assert len(ours) == 1, done.stderr


def test_one_process_is_a_plain_call(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.on_main(lambda: 3, share=False) == 3
    assert processes.gather("x") == ["x"]
    assert processes.speaks_for_all()


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD_", "PMI_"])
def test_processes_that_mpi_numbers(monkeypatch, prefix):
    """As `accelerate launch --cpu --mpirun_hostfile` starts them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv(f"{prefix}RANK", "1")
    monkeypatch.setenv(f"{prefix}SIZE", "2")
    assert processes.count() == 1  # a scheduler may set these for any program
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert (processes.count(), processes.index(), processes.is_main()) == (2, 1, False)


def test_batches_are_shared_equally(monkeypatch):
    assert split_batch(16, None) == (16, 1)
    assert split_batch(16, 4) == (4, 4)
    assert split_batch(16, 64) == (16, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (processes.count(), processes.is_main()) == (4, False)
    assert split_batch(16, None) == (4, 1)
    assert split_batch(16, 2) == (2, 2)
    with pytest.raises(InputError, match="micro-batch of 3 .* Choose one of 1, 2, 4"):
        split_batch(16, 3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="16 blocks .* by 3 processes.*1, 2, 4, 8, 16.*multiple of 3"):
        split_batch(16, None)


def test_megatron_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(InputError, match="not supported.*DDP.*FSDP2"):
        jobs.healed(jobs.healings()["kd"], 1)


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    from kronfold.cli.main import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_asks_first", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        main(["compress", "demo", "-o", "nowhere"])
    assert stopped.value.code == 2
    assert "kronfold compress runs in one process and 2 were started" in " ".join(capsys.readouterr().err.split())

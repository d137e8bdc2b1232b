"""Jobs killed at any of their changes to the file system, and jobs whose disk is full there.

Nothing that stood at the output is lost; after the kill `--resume` (or the same command again) ends with the weights of
the run that was never broken; and nothing is left over. Events are counted by `kill_jobs.Watch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from kronfold.base.marker import MARKER, verified

RESUMABLE = {"stream", "heal", "run", "compare", "finetune", "pretrain", "teach", "clean"}
CHEAP = ("compress", "stream", "teach", "sample", "stdlib", "export", "import-tq")
COSTLY = ("heal", "run", "compare", "finetune", "pretrain", "clean")
CONTENT = (".npy", ".gz", ".jsonl", "tokenizer.json")
KILLS = {**dict.fromkeys(CHEAP, 5), **dict.fromkeys(COSTLY, 4)}  # of each job: 59
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "KRONFOLD_RATES": "builtin", "KRONFOLD_TOKEN_CACHE_GB": "0"}
FAST = 2  # of them without the marker "slow"


class Server:
    def __init__(self, place: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("kill_jobs.py")), str(place)]
        self.place, self.runs, self.whole = place, 0, {}
        self.log = open(place / "log", "w")  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        )  # fmt: skip

    def ask(self, job: str, run: Path, how: str | None = None, at: int = 0, **more: Any) -> dict[str, Any]:
        asked = {"job": job, "run": str(run), "how": how, "at": at, "resume": False, "overwrite": False, **more}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.place / "log").read_text()[-3000:]
        return json.loads(answer)

    def run_directory(self) -> Path:
        self.runs += 1
        place = self.place / f"run-{self.runs}"
        place.mkdir()
        return place

    def unbroken(self, job: str, over_old: bool = False) -> tuple[int, dict[str, str]]:
        """How many changes a whole run makes, and what it ends with."""
        if (job, over_old) not in self.whole:
            run = self.run_directory()
            if over_old:
                shutil.copytree(self.old(job), run / "out")
            found = self.ask(job, run, overwrite=over_old)
            assert "error" not in found, found
            self.whole[job, over_old] = found["events"], content(run / "out")
            assert leftovers(run) == []
        return self.whole[job, over_old]

    def old(self, job: str) -> Path:
        """An earlier result of the same command with another seed."""
        if ("old", job) not in self.whole:
            run = self.run_directory()
            found = self.ask(job, run, older=True)
            assert "error" not in found, found
            self.whole["old", job] = run / "out"
        return self.whole["old", job]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("kills"))
    yield started
    started.close()


def content(place: Path) -> dict[str, Any]:
    """Everything that holds weights, tokens or text: tensors by name, hashes of other files."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.name.endswith(".safetensors"):
            found |= {f"{name} {key}": value for key, value in load(path.read_bytes()).items()}
        elif path.is_file() and path.name.endswith(CONTENT):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def same(job: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal bit for bit; a decomposition that is worked out again, in another process, may round its last bit otherwise
    (LAPACK, by where its memory lies), which healing then carries on."""
    if set(one) != set(other):
        return False
    tolerance = 1e-4 if job in ("compress", "stream", "run", "compare") else 0.0
    return all(
        torch.allclose(value.float(), other[name].float(), rtol=tolerance, atol=tolerance)
        and value.dtype == other[name].dtype
        if isinstance(value, torch.Tensor)
        else value == other[name]
        for name, value in one.items()
    )


def leftovers(run: Path) -> list[str]:
    """What should not be there once a job is done: all but the result, and temporary files in it."""
    beside = [path.name for path in run.iterdir() if path.name != "out"]
    inside = [str(path) for path in (run / "out").rglob(".*") if path.name != MARKER]
    return beside + inside + verified(run / "out")["unlisted"]


def cases(seed: int = 13) -> list[Any]:
    """(job, share of its events, over an old result) of every kill; half of them late, where names change."""
    draw, found = random.Random(seed), []
    for job, count in KILLS.items():
        for i in range(count):
            share = draw.uniform(0.75, 1.0) if i % 2 else draw.random()
            marks = [] if i < FAST else [pytest.mark.slow]
            found.append(pytest.param(job, share, i % 4 in (1, 2), marks=marks, id=f"{job}-{i}"))
    return found


@pytest.mark.parametrize(("job", "share", "over_old"), cases())
def test_killed_anywhere_and_gone_on(server, job, share, over_old):
    events, expected = server.unbroken(job, over_old)
    run = server.run_directory()
    old = None
    if over_old:
        shutil.copytree(server.old(job), run / "out")
        old = content(run / "out")
    answer = server.ask(job, run, "kill", 1 + int(share * (events - 1)), overwrite=over_old)
    assert answer == {"killed": True}
    if over_old or (run / "out").exists():  # nothing, the old one, or the new one, and that whole
        assert any(same(job, content(run / "out"), one) for one in (old, expected) if one is not None)
        assert verified(run / "out")["unlisted"] == []
    answer = server.ask(job, run, resume=job in RESUMABLE, overwrite=over_old)
    if "error" in answer and job in RESUMABLE:  # so early that nothing was begun, or so late that all was done
        assert "nothing to resume" in answer["said"] or "exists already" in answer["said"], answer
        answer = server.ask(job, run, overwrite=over_old)
    if "error" in answer:
        assert "exists already" in answer["said"], answer
    assert same(job, content(run / "out"), expected)
    if "error" not in answer:
        assert leftovers(run) == []


@pytest.mark.parametrize("job", [pytest.param(job, marks=[] if job in CHEAP else [pytest.mark.slow]) for job in KILLS])
def test_a_full_disk_anywhere(server, job):
    """The error says so, the old result stands, and with room again the job goes on."""
    events, expected = server.unbroken(job, True)
    draw = random.Random(job)
    for at in [draw.randrange(1, events), draw.randrange(int(0.8 * events), events)]:
        run = server.run_directory()
        shutil.copytree(server.old(job), run / "out")
        before = content(run / "out")
        answer = server.ask(job, run, "fault", at, overwrite=True)
        if "error" in answer:
            assert answer["error"] == "OutputError", answer
            assert "No space left" in answer["said"] or str(run) in answer["said"], answer
            assert same(job, content(run / "out"), before) or same(job, content(run / "out"), expected)
            answer = server.ask(job, run, overwrite=True)
            assert "error" not in answer, answer
        assert same(job, content(run / "out"), expected)


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("stop", 143)])
@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_commands_say_how_to_go_on(server, how, code, as_json):
    run, place = server.run_directory(), server.place
    command = ["compress", str(place / "model"), "-r", "svd", "--dtype", "float32", "--stream", "-o", str(run / "out")]
    command += ["--json"] * as_json
    events, expected = server.unbroken("stream")
    answer = server.ask("stream", run, how, int(0.6 * events), command=command)
    assert answer["code"] == code
    last = answer["said"].strip().splitlines()[-1]
    again = f"kronfold compress {place / 'model'} -r svd --dtype float32 --stream -o {run / 'out'}"
    assert last.startswith("Interrupted." if code == 130 else "Ended by SIGTERM.")
    assert last.endswith(f"is kept in {run / 'out.partial'}; go on with: {again}{' --json' * as_json} --resume")
    answer = server.ask("stream", run, command=[*command, "--resume"])
    assert answer["code"] in (0, None), answer
    assert same("stream", content(run / "out"), expected)
    run = server.run_directory()
    command = ["compress", str(place / "model"), "-r", "svd", "--dtype", "float32", "-o", str(run / "out")]
    answer = server.ask("compress", run, how, server.unbroken("compress")[0] // 2, command=command)
    assert answer["code"] == code
    assert "Nothing is kept" in answer["said"]
    assert list(run.iterdir()) == []


def test_two_at_once(server):
    """The second is told which process is at work, and changes nothing."""
    from kronfold.base.output import Lock

    run = server.run_directory()
    assert server.ask("stream", run, "kill", 12) == {"killed": True}
    with Lock(run / "out.partial" / "lock") as lock:
        lock.note_holder()
        for resume in (True, False):
            answer = server.ask("stream", run, resume=resume, overwrite=not resume)
            assert answer["error"] == "OutputError"
            assert f"Process {os.getpid()} is at work in {run / 'out.partial'}" in answer["said"]
    assert "error" not in server.ask("stream", run, resume=True)


def test_a_lock_outlives_no_process(tmp_path):
    """The system lets go of it when its process is killed."""
    script = "import sys, time; from pathlib import Path; from kronfold.base.output import Lock\n"
    script += "lock = Lock(Path(sys.argv[1])); lock.note_holder(); print('held', flush=True); time.sleep(60)"
    held = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    from kronfold.base.errors import OutputError
    from kronfold.base.output import Lock

    with pytest.raises(OutputError, match=f"Process {held.pid} is at work"):
        Lock(tmp_path / "lock")
    held.send_signal(signal.SIGKILL)
    held.wait()
    Lock(tmp_path / "lock").release()

"""Every command that writes an output, on pico models, in children of one warm process that can be killed anywhere.

The server (`python kill_jobs.py PLACE`) imports everything once, then forks a child for every line on its standard
input: {"job", "run": directory, "old": bool, "resume", "overwrite", "how": "kill" | "fault" | "stop" | null, "at": n}.
A child counts what it is about to change in the file system below the run's directory (by Python's audit events) and,
before event n, is killed, gets "no space left" from the system, or hears SIGTERM. The answer is one line of JSON.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pico
from kronfold.base.errors import KronfoldError
from kronfold.cli.main import main
from kronfold.data.clean import clean
from kronfold.data.sample import sample
from kronfold.data.stdlib import extract_stdlib
from kronfold.jobs.compare import CompareOptions, compare
from kronfold.jobs.compress import compress_to
from kronfold.jobs.export import export_dense
from kronfold.jobs.finetune import FineTuneOptions, finetune
from kronfold.jobs.heal import heal_to
from kronfold.jobs.import_tq import import_tq
from kronfold.jobs.pretrain import PretrainConfig, pretrain
from kronfold.jobs.run import RunOptions, run
from kronfold.jobs.stream import compress_streaming
from kronfold.jobs.teach import teach_to
from kronfold.options.healing import HealConfig, HealOptions, TeachOptions
from kronfold.train.classify import FineTuneConfig
from test_export_published_tq import published, state_of

WORDS = [word for word in dict.fromkeys(pico.TEXT.split()) if word != "."]


def make_inputs(place: Path) -> None:
    pico.model_directory(place / "model", n_layer=2, n_embd=16)
    (place / "train.txt").write_text(pico.TEXT * 30)
    (place / "eval.txt").write_text(pico.TEXT * 8)
    draw = random.Random(0)
    rows = [" ".join(draw.choices(WORDS, k=40)) for _ in range(30)]
    (place / "web.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, rows[3]]))
    for name, count in (("train.tsv", 16), ("dev.tsv", 8)):
        lines = [f"{' '.join(draw.choices(WORDS, k=5))} {'fox' if i % 2 else 'dog'}\t{i % 2}" for i in range(count)]
        (place / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    tq = published()
    (place / "tq").mkdir()
    save_file({key: value.contiguous() for key, value in state_of(tq).items()}, place / "tq" / "model.safetensors")
    tq.config.save_pretrained(place / "tq")
    pico.tokenizer().save_pretrained(place / "tq")
    compress_to(str(place / "model"), place / "small", "svd")
    library = place / "library"
    library.mkdir()
    for i in range(8):
        text = f"The number {i} of these modules does what its name says, and it says so in a sentence of its own. "
        (library / f"m{i}.py").write_text(f'"""{text * 3}"""\n')


Go = Callable[[Path, Path, int, bool, bool], Any]


def _heal(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    recipe = HealConfig(tokens=4 * 2 * 64, batch_size=2)
    options = HealOptions(
        model=place / "small", teacher=place / "model", train_text=place / "train.txt", eval_text=place / "eval.txt",
        output=out, healing=recipe, seed=seed, device="cpu", resume=resume, overwrite=overwrite,
    )  # fmt: skip
    heal_to(options)


def _run(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    options = RunOptions(
        model=str(place / "model"), recipe="svd", train_text=str(place / "train.txt"),
        eval_text=str(place / "eval.txt"), heal_tokens=2 * 1024, controls=("dense",), seed=seed,
    )  # fmt: skip
    run(options, out, resume=resume, overwrite=overwrite)


def _compare(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    options = CompareOptions(
        model=str(place / "model"), recipes=["svd"], train_text=str(place / "train.txt"),
        eval_texts={"main": str(place / "eval.txt")}, heal_tokens=1024, seed=seed,
    )  # fmt: skip
    compare(options, out, resume=resume, overwrite=overwrite)


def _finetune(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    options = FineTuneOptions(
        model=str(place / "model"), task="sst2", train_file=str(place / "train.tsv"),
        dev_files=(str(place / "dev.tsv"),), seeds=(seed, seed + 1),
        settings=FineTuneConfig(epochs=1, batch_size=8, learning_rate=1e-3), device="cpu",
        output=out, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    finetune(options)


def _pretrain(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    content = {
        "name": "tiny", "data": {"source": str(place / "web.jsonl"), "holdout": 0.3}, "tokenizer": {"vocab_size": 260},
        "model": {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "training": {"steps": 3, "batch_size": 2, "evaluate_every": 1, "bf16": False}, "seed": seed,
    }  # fmt: skip
    pretrain(PretrainConfig.model_validate(content), out, resume=resume, overwrite=overwrite)


def _teach(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    options = TeachOptions(
        model=place / "model", train_text=place / "train.txt", output=out, tokens=512, top_k=4 + seed, batch_size=2,
        device="cpu", resume=resume, overwrite=overwrite,
    )  # fmt: skip
    teach_to(options)


def _clean(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    clean(
        place / "web.jsonl", out, filters=["unicode", "exact"], seed=seed, shard_megabytes=0.004,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip


def _import(place: Path, out: Path, seed: int, resume: bool, overwrite: bool) -> None:
    import_tq(place / "tq", out, dtype=_dtype(seed), overwrite=overwrite)


def _dtype(seed: int) -> str:
    """What tells an older result apart where no seed does."""
    return "float16" if seed else "float32"


JOBS: dict[str, Go] = {
    "compress": lambda p, out, seed, _, over: compress_to(
        str(p / "model"), out, "svd", dtype=_dtype(seed), overwrite=over
    ),
    "stream": lambda p, out, seed, resume, over: compress_streaming(
        str(p / "model"), out, "svd", dtype=_dtype(seed), resume=resume, overwrite=over
    ),
    "heal": _heal,
    "run": _run,
    "compare": _compare,
    "finetune": _finetune,
    "pretrain": _pretrain,
    "teach": _teach,
    "clean": _clean,
    "sample": lambda p, out, seed, _, over: sample(p / "web.jsonl", out, 0.5, seed=seed, overwrite=over),
    "stdlib": lambda p, out, seed, _, over: extract_stdlib(out, overwrite=over, root=p / "library"),
    "export": lambda p, out, seed, _, over: export_dense(str(p / "small"), out, dtype=_dtype(seed), overwrite=over),
    "import-tq": _import,
}
RESUMABLE = {"stream", "heal", "run", "compare", "finetune", "pretrain", "teach", "clean"}

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "kronfold.exchange", "kronfold.exchanged"}


class Watch:
    """Counts what this process is about to change below `place`, and interferes before change `at`."""

    def __init__(self, place: Path, how: str | None, at: int) -> None:
        self.place, self.how, self.at, self.count = str(place), how, at, 0
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        relative = len(arguments) > 1 and isinstance(arguments[-1], int) and arguments[-1] > 0 and event != "open"
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if not relative and not os.path.abspath(path).startswith(self.place):
            return
        self.count += 1
        if self.how is None or self.count != self.at:
            return
        how, self.how = self.how, None
        if how == "fault":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "interrupt": signal.SIGINT}[how])


def child(place: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Do one job; what came of it."""
    out = Path(asked["run"]) / "out"
    watch = Watch(Path(asked["run"]), asked["how"], asked["at"])
    go = JOBS[asked["job"]]
    seed = 7 if asked.get("older") else 0
    try:
        if asked.get("command"):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                from kronfold.cli import main as room
                from kronfold.cli import terminal

                room.err = terminal.err = type(terminal.err)(file=said, width=10_000)
                try:
                    main(asked["command"])
                except SystemExit as end:
                    return {"code": end.code, "said": said.getvalue(), "events": watch.count}
        go(place, out, seed, asked["resume"], asked["overwrite"])
        return {"events": watch.count}
    except KronfoldError as error:
        return {"error": type(error).__name__, "said": str(error), "events": watch.count}
    except BaseException as error:
        return {"error": type(error).__name__, "said": traceback.format_exc(), "events": watch.count}


def serve(place: Path) -> None:
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    torch.set_num_threads(1)
    make_inputs(place)
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.setsid()
            answer = json.dumps(child(place, asked)).encode()
            os.write(write, answer[: 1 << 15])  # within what a pipe holds
            os._exit(0)
        os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # helper processes of a killed job live on otherwise
        os.write(write, b"\n")
        talk.write(os.read(read, 1 << 16).decode().strip() or json.dumps({"killed": True}))
        talk.write("\n")
        talk.flush()
        os.close(read)  # not read to its end: helper processes of a killed job may hold the other one for ever
        os.close(write)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))

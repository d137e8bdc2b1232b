"""The one job and its output: what is never lost, what is refused before any work, what is told of another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kronfold.base import marker, output
from kronfold.base.errors import CheckpointError, InputError, OutputError
from kronfold.base.job import Job
from kronfold.base.marker import MARKER, verified
from kronfold.base.output import Output, check_output


def do(place: Path, text: str = "result", **options) -> None:
    """A whole job: one file."""
    with Job.open(place, "test", **options) as job:
        job.begin({"text": text})
        (job.result / "file").write_text(text)
        job.finish({"schema": "kronfold/test"})


def begun(place: Path, **read) -> None:
    """A job that was cut off after its first step."""
    with pytest.raises(ZeroDivisionError), Job.open(place, "test") as job:
        job.begin({"seed": 1}, **read)

        def first() -> int:
            (job.work / "first").write_text("kept")
            return 5

        assert job.step("first", first, [job.work / "first"]) == 5
        raise ZeroDivisionError


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


# --- what stands at the output ----------------------------------------------------------------------------------------


def test_a_whole_job_leaves_the_result_and_nothing_else(tmp_path):
    do(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == {"out"}
    assert names(tmp_path / "deep" / "out") == {"file", "results.json", MARKER}
    assert verified(tmp_path / "deep" / "out")["files"] == 2


def test_overwrite_replaces_what_kronfold_wrote_and_no_more(tmp_path):
    do(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        do(tmp_path / "out")
    do(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "sub").mkdir()
    (tmp_path / "out" / "sub" / "more.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write: notes.txt, sub/more.txt"):
        do(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("what", ["directory", "file", "damaged marker", "model"])
def test_what_kronfold_did_not_write_is_never_replaced(tmp_path, what):
    place = tmp_path / "out"
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        (place / "model.safetensors").write_text("mine")
    if what == "damaged marker":
        (place / MARKER).write_text("{")
    with pytest.raises(OutputError, match="not a result of kronfold's, which alone --overwrite replaces"):
        do(place, overwrite=True)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    "document",
    [
        ("results.json", {"schema": "kronfold/run"}),
        ("manifest.json", {"schema": "kronfold/clean"}),
        ("manifest.json", {"teacher": "", "top_k": 4, "blocks_per_shard": 2, "format_version": 1}),
        ("config.json", {"quantization_config": {"quant_method": "kronfold"}}),
    ],
)
def test_results_of_03_are_known_by_their_documents(tmp_path, document):
    place = tmp_path / "out"
    (place / "stages").mkdir(parents=True)
    (place / document[0]).write_text(json.dumps(document[1]))
    (place / "stages" / "model-00001-of-00002.safetensors").write_text("")
    (place / "diary.md").write_text("mine")
    with pytest.raises(OutputError, match="did not write: diary.md"):
        do(place, overwrite=True)
    (place / "diary.md").unlink()
    do(place, overwrite=True)
    assert (place / "file").read_text() == "result"


def test_directories_with_inputs_or_the_current_one_are_not_replaced(tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    do(zoo)
    do(zoo / "teacher")
    shutil.rmtree(zoo / "teacher")
    (zoo / "file").unlink()
    (zoo / "file").mkdir()  # the name is the marker's, and it is the model now
    with pytest.raises(OutputError, match="is or holds .*zoo/file, which this job reads"):
        do(zoo, overwrite=True, inputs=[zoo / "file"])
    with pytest.raises(OutputError, match="is or holds .*zoo, which this job reads"):
        do(zoo, overwrite=True, inputs=["a hub id", None, zoo])
    monkeypatch.chdir(zoo / "file")
    for place in (zoo, Path(".."), Path("."), Path("/")):
        with pytest.raises(OutputError, match="current directory"):
            do(place, overwrite=True)
    assert (zoo / MARKER).exists()


def test_a_text_directory_takes_no_output(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(OutputError, match="lies in .*texts, which is read as a whole"):
        do(tmp_path / "texts" / "a" / "out", apart=[tmp_path / "texts"])
    do(tmp_path / "out", apart=[tmp_path / "texts", "a hub id"])


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "place")
    do(tmp_path / "out", "old")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "big") == {"place"}
    do(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big" / "place" / "file").read_text() == "new"
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OutputError, match="symbolic link that leads round in a circle"):
        do(tmp_path / "a")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["directory", "file", "result"])
def test_what_comes_to_stand_there_meanwhile_stays(tmp_path, overwrite, there):
    place = tmp_path / "out"
    with pytest.raises(OutputError, match=r"left alone. The finished result is in .*out\.new\."):
        with Job.open(place, "test", overwrite=overwrite) as job:
            job.begin()
            (job.result / "file").write_text("result")
            if there == "result":
                do_elsewhere(place)
            elif there == "file":
                place.write_text("mine")
            else:
                place.mkdir()
                (place / "precious").write_text("mine")
            job.finish()
    assert names(tmp_path) == {"out", "out.new"}
    assert (tmp_path / "out.new" / "file").read_text() == "result"
    assert there == "file" or not (place / "file").exists() or (place / "file").read_text() == "other"


def do_elsewhere(place: Path) -> None:
    """A result that another job brings to `place`."""
    do(place.with_name("elsewhere"), "other")
    place.with_name("elsewhere").rename(place)


def test_a_result_that_changed_meanwhile_stays(tmp_path):
    place = tmp_path / "out"
    do(place, "old")
    for change in ("added", "edited", "replaced"):
        with pytest.raises(OutputError, match="was changed while this job ran"):
            with Job.open(place, "test", overwrite=True) as job:
                job.begin()
                if change == "added":
                    (place / "notes").write_text("mine")
                elif change == "edited":
                    (place / "file").write_text("edited")
                else:
                    shutil.rmtree(place)
                    do_elsewhere(place)
                job.finish({})
        assert (place / MARKER).exists()
        (place / "notes").unlink(missing_ok=True)
    assert names(tmp_path) == {"out", "out.new", "out.new2", "out.new3"}


def test_without_an_exchange_of_names_it_works_too_and_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_renameat2", lambda: None)
    do(tmp_path / "out", "old")
    do(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == {"out"}
    (tmp_path / "out").rename(tmp_path / ".out.old-4711")  # killed between the two renames
    with pytest.raises(ZeroDivisionError), Job.open(tmp_path / "out", "test") as job:
        job.begin()
        raise ZeroDivisionError
    assert names(tmp_path) == {"out"}
    shutil.copytree(tmp_path / "out", tmp_path / ".out.old-4712")  # killed while it removed the old one
    (tmp_path / ".out.old-4713").mkdir()
    (tmp_path / ".out.old-4713" / "precious").write_text("mine")
    do(tmp_path / "out", "newer", overwrite=True)
    assert names(tmp_path) == {"out", ".out.old-4713"}


def test_an_empty_directory_is_as_good_as_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    do(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "result"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_point_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "source").mkdir()
    for what in (["-t", "tmpfs", "tmpfs"], ["--bind", str(tmp_path / "source")]):
        if subprocess.run(["mount", *what, str(tmp_path / "out")], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            with pytest.raises(OutputError, match=r"is a mount point.*-o .*out/result"):
                do(tmp_path / "out")
            do(tmp_path / "out" / "result")
        finally:
            subprocess.run(["umount", str(tmp_path / "out")], check=True)


def test_the_kernels_list_of_mounts_is_read(tmp_path, monkeypatch):
    """A directory bound from the same file system looks like any other; its name is written with octal codes."""
    (tmp_path / "my out").mkdir()
    line = f"36 35 98:0 /x {str(tmp_path / 'my out').replace(' ', chr(92) + '040')} rw - ext4 /dev/root rw\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: line if str(self) == "/proc/self/mountinfo" else real(self, *a, **k)
    )
    with pytest.raises(OutputError, match="is a mount point"):
        Output(tmp_path / "my out")
    Output(tmp_path / "other")


def test_a_parent_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()

    def refused(*_: object, dir: Path, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refused)
    with pytest.raises(OutputError, match=rf"Read-only file system in {tmp_path}.*-o {tmp_path}/out/result"):
        do(tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "a\0b"])
def test_names_that_cannot_be_are_refused(tmp_path, name):
    with pytest.raises(OutputError, match="Cannot write to"):
        do(tmp_path / name)
    assert names(tmp_path) == set()


# --- one file ---------------------------------------------------------------------------------------------------------


def test_one_file(tmp_path):
    place = tmp_path / "plan.json"
    Output(place, is_file=True).write_json({"schema": "kronfold/plan", "n": 1})
    with pytest.raises(OutputError, match="exists already"):
        Output(place, is_file=True)
    Output(place, is_file=True, overwrite=True).write_json({"schema": "kronfold/plan", "n": 2})
    assert json.loads(place.read_text())["n"] == 2
    for name, text in (
        ("list.json", "[1]"),
        ("other.json", '{"schema": "mine"}'),
        ("page.html", "<title>mine</title>"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(OutputError, match="not a result of kronfold's"):
            Output(tmp_path / name, is_file=True, overwrite=True)
    (tmp_path / "old.html").write_text("<html><title>gpt2 · kronfold report</title>")
    Output(tmp_path / "old.html", is_file=True, overwrite=True).write("<html>new")
    (tmp_path / "results").mkdir()
    with pytest.raises(OutputError, match="is a directory, and the result is one file"):
        Output(tmp_path / "results", is_file=True)


def test_one_file_that_appears_meanwhile_stays(tmp_path):
    for overwrite in (False, True):
        place = tmp_path / f"plan-{overwrite}.json"
        target = Output(place, is_file=True, overwrite=overwrite)
        place.write_text('{"schema": "kronfold/plan"}')
        with pytest.raises(OutputError, match=r"finished result is in .*\.new"):
            target.write("mine")
        assert place.read_text() == '{"schema": "kronfold/plan"}'
        assert place.with_name(place.name + ".new").read_text() == "mine"
    assert len(names(tmp_path)) == 4


def test_temporary_files_of_killed_writers_go_with_the_next_one(tmp_path):
    (tmp_path / ".plan.json.abcd1234.tmp").write_text("half")
    (tmp_path / ".plan.jsonx.abcd1234.tmp").write_text("of another output")
    held = output.Lock(tmp_path / ".plan.json.busy5678.tmp")
    Output(tmp_path / "plan.json", is_file=True).write("{}")
    assert names(tmp_path) == {"plan.json", ".plan.jsonx.abcd1234.tmp", ".plan.json.busy5678.tmp"}
    held.release()


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_steps_are_done_once_and_only_the_same_job_goes_on(tmp_path):
    text = tmp_path / "text"
    text.write_text("a" * 100)
    begun(tmp_path / "out", text=text)
    with pytest.raises(OutputError, match=r"unfinished run lies in .*out\.partial.*--resume"):
        do(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is of `kronfold test`"):
        Job.open(tmp_path / "out", "heal", resume=True)
    with (
        Job.open(tmp_path / "out", "test", resume=True) as job,
        pytest.raises(CheckpointError, match=r"other options \(seed\): seed was 1 and is now 2"),
    ):
        job.begin({"seed": 2}, text=text)
    stat = text.stat()
    text.write_text("a" * 50 + "b" + "a" * 49)  # one byte in the middle, and the same size and time
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with (
        Job.open(tmp_path / "out", "test", resume=True) as job,
        pytest.raises(CheckpointError, match=r"options \(text\)"),
    ):
        job.begin({"seed": 1}, text=text)
    text.write_text("a" * 100)
    with Job.open(tmp_path / "out", "test", resume=True) as job:
        assert not job.begin({"seed": 1}, text=text)
        assert job.resumed
        assert job.step("first", lambda: pytest.fail("done already")) == 5
        job.finish({})
    assert names(tmp_path) == {"out", "text"}
    with pytest.raises(InputError, match="nothing to resume"):
        Job.open(tmp_path / "new", "test", resume=True)


def test_a_step_whose_files_are_damaged_is_done_again(tmp_path, caplog):
    begun(tmp_path / "out")
    (tmp_path / "out.partial" / "first").write_text("kepT")
    with pytest.raises(CheckpointError, match="first has the right size and another content"):
        verified(tmp_path / "out.partial")
    with Job.open(tmp_path / "out", "test", resume=True) as job:
        job.begin({"seed": 1})
        assert job.damaged == ["first"]
        assert "is done again: first has the right size" in caplog.text
        assert job.step("first", lambda: 6) == 6
        job.finish({})


def test_a_damaged_book_is_not_believed(tmp_path):
    begun(tmp_path / "out")
    book = tmp_path / "out.partial" / "job.json"
    book.write_text(book.read_text().replace('"value": 5', '"value": 6'))
    with pytest.raises(CheckpointError, match="is not one that this version can resume"):
        Job.open(tmp_path / "out", "test", resume=True)
    do(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}


def test_an_unfinished_job_stays_until_a_new_one_is_checked(tmp_path):
    """--overwrite starts anew only once the new job has passed its checks."""
    begun(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), Job.open(tmp_path / "out", "test", overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "out.partial" / "first").read_text() == "kept"
    with pytest.raises(OutputError, match="it reads .*first"):
        Job.open(tmp_path / "out", "test", overwrite=True, inputs=[tmp_path / "out.partial" / "first"])
    do(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}


def test_a_work_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="what lies there is not kronfold's: precious"):
            do(tmp_path / "out", **options)
    assert (tmp_path / "out.partial" / "precious").read_text() == "mine"


def test_the_mark_of_work_done_goes_before_the_work(tmp_path, monkeypatch):
    """Killed while it empties the directory of a finished job, the rest is never taken for a job to go on with.

    0.3: `data clean`, then --resume --overwrite: an empty output in place of the finished one.
    """
    real, count = output.remove, [0]

    def dies(path: Path) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr("kronfold.base.job.remove", dies)
    with pytest.raises(KeyboardInterrupt), Job.open(tmp_path / "out", "test") as job:
        job.begin({})
        for name in ("a", "b", "c"):
            (job.work / name).mkdir()
            (job.work / name / "file").write_text("spool")
        job.step("read", lambda: 15, [job.work / "a"])
        (job.result / "file").write_text("result")
        job.finish({"documents": 15})
    monkeypatch.undo()
    assert (tmp_path / "out.partial").exists()
    with Job.open(tmp_path / "out", "test", resume=True, overwrite=True) as job:
        assert job.begin({})  # done already
        assert job.document() == {"documents": 15}
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "result"


def test_a_job_in_one_go_leaves_nothing_when_it_fails_or_is_killed(tmp_path):
    with pytest.raises(ZeroDivisionError), Job.open(tmp_path / "out", "test", resumable=False) as job:
        job.begin()
        (job.result / "file").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set()
    job = Job.open(tmp_path / "out", "test", resumable=False)
    job.begin()
    (job.result / "file").write_text("half")
    job._lock.release()  # as the system does for a killed process
    do(tmp_path / "out")  # cleared away unasked
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "result"


def test_a_check_keeps_a_result_from_being_handed_over(tmp_path):
    do(tmp_path / "out", "old")

    def refuse(place: Path) -> None:
        assert (place / "results.json").exists()
        raise CheckpointError("the weights are not finite")

    with pytest.raises(CheckpointError, match="not finite"):
        do(tmp_path / "out", "new", overwrite=True, checks=[refuse])
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_temporary_files_are_not_shipped(tmp_path):
    with Job.open(tmp_path / "out", "test") as job:
        job.begin()
        (job.result / ".tmpAb12").write_text("of a library")
        (job.result / "file").write_text("result")
        job.finish({})
    assert names(tmp_path / "out") == {"file", "results.json", MARKER}


def test_what_cannot_be_handed_over_at_the_end_is_kept(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(output, "_move", fails)
    for resumable in (True, False):
        place = tmp_path / f"out-{resumable}"
        with pytest.raises(OutputError, match=r"finished and lies in .*partial/result.*busy. Move it"):
            do(place, resumable=resumable)
        assert (tmp_path / f"out-{resumable}.partial" / "result" / "file").read_text() == "result"
        with pytest.raises(OutputError, match="unfinished run"):  # and no later job clears it away unasked
            do(place, resumable=resumable)


def test_a_helper_process_holds_no_lock(tmp_path):
    """One that was forked and outlives its killed parent would keep the job from being resumed."""
    with Job.open(tmp_path / "out", "test") as job:
        job.begin()
        read, write = os.pipe()
        begun, begins = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(begins, b".")  # what runs in a forked process at its start has run
            os.close(write)
            os.read(read, 1)  # until the test is over, however it ends
            os._exit(0)
        assert os.read(begun, 1) == b"."
        job.step("first", lambda: 1)
        job._lock.release()  # as the system does for a killed process
    with Job.open(tmp_path / "out", "test", resume=True) as job:
        job.begin()
        job.finish({})
    os.write(write, b".")
    os.waitpid(pid, 0)


# --- growing ----------------------------------------------------------------------------------------------------------


def rows(place: Path, count: int, **options) -> None:
    with Job.open(place, "table", grows=True, **options) as job:
        job.begin({"seed": 1})
        for number in range(count):

            def row(number: int = number) -> int:
                (job.result / str(number)).mkdir()
                (job.result / str(number) / "model").write_text(f"row {number}")
                return number

            job.step(f"row {number}", row, [job.result / str(number)])
        job.finish({"rows": count})


def test_a_finished_result_grows(tmp_path):
    rows(tmp_path / "out", 2)
    inode = (tmp_path / "out" / "0" / "model").stat().st_ino
    with pytest.raises(OutputError, match="exists already"):
        rows(tmp_path / "out", 3)
    rows(tmp_path / "out", 3, resume=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"rows": 3}
    assert (tmp_path / "out" / "0" / "model").stat().st_ino == inode  # neither copied nor made again
    assert verified(tmp_path / "out") == {"files": 4, "bytes": 31, "unlisted": []}
    assert names(tmp_path) == {"out"}
    (tmp_path / "out" / "1" / "model").write_text("row !")
    with pytest.raises(CheckpointError, match="1/model has the right size and another content"):
        rows(tmp_path / "out", 4, resume=True)


# --- hashes -----------------------------------------------------------------------------------------------------------


def _reads_as(path: Path, document: dict) -> bool:
    try:
        return json.loads(path.read_bytes()) == document
    except ValueError:
        return False


def test_no_flipped_byte_is_silent(tmp_path):
    """Every byte of the result, the marker included: detected by `verified`."""
    do(tmp_path / "out", "weights")
    for path in sorted((tmp_path / "out").iterdir()):
        content = path.read_bytes()
        for at in range(0, len(content), 7):
            path.write_bytes(content[:at] + bytes([content[at] ^ 0x21]) + content[at + 1 :])
            if path.name == MARKER and _reads_as(path, json.loads(content)):
                continue  # one white space for another, outside of strings
            with pytest.raises(CheckpointError, match=path.name):
                verified(tmp_path / "out")
        path.write_bytes(content)
    (tmp_path / "out" / "more").write_text("")
    assert verified(tmp_path / "out")["unlisted"] == ["more"]
    (tmp_path / "out" / MARKER).unlink()
    with pytest.raises(CheckpointError, match="does not exist; results of version 0.3"):
        verified(tmp_path / "out")


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / name).write_text(name)
    from kronfold.base import files

    read = []
    real = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: read.append(Path(path).name) or real(path))
    known: dict = {}
    first = files.sha256_of_content(tmp_path / "texts", known)
    (tmp_path / "texts" / "b").write_text("changed")
    assert files.sha256_of_content(tmp_path / "texts", known) != first
    assert read == ["a", "b", "b"]
    assert files.sha256_of_content(tmp_path / "nothing") is None
    (tmp_path / "texts" / "b").write_text("b")
    (tmp_path / "texts" / "work").mkdir()
    (tmp_path / "texts" / "work" / "file").write_text("of the job itself")
    assert files.sha256_of_content(tmp_path / "texts", known, [tmp_path / "texts" / "work"]) == first
    assert files.sha256_of_content(tmp_path / "texts") != first


def test_one_that_is_made_by_two_at_once_counts_once(tmp_path):
    """Entries of a cache: the first one that is done stays, the other is dropped without a word."""
    with output.atomic_directory(tmp_path / "entry", overwrite=True, first=True) as late:
        (late / "file").write_text("late")
        with output.atomic_directory(tmp_path / "entry", overwrite=True, first=True) as early:
            (early / "file").write_text("early")
    assert (tmp_path / "entry" / "file").read_text() == "early"
    assert names(tmp_path) == {"entry"}


def test_check_output_lets_what_is_to_be_added_to_stand(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    assert check_output(tmp_path / "mine", allow_existing=True) == tmp_path / "mine"
    assert marker.kind_of(tmp_path / "mine") is None

"""Time and memory of compressing, whole and block by block from files (`kronfold compress --stream`), by model size.

    python benchmarks/large_models.py --sizes gpt2 -o results.json           # the bars of GPT-2 small, minutes
    python benchmarks/large_models.py --blocks 4 -o results.json             # all sizes, 4 blocks each, extrapolated
    python benchmarks/large_models.py --sizes gpt2-xl --jobs import,compress -o results.json

For every size a checkpoint of random numbers is written to disk (fp16, GPT-2's shapes; random matrices are no easier to
fit than real ones). Planning and compressing, with and without the search for permutations, each run in a process of
their own, so that peak resident memory is theirs alone; it is compared with a process that only imports the library.
Seconds are given as wall time and as processor time: on a machine that does other work only the second means much.
`--blocks N` keeps the first N blocks of the checkpoint (the memory does not depend on their number); the processor time
of the whole is then extrapolated: what is outside the blocks once, and every odd and even block as those measured.
The job "whole" is `kf.compress` on a model in memory, left out for sizes that would need more than a few GB.

Bars: GPT-2 small with permutations in 60 s of wall time on 2 cores, and 1.5 GB over the model; any size within 8 GB
resident block by block; processor time per parameter as that of GPT-2 small (a ratio of 1 is linear growth).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from kronfold.base.errors import KronfoldError
from kronfold.base.files import write_json
from kronfold.base.output import check_output
from kronfold.base.results import document
from kronfold.models.cost import cost
from kronfold.models.parts import Parts
from kronfold.models.presets import preset_config
from kronfold.planner.planning import skeleton_of

JOBS = ("import", "plan", "compress", "compress-plain", "whole")
WHOLE_PARAMETERS = 400_000_000  # a model in memory, its copy, and what a search needs: about 4 GB
SECONDS_BAR, OVER_MODEL_BAR, RESIDENT_BAR = 60.0, 1.5e9, 8e9


def write_random(name: str, place: Path, blocks: int | None, seed: int) -> int:
    """A checkpoint of a published size with normal weights (std 0.02, norms near 1) in fp16, one shard per block.

    Returns its bytes.
    """
    config = preset_config(name)
    config.n_layer = min(blocks or config.n_layer, config.n_layer)
    config.dtype, config.architectures = "float16", ["GPT2LMHeadModel"]
    skeleton = skeleton_of(config)
    parts = Parts.of(skeleton)
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    place.mkdir(parents=True)
    for index, part in enumerate(parts.names):
        shard = {}
        for key, tensor in parts.tensors(skeleton, part).items():
            values = torch.randn(tensor.shape, generator=generator).mul_(0.02)
            shard[key] = (values + 1 if ".ln_" in key and key.endswith("weight") else values).half()
            total += shard[key].numel() * 2
        file = f"model-{index + 1:05d}-of-{len(parts.names):05d}.safetensors"
        save_file(shard, place / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    config.save_pretrained(place)
    write_json(place / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _tokenizer().save_pretrained(place)
    return total


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<|endoftext|>")


def work(job: str, name: str, source: Path, output: Path, threads: int, seed: int) -> dict[str, Any]:
    """One job, in this process: seconds and peak resident memory; for compressing also of every part."""
    torch.set_num_threads(threads)
    from kronfold.pipelines.compress import plan
    from kronfold.pipelines.streaming import compress_streaming
    from kronfold.planner.recipe import load_recipe

    recipe = load_recipe("tqcompressor")
    wall, processor, steps, found = time.perf_counter(), time.process_time(), [], {}
    if job == "plan":
        from kronfold.models.load import load_config

        made = plan(load_config(f"config:{name}"), recipe)
        found = {"held_parameters": made.held_parameters, "teacher_parameters": made.teacher.held_parameters}
    elif job == "whole":
        from kronfold.models.load import load_model
        from kronfold.pipelines.compress import compress

        model = load_model(source)
        found = {"resident_with_model_bytes": resident("VmRSS")}
        wall, processor = time.perf_counter(), time.process_time()  # reading the checkpoint is not decomposing
        compress(model, recipe, seed=seed)
        found["over_model_bytes"] = peak_resident() - found["resident_with_model_bytes"]
    elif job != "import":
        marks: dict[int, float] = {}
        result = compress_streaming(
            str(source), output, recipe if job == "compress" else recipe.without_permutations(), seed=seed,
            progress=lambda _name, part, _parts: marks.setdefault(part, time.process_time()),
        )  # fmt: skip
        ends = [*marks.values(), time.process_time()][1:]
        steps = [round(end - start, 2) for start, end in zip(marks.values(), ends, strict=True)]
        found = {"held_parameters": result["held_parameters"], **result["streamed"]}
    return {
        "job": job,
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "peak_resident_bytes": peak_resident(),
        **({"part_processor_seconds": steps} if steps else {}),
        **found,
    }


def peak_resident() -> int:
    """Peak resident memory of this process in bytes, files mapped into memory included."""
    return resident("VmHWM")  # not ru_maxrss: a new process starts from that of the one that started it


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; where there is no /proc, the peak for both."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All jobs of one size, each in a process of its own; the checkpoint is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="kronfold-large-", dir=options.scratch) as scratch:
        source, jobs = Path(scratch) / "source", {}
        size = write_random(name, source, options.blocks, options.seed)
        parameters = cost(skeleton_of(preset_config(name))).held_parameters
        for job in options.jobs:
            if job == "whole" and (options.blocks or parameters > WHOLE_PARAMETERS):
                continue
            output = Path(scratch) / job
            command = [sys.executable, __file__, "--job", job, name, str(source), str(output)]
            command += ["--threads", str(options.threads), "--seed", str(options.seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            jobs[job] = json.loads(done.stdout)
            shutil.rmtree(output, ignore_errors=True)
            print(name, json.dumps(jobs[job]), file=sys.stderr, flush=True)
    whole = preset_config(name).n_layer
    blocks = min(options.blocks or whole, whole)
    for found in jobs.values():
        if "part_processor_seconds" in found:
            found["whole_processor_seconds"] = extrapolate(found["part_processor_seconds"], whole)
    return {
        "size": name,
        "blocks": blocks,
        "of_blocks": whole,
        "parameters": parameters,
        "source_bytes": size,
        "threads": options.threads,
        "jobs": jobs,
    }


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new`, with the jobs of an older row that was measured alike and that it lacks."""
    alike = old is not None and all(old[key] == new[key] for key in ("blocks", "source_bytes", "threads"))
    jobs = {**(old["jobs"] if old and alike else {}), **new["jobs"]}
    return {**new, "jobs": {job: jobs[job] for job in JOBS if job in jobs}}


def extrapolate(seconds: list[float], blocks: int) -> float:
    """Processor seconds of `blocks` blocks from those of [what is outside the blocks, block 0, block 1, ...].

    The recipe treats odd blocks alike and even blocks alike; nothing is extrapolated where all were measured.
    """
    outside, measured = seconds[0], seconds[1:]
    if len(measured) == blocks:
        return round(sum(seconds), 1)
    kinds = [statistics.mean(measured[kind::2]) for kind in (0, 1)]
    return round(outside + sum(kinds[block % 2] for block in range(blocks)), 1)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for and what was measured; a ratio of at most 1 (for growth: about 1) is within the bar."""
    found = []

    def add(row: dict[str, Any], job: str, what: str, measured: float, bar: float) -> None:
        found.append(
            {"size": row["size"], "job": job, "what": what, "measured": measured, "bar": bar, "ratio": measured / bar}
        )

    small = next((row for row in rows if row["size"] == "gpt2"), None)
    for row in rows:
        for job, done in row["jobs"].items():
            if row["size"] == "gpt2" and row["blocks"] == row["of_blocks"] and job in ("compress", "whole"):
                add(row, job, f"wall seconds, {row['threads']} threads", done["wall_seconds"], SECONDS_BAR)
            if "over_model_bytes" in done and row["size"] == "gpt2":
                add(row, job, "GB over the model", done["over_model_bytes"] / 1e9, OVER_MODEL_BAR / 1e9)
            if job == "compress":
                add(row, job, "peak resident GB", done["peak_resident_bytes"] / 1e9, RESIDENT_BAR / 1e9)
            seconds = done.get("whole_processor_seconds")
            if seconds and small is not None and row is not small and job in small["jobs"]:
                per_million = 1e6 * small["jobs"][job]["whole_processor_seconds"] / small["parameters"]
                add(row, job, "processor s per million parameters", 1e6 * seconds / row["parameters"], per_million)
    return found


def bars_table(found: list[dict[str, Any]]) -> Table:
    shown = Table(title="Against the bars")
    for name in ("size", "job", "what", "measured", "bar", "ratio to bar"):
        shown.add_column(name, justify="left" if name in ("size", "job", "what") else "right")
    for row in found:
        numbers = (f"{row[key]:.2f}" for key in ("measured", "bar", "ratio"))
        shown.add_row(row["size"], row["job"], row["what"], *numbers)
    return shown


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Compressing with recipe tqcompressor")
    for name in (
        "size",
        "blocks",
        "job",
        "wall s",
        "processor s",
        "whole model s",
        "peak GB",
        "over the import GB",
    ):
        shown.add_column(name, justify="left" if name in ("size", "job") else "right")
    for row in rows:
        floor = row["jobs"].get("import", {}).get("peak_resident_bytes", 0)
        for job, found in row["jobs"].items():
            shown.add_row(
                row["size"],
                f"{row['blocks']} of {row['of_blocks']}",
                job,
                f"{found['wall_seconds']:.1f}",
                f"{found['processor_seconds']:.1f}",
                f"{found['whole_processor_seconds']:.0f}" if "whole_processor_seconds" in found else "",
                f"{found['peak_resident_bytes'] / 1e9:.2f}",
                f"{(found['peak_resident_bytes'] - floor) / 1e9:.2f}",
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", default="gpt2,gpt2-medium,gpt2-large,gpt2-xl", help="comma-separated")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--blocks", type=int, help="only the first N blocks (at least 2), the rest extrapolated")
    parser.add_argument("--scratch", help="where the random checkpoints are written; default: the temporary directory")
    parser.add_argument("-o", "--output", type=Path, help="write every figure as JSON; other sizes and jobs there stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads: as many matrices are fitted at once")
    parser.add_argument("--quick", action="store_true", help="2 blocks of GPT-2 small without search: does it run")
    parser.add_argument("--job", nargs=4, metavar=("JOB", "SIZE", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job, name, source, output = options.job
        print(json.dumps(work(job, name, Path(source), Path(output), options.threads, options.seed)))
        return
    if options.quick:
        options.sizes, options.blocks, options.jobs = "gpt2", 2, "import,plan,compress-plain"
    options.jobs = [job for job in JOBS if job in options.jobs.split(",")]
    if options.blocks is not None and options.blocks < 2:
        parser.error("--blocks must be at least 2: odd and even blocks are treated differently")
    try:
        rows = {}
        if options.output:
            check_output(options.output, allow_existing=True)
            if options.output.is_file():
                rows = {row["size"]: row for row in json.loads(options.output.read_text())["rows"]}
        for name in options.sizes.split(","):
            rows[name] = merged(rows.get(name), measure(name, options))
            if options.output:
                content = {"rows": list(rows.values()), "bars": bars(list(rows.values()))}
                write_json(options.output, document("large_models", options.seed, **content))
        Console().print(table(list(rows.values())), bars_table(bars(list(rows.values()))))
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()

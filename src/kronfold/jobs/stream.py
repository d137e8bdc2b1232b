"""Compress a checkpoint that need not fit into memory: one block at a time, from its files into new ones.

The model stands on the meta device. The tensors of one part (what is outside the blocks, then each block) are read,
fitted by the same code as a whole model's, written as a shard of the new checkpoint, and dropped; so the result is, bit
for bit, that of `compress_to` with the same recipe and seed. Finished parts are written down in `<output>.partial`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from kronfold.base import results
from kronfold.base.errors import CheckpointError, InputError, RecipeError
from kronfold.base.files import UNFINISHED, explain_write_errors, write_json
from kronfold.base.job import Job
from kronfold.base.progress import Progress, Report, State
from kronfold.export.checkpoint import verify_written
from kronfold.export.quantizer import attach
from kronfold.fit.compress import check_objectives
from kronfold.fit.fit import absorb_gathers, fit_rows, gathers_of, keep_layers
from kronfold.models.cost import Cost, cost
from kronfold.models.finite import check_finite
from kronfold.models.load import load_config, load_tokenizer, local_checkpoint, read_dtype
from kronfold.models.parts import Parts, put_tensors
from kronfold.models.place import read_specs
from kronfold.models.stored_names import to_stored
from kronfold.models.weight_files import WeightFiles
from kronfold.planner import planning
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import Recipe, load_recipe


def compress_streaming(
    model: str,
    output: str | Path,
    recipe: str | Recipe,
    plan_path: str | None = None,
    calibration: Sequence[str] = (),
    budget: Budget | None = None,
    *,
    seed: int = 0,
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint `model` block by block and save it with its tokenizer in `output`, one shard per part.

    Args:
        model: a directory, or the id of a hub model that lies on this machine.
        recipe: one of fixed shapes. It is fitted to the weights alone: `calibration` and `budget` must be empty.
        resume: go on after the last finished part of an interrupted call with the same options.

    Returns the results document (schema `kronfold/compress`; what `compress_to` gives, and `streamed`).

    Raises OutputError, RecipeError, CheckpointError, InputError, before anything is written; ShapeError, InputError
    with the row's name for a weight that cannot be fitted (finished parts then stay for `resume`).
    """
    reads = [model, plan_path, recipe if isinstance(recipe, str) else None]
    with Job.open(output, "compress", inputs=reads, resume=resume, overwrite=overwrite) as job:
        saved_dtype = read_dtype(dtype) if dtype else None
        place = local_checkpoint(model)
        config, tokenizer = load_config(place), load_tokenizer(place)
        made = _fixed_plan(config, recipe, plan_path, calibration, budget)
        skeleton = planning.skeleton_of(config).eval()
        before = cost(skeleton)
        stream = Streaming.of(skeleton, WeightFiles(place, skeleton), made, saved_dtype, seed, Progress.of(progress))
        facts = {
            "plan": [{"stage": stage.name, **row.to_dict()} for stage in made.stages for row in stage.rows],
            "layers": made.layers.to_dict() if made.layers else None,
            "seed": seed,
            "dtype": str(stream.dtype),
        }
        if job.begin(facts, model=place):
            return job.document()
        stream.restore(job.steps)
        stream.progress.step("decompose")
        for part in stream.parts.names:
            keeps = [job.result / stream.file_of(part)]
            job.step(part, lambda part=part: stream.carry_out(part, job.result), keeps)  # type: ignore[misc]
        document = _document(stream, model, before, job)
        _finish(stream, place, tokenizer, job)
        verify_written(job.result)
        job.finish(document)
    return document


def check_options(stream: bool, resume: bool, changes: Mapping[str, Any]) -> None:
    """Raise InputError for options of the command that exclude each other."""
    if stream and changes:
        raise InputError(
            f"--stream fits to the weights alone, so it takes no {', '.join(sorted(changes))}. Leave these options "
            "out, or leave --stream out."
        )
    if resume and not stream:
        raise InputError("Only a compression with --stream can be resumed; add --stream, or leave --resume out.")


@dataclass
class Streaming:
    """One compression in progress.

    Attributes:
        student: the model as it stands, without the blocks that the plan drops; all of it on the meta device but the
            part that is being worked on.
        dtype: of the saved weights.
    """

    student: PreTrainedModel
    files: WeightFiles
    plan: Plan
    parts: Parts
    dtype: torch.dtype
    seed: int
    progress: Progress

    @classmethod
    def of(
        cls,
        skeleton: PreTrainedModel,
        files: WeightFiles,
        made: Plan,
        dtype: torch.dtype | None,
        seed: int,
        progress: Progress,
    ) -> Streaming:
        """Raises RecipeError, CheckpointError, InputError when the plan or the checkpoint cannot be streamed."""
        _check_ties(skeleton, files)
        named = skeleton.config.dtype
        stored = getattr(torch, named) if isinstance(named, str) else named or files.dtype()
        student = keep_layers(skeleton, made.layers)
        return cls(student, files, made, Parts.of(student), dtype or stored, seed, progress)

    def restore(self, steps: Mapping[str, Any]) -> None:
        """Give the student the structured modules of the parts that are finished."""
        if not steps:
            return
        waiting = {
            name: spec for name, spec in read_specs(self.student).items() if self.parts.part_of(name) not in steps
        }
        done = {name: spec for step in steps.values() for name, spec in step["specs"].items()}
        self.student = planning.skeleton_of(self.student.config, {**waiting, **done}).eval()

    def carry_out(self, part: str, work: Path) -> dict[str, Any]:
        """Read, fit and write one part. Returns what the book keeps of it."""
        started, at, count = time.monotonic(), self.parts.names.index(part), len(self.parts.names)

        def fitting(state: State) -> None:  # over the whole model: parts, not the rows of one
            self.progress.update(at, count, item=state.facts.get("item", part))

        self.progress.update(at, count, item=part)
        held = self.parts.tensors(self.student, part)
        source = {name: self._source(name) for name in held}
        read = self.files.read(source.values())
        put_tensors(self.student, {name: read[source[name]] for name in held})
        del read
        rows = {}
        for stage in self.plan.stages:
            own = [row for row in stage.rows if self.parts.part_of(row.name) == part]
            rows[stage.name] = fit_rows(self.student, own, seed=self.seed, progress=Progress(fitting))
        block = self.parts.block_of(part)
        absorbed = absorb_gathers(self.student, [block])["absorbed"] if block is not None else 0
        specs = {name: spec for name, spec in read_specs(self.student).items() if self.parts.part_of(name) == part}
        shard = to_stored(self.student, self.parts.tensors(self.student, part), specs)
        sizes = write_shard(work / self.file_of(part), shard, self.dtype)
        del shard
        self.parts.empty(self.student, part)
        return {
            "file": self.file_of(part),
            "bytes": sizes,
            "specs": specs,
            "rows": {stage: [row.to_dict() for row in done] for stage, done in rows.items()},
            "absorbed": absorbed,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _source(self, name: str) -> str:
        """The name in the whole model of a tensor of the student, which may lack blocks."""
        block = self.parts.family.block_index(name)
        if block is None or self.plan.layers is None:
            return name
        family = self.parts.family
        return family.block_name(self.plan.layers.kept[block]) + name.removeprefix(family.block_name(block))

    def file_of(self, part: str) -> str:
        return f"model-{self.parts.names.index(part) + 1:05d}-of-{len(self.parts.names):05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, int]:
    """Write tensors, floating-point ones as `dtype`, as one safetensors file, whole or not at all.

    Returns the bytes of each. Raises OutputError; NotFiniteError for numbers that are not finite, or not in `dtype`.
    """
    check_finite(tensors.items(), dtype, f"The tensors of {path.name}")
    cast = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    scratch = path.with_name(f".{path.name}{UNFINISHED}")
    with explain_write_errors(path):
        save_file(cast, scratch, {"kronfold": str(results.versions().get("kronfold")), "format": "pt"})
        scratch.chmod(0o644)  # safetensors creates it for the owner alone
        scratch.replace(path)
    return {name: tensor.numel() * tensor.element_size() for name, tensor in cast.items()}


def _fixed_plan(
    config: PretrainedConfig,
    recipe: str | Recipe,
    plan_path: str | None,
    calibration: Sequence[str],
    budget: Budget | None,
) -> Plan:
    """The plan, if it can be carried out block by block. Raises RecipeError."""
    made = Plan.load(plan_path) if plan_path else None
    loaded = None if made else load_recipe(recipe)
    planned = loaded is not None and loaded.auto is not None
    if planned or calibration or budget is not None:
        given = f"Recipe {loaded.name!r}" if planned and loaded else "Calibration text" if calibration else "A budget"
        raise RecipeError(
            f"{given} needs the whole model to be run on text, and --stream never holds it. Give a recipe of fixed "
            "shapes (--recipe tqcompressor, kngpt2, svd, ...) and no text or budget, or leave --stream out."
        )
    if made is None:
        assert loaded is not None
        check_objectives(loaded)
        made = planning.plan_of_shapes(config, loaded)
    planning.check_plan(made, config)
    return made


def _check_ties(model: PreTrainedModel, files: WeightFiles) -> None:
    """Raise CheckpointError when the config ties two tensors that the files hold apart."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        if not files.stored_twice(tied):
            continue
        first, *others = (files.read([name])[name] for name in tied)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"config.json says that {' and '.join(tied)} are one tensor, and the files hold different ones. Set "
                "tie_word_embeddings to false in config.json, or restore both from one source."
            )


def _document(stream: Streaming, model: str, before: Cost, job: Job) -> dict[str, Any]:
    made, steps = stream.plan, [job.steps[part] for part in stream.parts.names]
    stages = []
    for stage in made.stages:
        found = {row["name"]: row for step in steps for row in step["rows"][stage.name]}
        stages.append({"name": stage.name, "rows": [found[row.name] for row in stage.rows]})
    seconds = round(sum(step["seconds"] for step in steps), 2)
    return results.document(
        "compress",
        stream.seed,
        model=model,
        recipe={"name": made.recipe, "description": made.description},
        teacher=before.to_dict(),
        **cost(stream.student).to_dict(),
        **({"layers": made.layers.to_dict()} if made.layers else {}),
        gathers={**gathers_of(stream.student), "absorbed": sum(step["absorbed"] for step in steps)},
        stages=stages,
        budget=made.budget,
        calibration=None,
        plan_seconds=round(max(0.0, job.seconds() - seconds), 2),
        decompose_seconds=seconds,
        streamed={"parts": len(steps), "largest_shard_bytes": max(sum(step["bytes"].values()) for step in steps)},
    )


def _finish(stream: Streaming, place: Path, tokenizer: Any, job: Job) -> None:
    """Write all that a model directory has beside its shards."""
    student, work, steps = stream.student, job.result, job.steps
    if read_specs(student):
        attach(student)
    student.config.dtype = str(stream.dtype).removeprefix("torch.")
    student.config.architectures = [type(student).__name__]
    if (place / "generation_config.json").is_file():
        student.generation_config = GenerationConfig.from_pretrained(place)
    weight_map = {name: step["file"] for step in steps.values() for name in step["bytes"]}
    total = sum(sum(step["bytes"].values()) for step in steps.values())
    with explain_write_errors(work):
        student.config.save_pretrained(work)
        if student.can_generate():
            student.generation_config.save_pretrained(work)
        tokenizer.save_pretrained(work)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(work / "model.safetensors.index.json", index)

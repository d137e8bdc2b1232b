"""Train a GPT-2 from scratch on a text source: tokenizer, packing, training, held-out perplexity, model card."""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import shutil
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, model_validator
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from kronfold.base import results
from kronfold.base.errors import DataError, DivergedError, RecipeError
from kronfold.base.files import explain_write_errors
from kronfold.base.job import Job
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import Texts, documents
from kronfold.data.stdlib import split_of, stdlib_documents
from kronfold.data.tokenizer import train_tokenizer
from kronfold.evaluate.perplexity import perplexity
from kronfold.export.checkpoint import write_model
from kronfold.export.model_card import model_card
from kronfold.options import Options, read
from kronfold.train import checkpoints
from kronfold.train.heal import bf16_is_fast
from kronfold.train.watch import WatchedTrainer

Progress = Callable[[int, int, dict[str, float]], None]
_COMPILERS = ("c++", "g++", "clang++", "cl")


class DataConfig(Options):
    """`source`: "stdlib", or paths and datasets ids; `holdout`: share of documents for validation, by their hash."""

    source: str | Annotated[list[str], Field(min_length=1)] = "stdlib"
    holdout: float = Field(default=0.04, gt=0, lt=1)
    text_column: str = "text"


class TokenizerConfig(Options):
    """Byte-level BPE, trained on the training split."""

    vocab_size: int = Field(default=4096, ge=257)


class ModelConfig(Options):
    """Sizes of a GPT-2, named as in `GPT2Config`."""

    n_positions: int = Field(default=256, ge=2)
    n_embd: int = Field(default=192, ge=1)
    n_layer: int = Field(default=6, ge=1)
    n_head: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        return self


class TrainingConfig(Options):
    """AdamW with linear warm-up (share of the steps) and cosine decay to 0; `batch_size` in blocks of n_positions.

    `dropout` acts on embeddings and residual branches during training and is 0 in the config that is saved.
    `evaluate_every`: steps between two validation losses, each with a checkpoint. `keep`: the weights of the "best"
    validation loss or of the "last" step.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    evaluate_every: int = Field(default=200, ge=1)
    keep: Literal["best", "last"] = "best"
    bf16: bool | Literal["auto"] = "auto"
    compile: bool = False


class PretrainConfig(Options):
    """A whole pre-training run. `name` heads the model card."""

    error = RecipeError

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    seed: int = Field(default=0, ge=0, lt=2**32)


def load_pretrain_config(source: str | Path | PretrainConfig) -> PretrainConfig:
    """A config by path of a YAML file, "demo" for the shipped one, or as it is. Raises RecipeError with all faults."""
    if isinstance(source, PretrainConfig):
        return source
    path = Path(source)
    if str(source) == "demo":
        path = Path(str(importlib.resources.files("kronfold") / "recipes" / "pretrain" / "demo.yaml"))
    if not path.is_file():
        raise RecipeError(f"There is no config file {path}. Give a YAML file, or 'demo' for the shipped one.")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"Config {path} is not valid YAML: {error}") from error
    config = read(PretrainConfig, document, f"Config {path}")
    return config


def pretrain(
    config: PretrainConfig | str | Path,
    output: str | Path,
    *,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train as `config` says and write a checkpoint that `transformers` loads; returns the content of results.json.

    `output` receives model.safetensors (fp16), config, tokenizer, results.json and README.md (model card) in one
    rename. Until then checkpoints lie in `<output>.partial`, from which `resume` continues a killed run with the same
    settings and data. `seed` replaces the config's. `progress(step, steps, latest)`, after each step; latest holds the
    last loss, eval_loss and learning_rate. The perplexity in the results is of the fp16 weights as read back.

    Raises RecipeError (config), DataError (text), OutputError (place taken, unfinished run there, not writable),
    CheckpointError (`resume` with other settings or data), DivergedError (the loss or weights are no longer finite; a
    resumed run with a lower training.learning_rate goes on from the last good checkpoint).
    """
    config = load_pretrain_config(config)
    if seed is not None:
        config = config.model_copy(update={"seed": seed})
    if config.training.compile and not any(map(shutil.which, _COMPILERS)):
        raise RecipeError("training.compile needs a C++ compiler, none was found. Install one, or set it to false.")
    sources = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    with Job.open(output, "pretrain", inputs=sources, resume=resume, overwrite=overwrite) as job:
        texts, read = _splits(config.data)
        tokenizer = train_tokenizer(texts["train"], config.tokenizer.vocab_size)
        tokenizer.model_max_length = config.model.n_positions
        blocks = _pack(texts, tokenizer, config)
        data = {split: _describe(texts[split], blocks[split]) for split in texts}
        settings = {**config.model_dump(mode="json"), "data_sha256": {split: data[split]["sha256"] for split in data}}
        # What may change after a divergence is compared where the checkpoints are, see `checkpoints.prepare`.
        facts = {key: value for key, value in settings.items() if key != "training"}
        training = {name: value for name, value in settings["training"].items() if name not in checkpoints.CALMING}
        if job.begin({**facts, **{f"training.{name}": value for name, value in training.items()}}):
            return job.document()
        place = job.work / "trainer"
        checkpoint = checkpoints.prepare(place, settings, job.resumed)

        set_seed(config.seed)
        model = GPT2LMHeadModel(_gpt2_config(config, tokenizer))
        start = time.perf_counter()
        try:
            trainer = _train(model, config, blocks, place, checkpoint, progress)
        except DivergedError as error:
            raise checkpoints.mark_diverged(place, settings, error) from error
        seconds = time.perf_counter() - start
        run = {
            "config": config.model_dump(mode="json"),
            "data": data,
            "read": read,
            "training": _summary(trainer, config, seconds, checkpoint),
            "held_parameters": sum(p.numel() for p in model.parameters()),
        }
        with explain_write_errors(output):
            document = _write(job.result, model, tokenizer, texts["validation"], config, run)
        job.finish(document)
    return document


def _splits(config: DataConfig) -> tuple[dict[str, list[str]], list[dict[str, Any]]]:
    """The documents by split, and what was read of each source."""
    found: Iterable[str]
    opened: list[Texts] = []
    if config.source == "stdlib":
        found = (text for _, text in stdlib_documents())
    else:
        sources = [config.source] if isinstance(config.source, str) else config.source
        opened = [documents(source, text_column=config.text_column) for source in sources]
        found = chain.from_iterable(opened)
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for text in found:
        if text.strip():
            texts[split_of(text, config.holdout)].append(text)
    return texts, [source.record() for source in opened]


def _pack(texts: dict[str, list[str]], tokenizer: Any, config: PretrainConfig) -> dict[str, TokenBlocks]:
    blocks = {}
    for split, found in texts.items():
        try:
            blocks[split] = pack(found, tokenizer, config.model.n_positions)
        except DataError as error:
            raise DataError(f"The {split} split, {len(found)} documents, is too small. {error}") from error
    if len(blocks["train"]) < config.training.batch_size:
        raise DataError(
            f"The train split gives {len(blocks['train'])} blocks of {config.model.n_positions} tokens, less than one "
            f"batch of {config.training.batch_size}. Give more text or set a smaller training.batch_size."
        )
    return blocks


def _describe(texts: list[str], blocks: TokenBlocks) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    size = sum(len(text.encode()) for text in texts)
    return {"documents": len(texts), "bytes": size, "tokens": blocks.tokens, "sha256": digest.hexdigest()}


def _gpt2_config(config: PretrainConfig, tokenizer: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        **config.model.model_dump(),
        resid_pdrop=config.training.dropout,
        embd_pdrop=config.training.dropout,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _train(
    model: GPT2LMHeadModel,
    config: PretrainConfig,
    blocks: dict[str, TokenBlocks],
    place: Path,
    checkpoint: Path | None,
    progress: Progress | None,
) -> Trainer:
    """Train `model` in place with the stock Trainer; it ends with the weights that `keep` names."""
    training = config.training
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        model.set_attn_implementation("eager")  # its backward pass is twice as fast as sdpa's on the CPU
    every = min(training.evaluate_every, training.steps)
    args = TrainingArguments(
        output_dir=str(place),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        bf16=bf16_is_fast("cpu" if on_cpu else "cuda") if training.bf16 == "auto" else training.bf16,
        torch_compile=training.compile,
        use_cpu=on_cpu,
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=training.keep == "best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(50, every),
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,
        report_to=[],
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs are for torchrun; nn.DataParallel would multiply the batch size unseen
    trainer = WatchedTrainer(
        activity="pre-training",
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        callbacks=[checkpoints.Seal(), *([_Watcher(progress)] if progress else [])],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


class _Watcher(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        self.latest.update({key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps, self.latest)


def _summary(trainer: Trainer, config: PretrainConfig, seconds: float, checkpoint: Path | None) -> dict[str, Any]:
    history = trainer.state.log_history
    best = trainer.state.best_model_checkpoint
    kept = int(best.rpartition("-")[2]) if best and config.training.keep == "best" else trainer.state.global_step
    per_step = config.training.batch_size * config.model.n_positions
    return {
        "steps": trainer.state.global_step,
        "kept_step": kept,
        "tokens": trainer.state.global_step * per_step,
        "epochs": round(trainer.state.epoch or 0.0, 2),
        "seconds": round(seconds, 1),
        "resumed_from": int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        "bf16": trainer.args.bf16,
        "losses": [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row],
        "validation_losses": [{"step": row["step"], "loss": row["eval_loss"]} for row in history if "eval_loss" in row],
    }


def _write(
    place: Path,
    model: GPT2LMHeadModel,
    tokenizer: Any,
    validation: list[str],
    config: PretrainConfig,
    run: dict[str, Any],
) -> dict[str, Any]:
    model.config.resid_pdrop = model.config.embd_pdrop = 0.0  # dropout belongs to this run, not to the model
    model.config.use_cache = True  # the Trainer switched it off
    write_model(model, tokenizer, place, torch.float16)
    shipped = GPT2LMHeadModel.from_pretrained(place, dtype=torch.float32)
    found = perplexity(shipped, tokenizer, validation, "sliding", rows="documents")
    document = results.document("pretrain", config.seed, perplexity=found.perplexity, **run, evaluation=found.to_dict())
    (place / "README.md").write_text(model_card(document), encoding="utf-8")
    for file in place.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only
    return document

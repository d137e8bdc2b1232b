"""What `data clean` shall do: filters by name, their options, the executor; faults are told before any work."""

from __future__ import annotations

import importlib
import inspect
from importlib.util import find_spec as find
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from kronfold.base.errors import DataError, InputError, RecipeError, suggest
from kronfold.options import Options, read

FORMATS = ("jsonl", "parquet")
# In the order in which they act: repair first, so that all others see the text as it was meant; what judges a document
# alone before what compares it with all others; the cheap comparisons before MinHash.
FILTERS = ("unicode", "html", "boilerplate", "language", "repetition", "quality", "exact", "key", "minhash")
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "language")  # language needs a model to be downloaded
DUPLICATES = ("exact", "key", "minhash")

_CLASSES = {
    "unicode": ("datatrove.pipeline.formatters", "FTFYFormatter"),
    "boilerplate": ("kronfold.data.clean_blocks", "BoilerplateLines"),
    "language": ("datatrove.pipeline.filters", "LanguageFilter"),
    "repetition": ("kronfold.data.clean_blocks", "RepeatedLines"),
    "quality": ("datatrove.pipeline.filters", "GopherQualityFilter"),
    "minhash": ("datatrove.pipeline.dedup.minhash", "MinhashConfig"),
}
# C4 keeps only lines that end a sentence, which takes headings and blank lines out of clean prose, and drops every
# document with a curly bracket; here only what is never prose goes, unless the options ask for more.
_OPTIONS: dict[str, dict[str, Any]] = {
    "boilerplate": {
        "filter_no_terminal_punct": False,
        "min_words_per_line": -1,
        "min_num_sentences": -1,
        "filter_curly_bracket": False,
        "remove_citations": False,
    },
    "language": {"languages": ["en"]},
}
_OURS = {"exclusion_writer", "seed", "hash_config", "norm_config"}  # set by the pipeline, not by options
_TAKES_WORDS = ("boilerplate", "repetition", "quality")


class CleanSettings(Options):
    """`filters`: names out of FILTERS. `options`: by filter, arguments of the datatrove block that does the work.

    `shard_megabytes`: text per shard, in millions of characters; a task of the pipeline is one shard, so the result
    depends on it (through which document of a near-duplicate cluster stays), but not on `workers`.
    `text_column`, `max_bad_rows`: see `Reading`.
    `executor`: "local", "slurm" or "ray"; `cluster`: arguments of datatrove's executor of that name (partition, time,
    env_command, ...). `examples`: drops quoted per filter in the manifest.
    """

    error = RecipeError

    filters: tuple[str, ...] = Field(default=DEFAULT_FILTERS, min_length=1)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    text_column: str = "text"
    max_bad_rows: str | int | None = None
    format: Literal["jsonl", "parquet"] = "jsonl"
    seed: int = Field(default=0, ge=0, lt=2**32)
    shard_megabytes: float = Field(default=32, gt=0)
    examples: int = Field(default=3, ge=0, le=100)
    workers: int = Field(default=1, ge=1)
    executor: Literal["local", "slurm", "ray"] = "local"
    cluster: dict[str, Any] = Field(default_factory=dict)

    def shaping(self) -> dict[str, Any]:
        """The fields that shape the result: all but where and by how many processes it is made."""
        return self.model_dump(mode="json", exclude={"workers", "executor", "cluster"})

    def arguments(self, name: str) -> dict[str, Any]:
        """Arguments of the block of filter `name`: our defaults, then `options`."""
        return {**_OPTIONS.get(name, {}), **self.options.get(name, {})}


def load_settings(source: str | Path | CleanSettings | None, **changes: Any) -> CleanSettings:
    """Settings from a YAML file (or as they are, or the defaults), with `changes` that are not None on top.

    Raises RecipeError (all malformed fields), InputError (unknown filter or option, with near names; a package that is
    missing, with the pip command) or DataError (no such file).
    """
    document: Any = {}
    if isinstance(source, CleanSettings):
        document = source.model_dump()
    elif source is not None:
        if not Path(source).is_file():
            raise DataError(f"There is no settings file {source}. Give a YAML file with the fields of CleanSettings.")
        try:
            document = yaml.safe_load(Path(source).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"Settings {source} are not valid YAML: {error}") from error
    if isinstance(document, dict):
        document = {**document, **{key: value for key, value in changes.items() if value is not None}}
    settings = read(CleanSettings, document, "These cleaning settings")
    _check_names(settings)
    require("datatrove", "ftfy")
    for name in sorted({*settings.options} & {*_CLASSES}):
        _check_options(settings, name)
    if "language" in settings.filters:
        _check_language()
    return settings


def require(*packages: str) -> None:
    """Raises InputError with the pip command unless all `packages` can be imported."""
    missing = [name for name in packages if find(name) is None]
    if missing:
        raise InputError(f"Cleaning needs {' and '.join(missing)}. Install with: pip install 'kronfold[data]'")


def _check_names(settings: CleanSettings) -> None:
    for place, names in (("filter", settings.filters), ("filter in options", tuple(settings.options))):
        for name in names:
            if name not in FILTERS:
                raise InputError(f"Unknown {place} {name!r}. {suggest(name, FILTERS)}")
    for name in settings.options:
        if name not in settings.filters:
            raise InputError(f"Options are given for {name!r}, which is not among the filters. Add it, or leave them.")
        if name not in _CLASSES:
            raise InputError(f"Filter {name!r} takes no options. Those that do: {', '.join(_CLASSES)}.")
    if len(set(settings.filters)) != len(settings.filters):
        raise InputError(f"A filter is named twice in {list(settings.filters)}; each acts once, in a fixed order.")


def _check_options(settings: CleanSettings, name: str) -> None:
    ours = _OURS | ({"language"} if name in _TAKES_WORDS else set())
    allowed = set(inspect.signature(block_class(name)).parameters) - ours
    for option in settings.options[name]:
        if option not in allowed:
            raise InputError(f"Unknown option {option!r} of filter {name!r}. {suggest(option, allowed, limit=20)}")


def _check_language() -> None:
    if find("fasttext") is None or find("fasteners") is None:
        raise InputError(
            "The language filter needs fastText: pip install fasttext-numpy2-wheel fasteners. On first use it "
            "downloads its model lid.176.bin (126 MB) from dl.fbaipublicfiles.com. Or leave 'language' out."
        )


def block_class(name: str) -> Any:
    """The class, datatrove's or derived from it, whose arguments the options of filter `name` are."""
    module, attribute = _CLASSES[name]
    return getattr(importlib.import_module(module), attribute)

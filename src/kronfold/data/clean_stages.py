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
from kronfold.base.job import RESULT
from kronfold.data.executors import Stage
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
    settings = read(CleanSettings, document, "Cleaning settings")
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


# The stages of cleaning as `datatrove` pipelines: filters per document, then each comparison of all with all.


def make_stages(work: Path, settings: CleanSettings, shards: int) -> list[Stage]:
    """All stages, in order. `work`/shards holds the spooled source; the last stage writes `work`/result.

    Finding duplicates takes three steps in datatrove: signatures (per shard), matches (over all), removal (per shard).
    The signatures are made as a shard is written, so each comparison adds two stages (three for MinHash).
    """
    work = work.resolve()
    comparisons = [_COMPARISONS[name](work, settings) for name in DUPLICATES if name in settings.filters]
    blocks = [_reader(work / "shards"), *_document_filters(work, settings)]
    stages = []
    name = "filters"
    for step, comparison in enumerate(comparisons):
        place = work / f"kept-{step}"
        stages.append(Stage(name, [*blocks, _keeper(place), comparison.sign()], shards))
        stages += comparison.find()
        blocks = [_reader(place), comparison.drop(), _count(comparison.name)]
        name = f"{comparison.name}-drop"
    stages.append(Stage(name, [*blocks, _result(work / RESULT, settings)], shards))
    return stages


def _reader(place: Path) -> Any:
    from kronfold.data.clean_blocks import ShardReader

    place.mkdir(parents=True, exist_ok=True)
    return ShardReader(str(place))


def _count(name: str) -> Any:
    from kronfold.data.clean_blocks import Count

    return Count(name)


def _keeper(place: Path) -> Any:
    """Writes what is left so far, one file per shard."""
    import pyarrow as arrow
    from datatrove.pipeline.writers import ParquetWriter

    from kronfold.data.clean_blocks import row

    schema = arrow.schema([("id", arrow.string()), ("text", arrow.string())])
    return ParquetWriter(str(place), adapter=row, schema=schema, max_file_size=-1)


def _result(place: Path, settings: CleanSettings) -> Any:
    from kronfold.data.clean_blocks import GzipLines

    place.mkdir(parents=True, exist_ok=True)
    return _keeper(place) if settings.format == "parquet" else GzipLines(str(place))


def _drops(work: Path, name: str, settings: CleanSettings) -> Any:
    from kronfold.data.clean_blocks import FirstFew

    return FirstFew(str(work / "drops" / name), settings.examples)


def _named(block: Any, name: str) -> Any:
    """The block under a name that the manifest finds again in datatrove's statistics."""
    block.name = f"{block.name} [{name}]"
    block.stats.name = str(block)
    return block


def _document_filters(work: Path, settings: CleanSettings) -> list[Any]:
    from kronfold.data.clean_blocks import DropEmpty, HtmlLines, Repair, Words

    blocks: list[Any] = []
    for name in FILTERS:
        if name not in settings.filters or name in DUPLICATES:
            continue
        given = settings.arguments(name)
        drops = _drops(work, name, settings)
        if name == "unicode":
            block: Any = Repair(**given)
        elif name == "html":
            block = HtmlLines(drops)
        elif name == "language":
            block = block_class(name)(exclusion_writer=drops, **given)
        else:
            block = block_class(name)(exclusion_writer=drops, language=Words(), **given)
        blocks += [_named(block, name), _count(name)]
    # Blocks after this one number the documents; an empty one would be skipped on reading and shift them all.
    return [*blocks, _named(DropEmpty(_drops(work, "empty", settings)), "empty"), _count("empty")]


def _hashes() -> Any:
    """64 bits of SHA-1: datatrove's default, xxhash, takes text only in its versions before 4."""
    from datatrove.utils.hashing import HashConfig

    return HashConfig(precision=64, hash_fc="sha1")


class _Exact:
    """Equal content, by datatrove's exact deduplication: of equals the first in the source stays."""

    name = "exact"

    def __init__(self, work: Path, settings: CleanSettings) -> None:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

        from kronfold.data.clean_blocks import earlier_shard_first

        self.work, self.settings = work, settings
        self.config = ExactDedupConfig(self.content(), earlier_shard_first, _hashes())

    def content(self) -> Any:
        from kronfold.data.clean_blocks import whole_text

        return whole_text

    def _place(self, what: str) -> str:
        place = self.work / f"{self.name}-{what}"
        place.mkdir(parents=True, exist_ok=True)
        return str(place)

    def sign(self) -> Any:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupSignature

        return ExactDedupSignature(self._place("signatures"), self.config)

    def find(self) -> list[Stage]:
        from datatrove.pipeline.dedup.exact_dedup import ExactFindDedups

        block = ExactFindDedups(self._place("signatures"), self._place("found"), self.config, lines_to_buffer=1000)
        return [Stage(f"{self.name}-find", [block], 1)]

    def drop(self) -> Any:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupFilter

        drops = _drops(self.work, self.name, self.settings)
        return _named(ExactDedupFilter(self._place("found"), self.config, drops), self.name)


class _Key(_Exact):
    """The Short Study's near-duplicate key, compared exactly."""

    name = "key"

    def content(self) -> Any:
        from kronfold.data.clean_blocks import short_study_key

        return short_study_key


class _MinHash:
    """Similar texts (MinHash with banding, clusters by union-find); of a cluster one document stays."""

    name = "minhash"

    def __init__(self, work: Path, settings: CleanSettings) -> None:
        from datatrove.pipeline.dedup.minhash import MinhashConfig

        self.work, self.settings = work, settings
        # + 1 as datatrove's own default is seed 1
        self.config = MinhashConfig(seed=settings.seed + 1, hash_config=_hashes(), **settings.arguments(self.name))

    def _place(self, what: str) -> str:
        place = self.work / f"{self.name}-{what}"
        place.mkdir(parents=True, exist_ok=True)
        return str(place)

    def sign(self) -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

        from kronfold.data.clean_blocks import Words

        return MinhashDedupSignature(self._place("signatures"), self.config, language=Words())

    def find(self) -> list[Stage]:
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster

        matches = MinhashDedupBuckets(
            self._place("signatures"), self._place("matches"), config=self.config, lines_to_buffer=1000
        )
        cluster = MinhashDedupCluster(self._place("matches"), self._place("found"), self.config)
        return [
            Stage("minhash-match", [matches], self.config.num_buckets),
            Stage("minhash-cluster", [cluster], 1),
        ]

    def drop(self) -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

        drops = _drops(self.work, self.name, self.settings)
        return _named(MinhashDedupFilter(self._place("found"), drops), self.name)


_COMPARISONS: dict[str, Any] = {"exact": _Exact, "key": _Key, "minhash": _MinHash}

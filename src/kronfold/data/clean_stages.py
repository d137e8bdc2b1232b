"""The stages of cleaning as `datatrove` pipelines: filters per document, then each comparison of all with all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kronfold.base.job import RESULT
from kronfold.data.clean_settings import DUPLICATES, FILTERS, CleanSettings, block_class
from kronfold.data.executors import Stage


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

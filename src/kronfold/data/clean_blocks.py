"""Blocks for `datatrove` pipelines that datatrove lacks: the Short Study's cleaning, counting, deterministic files.

Imports datatrove, so only functions of `data.clean` import this file. Everything is importable by name, because worker
processes and cluster jobs unpickle it.
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import json
import os
import re
from collections.abc import Iterator
from typing import IO, Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import C4QualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

if "SLURM_ARRAY_TASK_ID" not in os.environ:
    logger.disable("datatrove")  # here and in worker processes: its log lines would drown ours; faults still raise

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_MAYBE_TAG = re.compile(r"<[a-zA-Z/!]")
_ELEMENTS = """
    a abbr acronym address applet area article aside audio b base basefont bdi bdo big blockquote body br button
    canvas caption center cite code col colgroup data datalist dd del details dfn dialog dir div dl dt em embed
    fieldset figcaption figure font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i
    iframe img input ins kbd label legend li link main map mark menu meta meter nav noframes noscript object ol
    optgroup option output p param picture pre progress q rp rt ruby s samp script search section select slot small
    source span strike strong style sub summary sup svg table tbody td template textarea tfoot th thead time title
    tr track tt u ul var video wbr
"""
HTML_ELEMENTS = frozenset(_ELEMENTS.split())


class Words(WordTokenizer):
    """Space-separated words. datatrove's default for English needs spaCy and takes punctuation marks for words.

    With marks as words, Gopher's rule that 80 % of the words hold a letter dropped 650 of 1,018 sections of WikiText-2.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [piece for piece in _SENTENCE_END.split(text) if piece.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans, start = [], 0
        for piece in self.sent_tokenize(text):
            start = text.index(piece, start)
            spans.append((start, start + len(piece)))
            start += len(piece)
        return spans


class ShardReader(ParquetReader):
    """Task `rank` reads shard `rank`, also where other shards are empty and have no file."""

    name = "shard"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        if data:
            yield from data
        name = f"{rank:05d}.parquet"
        if self.data_folder.isfile(name):
            for document in self.read_files_shard([name]):
                document.metadata = {"shard": rank}
                yield document


class Count(PipelineStep):
    """Passes documents on and counts them: documents, characters, words (space-separated)."""

    type = "count"

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents = characters = words = 0
        for document in data:
            documents += 1
            characters += len(document.text)
            words += len(document.text.split())
            yield document
        # Once per task: updating datatrove's running statistics for every document costs more than counting.
        self.stat_update("documents", value=documents)
        self.stat_update("characters", value=characters)
        self.stat_update("words", value=words)


class Repair(FTFYFormatter):
    """ftfy, with a count of the documents it changed."""

    def format(self, text: str) -> str:
        fixed: str = super().format(text)
        if fixed != text:
            self.stat_update("changed")
        return fixed


class _Tags(html.parser.HTMLParser):
    found = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found = self.found or tag in HTML_ELEMENTS

    def handle_endtag(self, tag: str) -> None:
        self.found = self.found or tag in HTML_ELEMENTS

    def handle_decl(self, decl: str) -> None:
        self.found = self.found or decl.lower().startswith("doctype")


def has_html(line: str) -> bool:
    """Whether a tag of an HTML element (or a comment, or a doctype) parses in `line`.

    `a < b`, `<unk>` and `Map<String, Integer>` are none.
    """
    if not _MAYBE_TAG.search(line):
        return False
    if "<!--" in line:
        return True
    tags = _Tags(convert_charrefs=False)
    tags.feed(line)  # no close(): what is never finished with ">" is no tag
    return tags.found


class HtmlLines(BaseFilter):
    """Drops every line in which an HTML tag parses (A Short Study, arXiv 2110.08460, cleaning of OpenWebText).

    Derived from its description. A document that loses all its lines goes too.
    """

    name = "html lines"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if "<" not in doc.text:
            return True
        lines = doc.text.split("\n")
        kept = [line for line in lines if not has_html(line)]
        if len(kept) == len(lines):
            return True
        self.stat_update("line-filter-html", value=len(lines) - len(kept))
        if not any(line.strip() for line in kept):
            return False, "only_html"
        if self.exclusion_writer:
            for line in filter(has_html, lines):
                self.exclusion_writer.write(Document(text=line, id=doc.id), doc.metadata["shard"])
        doc.text = "\n".join(kept)
        return True


class BoilerplateLines(C4QualityFilter):
    """C4's line rules, with the white space of the lines that stay: C4 strips it.

    Text to train on should look like the text to be read. Verse, tables and code live by their indent; and WikiText has
    a space before every line, without which each first word is another token.
    """

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        lines = doc.text.splitlines()
        found = super().filter(doc)
        if found is not True or not self.split_paragraph:
            return found  # dropped, or cut into sentences, which have no white space of their own
        # A rule sees one line at a time, so equal lines share their fate.
        kept = {line.strip() for line in doc.text.split("\n")}
        if self.remove_citations:
            lines = [CITATION_REGEX.sub("", line) for line in lines]
        doc.text = "\n".join(line for line in lines if line.strip() in kept)
        return True


class RepeatedLines(GopherRepetitionFilter):
    """Gopher's rules on lines as they read: one of white space only is a blank line, not a repeated one.

    WikiText has a space before every line, blank ones too: taken for repeats, these cost 22 of 339 clean sections.
    """

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        plain = "\n".join(line.strip() for line in doc.text.split("\n"))
        found: bool | tuple[bool, str] = super().filter(Document(text=plain, id=doc.id))
        return found


class DropEmpty(BaseFilter):
    """Documents of which nothing but white space is left."""

    name = "empty"

    def filter(self, doc: Document) -> bool:
        return bool(doc.text.strip())


def whole_text(doc: Document) -> str:
    """What exact duplicates have in common."""
    return doc.text


def short_study_key(doc: Document) -> str:
    """Near-duplicate key of A Short Study (arXiv 2110.08460): length without punctuation, md5 of first and last words.

    Derived from its description: characters left once punctuation is gone, and md5 of the first four and the last four
    of the words that remain.
    """
    plain = _PUNCTUATION.sub("", doc.text)
    words = plain.split()
    ends = " ".join(words[:4] + words[-4:])
    return f"{len(''.join(words))} {hashlib.md5(ends.encode(), usedforsecurity=False).hexdigest()}"


def earlier_shard_first(doc: Document) -> int:
    """Priority 1 to 65535: of exact duplicates, the one in the first shard stays (in it, datatrove keeps the first)."""
    return max(1, 65535 - int(doc.metadata["shard"]))


def row(writer: Any, document: Document) -> dict[str, str]:
    """The columns of every file we write; `writer` is the block that asks."""
    return {"id": document.id, "text": document.text}


class GzipLines(DiskWriter):
    """JSON lines, gzipped without time stamp or name: equal documents give equal bytes. Needs no orjson."""

    name = "jsonl.gz"
    default_output_filename = "${rank}.jsonl.gz"

    def __init__(self, output_folder: str) -> None:
        super().__init__(output_folder, compression=None, adapter=row, mode="wb")
        self._packed: dict[str, gzip.GzipFile] = {}

    def _write(self, document: dict[str, str], file_handler: IO[bytes], filename: str) -> None:
        if filename not in self._packed:
            self._packed[filename] = gzip.GzipFile("", "wb", 6, file_handler, mtime=0)
        self._packed[filename].write(json.dumps(document, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        for packed in self._packed.values():
            packed.close()  # writes the trailer; the file beneath is closed by datatrove
        self._packed.clear()
        super().close()


class FirstFew(DiskWriter):
    """Keeps the first `count` drops of each task, shortened, as examples for the manifest."""

    name = "examples"
    default_output_filename = "${rank}.jsonl"
    LONGEST = 160  # characters

    def __init__(self, output_folder: str, count: int) -> None:
        super().__init__(output_folder, compression=None, adapter=row, mode="wb")
        self.left = count

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        if self.left > 0:
            self.left -= 1
            super().write(document, rank, **kwargs)

    def _write(self, document: dict[str, str], file_handler: IO[bytes], _filename: str) -> None:
        text = " ".join(document["text"].split())
        short = text if len(text) <= self.LONGEST else text[: self.LONGEST - 1] + "…"
        file_handler.write(json.dumps({**document, "text": short}, ensure_ascii=False).encode() + b"\n")

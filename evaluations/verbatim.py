"""How much of what a language model says stands word for word in given files.

Texts are sampled from the model, and every run of words that also occurs in the files is found,
however long (Carlini et al., 2021, arXiv:2012.07805; Nasr et al., 2023, arXiv:2311.17035, who count
matches of at least 50 tokens). Words are what white space separates, so line breaks do not matter;
a match is of whole words within one document, and its length is counted in tokens of the model.

The automaton is built over the *generated* texts, which are few, and the files are read through it
once from end to end: memory is that of the generated texts, whatever the size of the files, and
nothing is approximated. It is the suffix automaton of Blumer et al. (1985): its states are the
substrings of the generated texts with the same endings, so that after each word of the files the
state says the longest run of words, ending there, that the model generated too. Cost: at most two
look-ups per word of the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from unlearn.errors import BadInput
from unlearn.evaluations.extractable import Estimate, mean, proportion
from unlearn.scripts import words

Lengths = npt.NDArray[np.int64]
Document = Iterable[Sequence[str]]  # its words, some at a time

BLOCK = 1 << 20  # characters of a text file read at a time
JSON_LINES = (".jsonl", ".ndjson")
READ = (*JSON_LINES, ".json", ".parquet", ".txt", ".md")  # what is taken from a folder
LONGEST = 5  # matches whose lengths, or texts, are named


@dataclass(frozen=True)
class Verbatim:
    """What was found.

    Attributes:
        tokens: generated in all.
        least: tokens that a match must have.
        covered: mean share of a generated text's tokens that lie in matches.
        matching: share of the generated texts that hold a match.
        longest: tokens of the longest matches, one per text, descending.
        examples: the words of these matches, where they were asked for.
    """

    tokens: int
    least: int
    covered: Estimate
    matching: Estimate
    longest: tuple[int, ...]
    examples: tuple[str, ...] = field(default=(), repr=False)


class Automaton:
    """All runs of words in some texts.

    Args:
        texts: each a sequence of words.
    """

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        self._number: dict[str, int] = {}
        self._length, self._link, self._next = [0], [-1], [dict[int, int]()]
        self._ends: list[list[int]] = []  # the state after each word of each text
        last = 0
        for count, text in enumerate(texts, start=1):
            ends = []
            for word in text:
                last = self._add(last, self._number.setdefault(word, len(self._number)))
                ends.append(last)
            self._ends.append(ends)
            last = self._add(last, -count)  # a border that no document holds
        self._best = [0] * len(self._length)

    def _add(self, last: int, word: int) -> int:
        """One more word at the end; the state of the whole."""
        length, link, next_ = self._length, self._link, self._next
        new, state = len(length), last
        length.append(length[last] + 1)
        link.append(0)
        next_.append({})
        while state != -1 and word not in next_[state]:
            next_[state][word] = new
            state = link[state]
        if state == -1:
            return new
        target = next_[state][word]
        if length[target] == length[state] + 1:
            link[new] = target
            return new
        clone = len(length)
        length.append(length[state] + 1)
        link.append(link[target])
        next_.append(dict(next_[target]))
        while state != -1 and next_[state].get(word) == target:
            next_[state][word] = clone
            state = link[state]
        link[target] = link[new] = clone
        return new

    def read(self, document: Document) -> None:
        """Look up every run of words of one document."""
        number, next_, link, length, best = (
            self._number, self._next, self._link, self._length, self._best,
        )  # fmt: skip
        state = run = 0
        for some in document:
            for word in some:
                known = number.get(word)
                if known is None:
                    state = run = 0
                    continue
                while state and known not in next_[state]:
                    state = link[state]
                    run = length[state]
                state = next_[state].get(known, 0)
                run = run + 1 if state else 0
                if run > best[state]:
                    best[state] = run

    def matches(self) -> list[Lengths]:
        """The longest run ending at each word that a document read so far holds, in words."""
        length, link, best = self._length, self._link, list(self._best)
        order = np.argsort(length, kind="stable")[1:].tolist()
        for state in reversed(order):  # what ends in a longer run ends in its shorter ones, too
            if best[state]:
                best[link[state]] = length[link[state]]
        for state in order:
            best[state] = best[state] or best[link[state]]
        return [np.array([best[state] for state in ends], dtype=np.int64) for ends in self._ends]


def searched(
    texts: Sequence[str],
    documents: Iterable[Document],
    tokens: Callable[[str], int],
    least: int,
    examples: bool = False,
) -> Verbatim:
    """Find what of the generated texts stands in the documents.

    Args:
        texts: generated, at least one.
        documents: read once, one after the other.
        tokens: how many tokens a word has, at least one.
        least: tokens that a match must have.
        examples: keep the words of the longest matches.

    Raises:
        BadInput: no text holds a word.
    """
    written = [words(text) for text in texts]
    if not any(written):
        raise BadInput("the model generated no words, so there is nothing to search for")
    automaton = Automaton(written)
    for document in documents:
        automaton.read(document)
    known = {word: max(1, tokens(word)) for word in {w for text in written for w in text}}
    shares, found, total = [], [], 0
    for text, lengths in zip(written, automaton.matches(), strict=True):
        sizes = np.array([known[word] for word in text], dtype=np.int64)
        within, longest, end = _covered(lengths, sizes, least)
        total += int(sizes.sum())
        shares.append(float(sizes[within].sum() / sizes.sum()) if text else 0.0)
        found.append((longest, " ".join(text[end - int(lengths[end - 1]) : end]) if end else ""))
    top = sorted(found, key=lambda match: -match[0])[:LONGEST]
    matching = proportion([longest >= least for longest, _ in found])
    if matching is None:
        raise BadInput("there is no text to search for")
    return Verbatim(
        total, least, mean(shares, (0.0, 1.0)), matching, tuple(size for size, _ in top),
        tuple(match for size, match in top if size >= least) if examples else (),
    )  # fmt: skip


def _covered(
    lengths: Lengths, sizes: Lengths, least: int
) -> tuple[npt.NDArray[np.bool_], int, int]:
    """Which words lie in a match of enough tokens; the longest match in tokens, and its end.

    >>> within, longest, end = _covered(np.array([0, 1, 2, 1]), np.array([1, 2, 2, 1]), least=3)
    >>> within.tolist(), longest, end
    ([False, True, True, False], 4, 3)
    """
    n = len(lengths)
    if n == 0:
        return np.zeros(0, dtype=np.bool_), 0, 0
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.arange(1, n + 1)
    tokens = before[ends] - before[ends - lengths]
    enough = tokens >= least
    steps = np.zeros(n + 1, dtype=np.int64)
    np.add.at(steps, (ends - lengths)[enough], 1)
    np.add.at(steps, ends[enough], -1)
    end = int(tokens.argmax())
    return np.cumsum(steps)[:n] > 0, int(tokens[end]), end + 1


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and those in named folders whose names end in ``READ``, sorted.

    Raises:
        BadInput: a path does not exist, a folder holds nothing to read, a named file ends in
            something else, or the first record of a file cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind(p) in READ and p.is_file())
            if not inside:
                raise BadInput(f"the folder {path} holds no file that ends in {', '.join(READ)}")
            found += inside
        elif path.is_file() and kind(path) not in READ:
            raise BadInput(
                f"the file {path} to search ends in none of {', '.join(READ)}, so nothing says how "
                "to read it: name it .txt if it is text"
            )
        elif path.is_file():
            found.append(path)
        else:
            raise BadInput(f"the file {path} to search does not exist: check --corpus")
    found = list(dict.fromkeys(found))
    for path in found:
        for document in islice(documents(path), 1):
            next(iter(document), None)
    return found


def kind(path: Path) -> str:
    """How a file's name ends, in lower case."""
    return path.suffix.lower()


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file: every text of every record of jsonl, json and parquet files.

    Any other file is one document of UTF-8 text and is read block by block; bytes that are no
    UTF-8 match nothing.

    Raises:
        BadInput: the file or a record cannot be read, or a table has no column of text.
    """
    if kind(path) == ".parquet":
        rows = _parquet(path)
    elif kind(path) in JSON_LINES:
        rows = _json_lines(path)
    elif kind(path) == ".json":
        rows = _json(path)
    else:
        yield _blocks(path)
        return
    for row in rows:
        yield from said(row)


def said(row: Any) -> Iterator[Document]:
    """Every text in a record, as a document of its own.

    >>> [list(document) for document in said({"a": "x y", "b": [1, "z"]})]
    [[['x', 'y']], [['z']]]
    """
    if isinstance(row, str):
        yield [words(row)]
    elif isinstance(row, dict):
        for value in row.values():
            yield from said(value)
    elif isinstance(row, list | tuple):
        for value in row:
            yield from said(value)


def _opened(path: Path, encoding: str = "utf-8-sig", newline: str | None = None) -> TextIO:
    try:
        return path.open(encoding=encoding, errors="replace", newline=newline)
    except OSError as error:
        raise BadInput(f"the file {path} to search cannot be read: {error.strerror}") from error


def _blocks(path: Path) -> Document:
    rest = ""
    with _opened(path, encoding="utf-8") as file:
        while block := file.read(BLOCK):
            found = words(rest + block)
            rest = "" if block[-1].isspace() else found.pop()
            yield found
    yield words(rest)


def _json_lines(path: Path) -> Iterator[Any]:
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise BadInput(f"{path} line {number} is not JSON: {error.msg}") from error


def _json(path: Path) -> Iterator[Any]:
    """A whole JSON text; where it is none, one value a line."""
    with _opened(path) as file:
        text = file.read()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        yield from _json_lines(path)
        return
    yield found


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if _holds_text(field.type)]
        if not names:
            raise BadInput(f"{path} has no column of text, so there is nothing to search in it")
        for batch in file.iter_batches(1024, columns=names):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path} is not a readable parquet file: {error}") from error


def _holds_text(kind: Any) -> bool:
    """Whether a column of a table is text, or has any within."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    if types.is_nested(kind):
        return any(_holds_text(kind.field(i).type) for i in range(kind.num_fields))
    return any(is_text(kind) for is_text in (types.is_string, types.is_large_string,
                                             types.is_string_view))  # fmt: skip

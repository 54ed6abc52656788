"""From files, hub names and objects in memory to named, validated sets of raw rows.

Knows formats, ids, classes and overlap; knows nothing about models (that is the task's part).
Nothing is copied into a cache: local files are read straight into memory-mapped or in-memory
tables, so erasing the files erases the data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn.errors import BadInput, did_you_mean

Row = Mapping[str, Any]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
ID_COLUMNS = ("id", "record_id")


@dataclass(frozen=True)
class Examples:
    """A set of raw rows.

    Attributes:
        rows: anything with a length and integer indexing that yields mappings.
        ids: one id per row: the ``id`` or ``record_id`` column, else the row number.
        name: the set's role (forget, retain, holdout, data).
        source: where it came from, for messages.
        numbered: whether ``ids`` are row numbers.
        class_names: the label column's names, when the data carries them.
    """

    rows: Sequence[Row]
    ids: Sequence[str]
    name: str
    source: str
    numbered: bool = True
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def select(self, indices: Sequence[int], name: str | None = None) -> Examples:
        """The rows at ``indices``, in that order."""
        rows = _Selected(self.rows, list(indices))
        ids = [self.ids[i] for i in indices]
        return replace(self, rows=rows, ids=ids, name=name or self.name)

    def column(self, key: str) -> list[Any]:
        """One column without touching the others (images stay undecoded)."""
        rows: Any = self.rows
        order: Sequence[int] = range(len(rows))
        while isinstance(rows, _Selected):
            rows, order = rows.rows, [rows.order[i] for i in order]
        if hasattr(rows, "column_names"):
            values = rows[key]
            return [values[i] for i in order]
        return [rows[i].get(key) for i in order]


@dataclass(frozen=True)
class _Selected(Sequence[Row]):
    rows: Sequence[Row]
    order: list[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.order[index]]


@dataclass(frozen=True)
class _Pairs(Sequence[Row]):
    """(input, label) pairs: two tensors or arrays, or a torch map-style dataset."""

    pairs: Any
    key: str

    def __len__(self) -> int:
        return len(self.pairs[0]) if isinstance(self.pairs, tuple) else len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.pairs, tuple):
            inputs, labels = self.pairs
            return {self.key: inputs[index], "label": int(labels[index])}
        item = self.pairs[index]
        if isinstance(item, Mapping):
            return item
        return {self.key: item[0], "label": int(item[1])}


def load(source: Any, name: str, columns: Mapping[str, str] | None = None) -> Examples:
    """Read a set from wherever it is.

    Args:
        source: a path (jsonl, json, parquet, a saved ``datasets`` directory, an image folder), a
            hub name (``org/name`` or ``org/name:split``), a list of dicts, a ``datasets.Dataset``,
            a torch map-style dataset, or a pair (inputs, labels) of tensors or arrays.
        name: the set's role, used in messages.
        columns: renames, ``{field we expect: column in the data}``.

    Raises:
        BadInput: missing, unreadable or empty data, or a row that is not a record.
    """
    if isinstance(source, Examples):
        return replace(source, name=name)
    if isinstance(source, str | Path):
        rows, where = _from_path(str(source), name), str(source)
    else:
        rows, where = _from_memory(source, name), "memory"
    if len(rows) == 0:
        raise BadInput(f"the {name} set {where} is empty: give it at least one record")
    rows = _renamed(rows, columns or {}, name, where)
    rows, class_names = _undecoded(rows)
    first = rows[0]
    id_column = next((key for key in ID_COLUMNS if key in first), None)
    examples = Examples(rows, [], name, where, id_column is None, class_names)
    ids = range(len(rows)) if id_column is None else examples.column(id_column)
    examples = replace(examples, ids=[str(i) for i in ids])
    if len(set(examples.ids)) != len(examples.ids):
        twice = _first_repeat(examples.ids)
        raise BadInput(f"the {name} set {where} has the id {twice!r} twice: ids must be unique")
    return examples


def _first_repeat(values: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(v for v in values if v in seen or seen.add(v))  # type: ignore[func-returns-value]


def _from_memory(source: Any, name: str) -> Sequence[Row]:
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Mapping):
        if len(source[0]) != len(source[1]):
            raise BadInput(
                f"the {name} set has {len(source[0])} inputs and {len(source[1])} labels: "
                "give as many labels as inputs"
            )
        shape = getattr(source[0], "shape", ())
        return _Pairs(source, "image" if len(shape) == 4 else "features")
    if hasattr(source, "column_names") and hasattr(source, "features"):
        rows: Sequence[Row] = source
        return rows
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise BadInput(
                    f"row {number} of the {name} set is a {type(row).__name__}, not a record: "
                    'give dicts such as {"question": ..., "answer": ...}'
                )
        return source
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        first = source[0] if len(source) else ()
        shape = getattr(first[0], "shape", ()) if isinstance(first, Sequence) and first else ()
        return _Pairs(source, "features" if len(shape) == 1 else "image")
    raise BadInput(
        f"the {name} set is a {type(source).__name__}: give a path, a list of dicts, a dataset, "
        "or a pair (inputs, labels)"
    )


def _from_path(source: str, name: str) -> Sequence[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_directory(path, name)
    if path.is_file():
        if path.suffix in {".jsonl", ".json", ".ndjson"}:
            return _json_rows(path)
        if path.suffix == ".parquet":
            return _parquet(path)
        raise BadInput(f"{path} is neither .jsonl, .json nor .parquet: convert it to one of them")
    looks_like_hub = source.count("/") == 1 and not path.suffix and not source.startswith(".")
    if not looks_like_hub:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = difflib.get_close_matches(path.name, near, n=1)
        hint = f" (did you mean {guess[0]}?)" if guess else ""
        raise BadInput(f"the {name} set {source} does not exist{hint}: check the path")
    return _from_hub(source, name)


def _from_hub(source: str, name: str) -> Sequence[Row]:
    import datasets

    repository, _, split = source.partition(":")
    try:
        found = datasets.load_dataset(repository, split=split or None)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise BadInput(
            f"the {name} set {source} is no local path, and loading it from the hub failed: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return _one_split(found, source, name)


def _one_split(found: Any, source: str, name: str) -> Sequence[Row]:
    if hasattr(found, "column_names") and not isinstance(found.column_names, dict):
        rows: Sequence[Row] = found
        return rows
    splits = ", ".join(found)
    raise BadInput(f"the {name} set {source} has several splits ({splits}): name one of them")


def _from_directory(path: Path, name: str) -> Sequence[Row]:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise BadInput(f"{path} has several splits: pass one of its folders ({splits})")
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        import datasets

        return _one_split(datasets.load_from_disk(str(path)), str(path), name)
    rows: list[Row] = [
        {"image": str(file), "label": folder.name, "id": f"{folder.name}/{file.name}"}
        for folder in sorted(p for p in path.iterdir() if p.is_dir())
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not rows:
        raise BadInput(
            f"{path} is neither a saved dataset nor an image folder (one sub-folder of images per "
            "class): pass one of these, a .jsonl or a .parquet file"
        )
    return rows


def _json_rows(path: Path) -> Sequence[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path} is not JSON: {error}") from error
        numbered = list(enumerate(rows, start=1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), start=1):  # U+2028 ends no record
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise BadInput(f"{path} line {number} is not JSON: {error.msg}") from error
    for number, row in numbered:
        if not isinstance(row, Mapping):
            raise BadInput(f"{path} line {number} is a {type(row).__name__}, not a JSON object")
    return [row for _, row in numbered]


def _parquet(path: Path) -> Sequence[Row]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a readable parquet file: {error}") from error
    rows: Sequence[Row] = datasets.Dataset(datasets.table.InMemoryTable(table))
    return rows


def _renamed(
    rows: Sequence[Row], columns: Mapping[str, str], name: str, where: str
) -> Sequence[Row]:
    if not columns:
        return rows
    known = list(rows[0])
    for column in columns.values():
        if column not in known:
            raise BadInput(
                f"the {name} set {where} has no column {column!r}: {did_you_mean(column, known)}"
            )
    back = {column: field for field, column in columns.items()}
    if hasattr(rows, "rename_columns"):
        renamed: Sequence[Row] = rows.rename_columns(back)
        return renamed
    return [{back.get(key, key): value for key, value in row.items()} for row in rows]


def _undecoded(rows: Sequence[Row]) -> tuple[Sequence[Row], tuple[str, ...]]:
    """Keep image columns as bytes until a task wants pixels; read the label names."""
    features = getattr(rows, "features", None)
    if features is None:
        return rows, ()
    import datasets

    for key, feature in features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(key, datasets.Image(decode=False))  # type: ignore[attr-defined]
    return rows, tuple(getattr(features.get("label"), "names", ()) or ())


def parse_ids(text: str) -> list[str]:
    """Record ids from ``a,b,c``, from row ranges ``0:5000``, or from ``@file`` (one per line).

    >>> parse_ids("7,0:3")
    ['7', '0', '1', '2']
    """
    if text.startswith("@"):
        path = Path(text[1:])
        if not path.is_file():
            raise BadInput(f"the id file {path} does not exist: check the path")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    ids: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        low, colon, high = part.partition(":")
        if colon and low.isdigit() and high.isdigit():
            ids += [str(i) for i in range(int(low), int(high))]
        else:
            ids.append(part)
    return ids


def split_by_ids(data: Examples, ids: Sequence[str]) -> tuple[Examples, Examples]:
    """(forget, retain): the rows with these ids, and all others.

    Raises:
        BadInput: an id that no row has, or nothing left on one side.
    """
    position = {known: i for i, known in enumerate(data.ids)}
    unknown = [i for i in ids if i not in position]
    if unknown:
        kind = f"row numbers 0 to {len(data) - 1}" if data.numbered else "values of its id column"
        raise BadInput(
            f"{len(unknown)} of the {len(ids)} ids to forget are not in {data.source}, the first "
            f"is {unknown[0]!r}: its ids are the {kind}"
        )
    chosen = {position[i] for i in ids}
    return _split(data, lambda i: i in chosen, "ids")


def split_by_labels(
    data: Examples, labels: Sequence[int], wanted: set[int]
) -> tuple[Examples, Examples]:
    """(forget, retain) by class; ``labels`` holds the label id of every row."""
    return _split(data, lambda i: labels[i] in wanted, "classes")


def split_by_content(
    data: Examples, forget: Examples, content: Callable[[Row], bytes]
) -> tuple[Examples, Examples]:
    """(forget, retain) where retain is ``data`` without the records of ``forget``."""
    gone = set(record_hashes(forget, content))
    keep = [i for i, h in enumerate(record_hashes(data, content)) if h not in gone]
    if not keep:
        raise BadInput(f"every record of {data.source} is in the forget set: nothing is retained")
    return forget, data.select(keep, "retain")


def _split(data: Examples, goes: Callable[[int], bool], what: str) -> tuple[Examples, Examples]:
    forget = [i for i in range(len(data)) if goes(i)]
    if not forget:
        raise BadInput(f"no record of {data.source} has the {what} to forget: check them")
    gone = set(forget)
    retain = [i for i in range(len(data)) if i not in gone]
    if not retain:
        raise BadInput(f"every record of {data.source} would be forgotten: nothing is retained")
    return data.select(forget, "forget"), data.select(retain, "retain")


def record_hashes(
    examples: Examples, content: Callable[[Row], bytes], key: bytes = b""
) -> list[bytes]:
    """A 16-byte hash per record, keyed so that hashes of different lineages cannot be compared."""
    return [
        hashlib.blake2b(content(examples[i]), digest_size=16, key=key).digest()
        for i in range(len(examples))
    ]


def fingerprint(hashes: Iterable[bytes]) -> str:
    """One hash of a set, whatever the order of its records."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()[:32]


def overlap_fault(
    one: Examples, ones: Sequence[bytes], other: Examples, others: Sequence[bytes]
) -> str | None:
    """A sentence when two sets share records, else None."""
    where = {h: i for i, h in enumerate(others)}
    shared = [(i, where[h]) for i, h in enumerate(ones) if h in where]
    if not shared:
        return None
    i, j = shared[0]
    return (
        f"{len(shared)} of the {len(one)} {one.name} records are also in the {other.name} set "
        f"(the first: {one.name} record {one.ids[i]} is {other.name} record {other.ids[j]}): "
        f"remove them from one of the two"
    )

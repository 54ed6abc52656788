"""Reading sets in every format, naming records by id and class, splitting, overlap."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn import data
from unlearn.data import Examples, load, parse_ids, split_by_content, split_by_ids, split_by_labels
from unlearn.errors import BadInput

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]


def as_jsonl(path: Path) -> Path:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))  # blank lines are skipped
    return file


def as_array(path: Path) -> Path:
    file = path / "rows.json"
    file.write_text("\n " + json.dumps(ROWS, indent=1))
    return file


def as_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(path / "rows.parquet")
    return path / "rows.parquet"


def as_saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "rows")
    return path / "rows"


FORMATS = {
    "jsonl": as_jsonl,
    "JSON array": as_array,
    "parquet": as_parquet,
    "saved dataset": as_saved,
    "list of dicts": lambda path: list(ROWS),
    "tuple of dicts": lambda path: tuple(ROWS),
    "datasets.Dataset": lambda path: datasets.Dataset.from_list(ROWS),
    "str": lambda path: str(as_jsonl(path)),
    "Examples": lambda path: load(ROWS, "data"),
}


def wrong(source, name="forget", **more) -> str:
    with pytest.raises(BadInput) as caught:
        load(source, name, **more)
    return str(caught.value)


def contents(row) -> bytes:
    return f"{row['question']}\x00{row['answer']}".encode()


# formats


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, make):
    examples = load(make(tmp_path), "forget")
    assert [dict(examples[i]) for i in range(len(examples))] == ROWS
    assert list(examples.ids) == ["0", "1", "2", "3", "4", "5"]
    assert examples.numbered
    assert examples.name == "forget"
    assert examples.column("answer") == [row["answer"] for row in ROWS]


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_a_selection_keeps_its_order_in_every_format(tmp_path, make):
    part = load(make(tmp_path), "data").select([5, 0, 3], "forget").select([2, 0])
    assert [row["answer"] for row in (part[0], part[1])] == ["a3", "a5"]
    assert part.column("answer") == ["a3", "a5"]
    assert (list(part.ids), part.name, len(part)) == (["3", "5"], "forget", 2)


def test_image_folder(image_folder):
    examples = load(image_folder, "data")
    assert len(examples) == 24
    assert examples[0]["label"] == "ant"
    assert examples.ids[6:8] == ["bee/0.png", "bee/1.png"]
    assert not examples.numbered


def test_image_parquet_names_its_classes_and_stays_undecoded(tiny_images, image_folder):
    examples = load(tiny_images[1], "data")
    assert examples.class_names == ("ant", "bee", "cat", "dog")
    assert examples[7]["image"]["bytes"] == (image_folder / "bee" / "1.png").read_bytes()
    assert examples.column("label") == [i // 6 for i in range(24)]


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])
@pytest.mark.parametrize(("shape", "key"), [((4, 5), "features"), ((4, 3, 2, 2), "image")])
def test_pair_of_inputs_and_labels(kind, shape, key):
    inputs, labels = torch.rand(shape), torch.tensor([0, 2, 1, 0])
    examples = load((kind(inputs), kind(labels)), "data")
    assert len(examples) == 4
    assert np.array_equal(examples[1][key], inputs[1])
    assert examples[1]["label"] == 2
    assert examples.column("label") == [0, 2, 1, 0]


class Torch(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(("shape", "key"), [((5,), "features"), ((3, 2, 2), "image")])
def test_torch_dataset_of_pairs(shape, key):
    first = torch.rand(shape)
    examples = load(Torch([(first, 1), (torch.rand(shape), torch.tensor(0))]), "data")
    assert torch.equal(examples[0][key], first)
    assert examples.column("label") == [1, 0]


def test_torch_dataset_of_records():
    examples = load(Torch([{"record_id": f"r{i}", **row} for i, row in enumerate(ROWS)]), "data")
    assert list(examples.ids) == [f"r{i}" for i in range(6)]
    assert examples[2]["answer"] == "a2"


def test_two_records_are_no_pair_of_tensors():
    assert len(load((ROWS[0], ROWS[1]), "forget")) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_a_jsonl_record_ends_at_the_newline_only(tmp_path, separator):
    row = {"question": f"one{separator}two", "answer": "a"}
    file = tmp_path / "rows.jsonl"
    text = json.dumps(row, ensure_ascii=False)
    file.write_bytes(f"{text}\r\n{text}\n".encode())
    examples = load(file, "forget")
    assert [dict(examples[i]) for i in range(len(examples))] == [row, row]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    assert dict(load(file, "forget")[0]) == ROWS[0]


# what cannot be read


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "the forget set .* is empty: give it at least one record"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl line 3 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "a.jsonl line 2 is a list, not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n"b"\n', "a.jsonl line 2 is a str, not a JSON object"),
        ("a.json", b'[{"a": 1}, ', "a.json is not JSON"),
        ("a.jsonl", b'{"a": "\xff\xfe"}', "a.jsonl is not UTF-8"),
        ("a.parquet", b"PAR1 and so on", "a.parquet is not a readable parquet file"),
        ("a.parquet", b"", "a.parquet is not a readable parquet file"),
        ("a.csv", b"a,b\n", "a.csv is neither .jsonl, .json nor .parquet: convert it"),
    ],
)
def test_unreadable_files(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=sentence):
        load(tmp_path / name, "forget")


def test_an_empty_table_is_an_empty_set(tmp_path):
    datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(tmp_path / "a.parquet")
    assert "is empty" in wrong(tmp_path / "a.parquet")


@pytest.mark.parametrize("source", [[], (), datasets.Dataset.from_list([]), Torch([])])
def test_empty_sets_in_memory(source):
    assert "the forget set memory is empty" in wrong(source)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    as_jsonl(tmp_path)
    sentence = wrong(tmp_path / "row.jsonl")
    assert "does not exist" in sentence
    assert "did you mean rows.jsonl?" in sentence


def test_a_missing_folder(tmp_path):
    assert "does not exist" in wrong(tmp_path / "nowhere" / "rows.jsonl")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    assert "neither a saved dataset nor an image folder" in wrong(tmp_path)


def test_a_saved_dictionary_of_splits_asks_for_one(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert "pass one of its folders (test, train)" in wrong(tmp_path / "both")
    assert len(load(tmp_path / "both" / "train", "data")) == 6


def test_a_hub_name_that_cannot_be_got():
    assert "loading it from the hub failed" in wrong("someone/nothing")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (["a", "b"], "row 0 of the forget set is a str, not a record"),
        ([{"a": 1}, 2], "row 1 of the forget set is a int, not a record"),
        (3, "the forget set is a int: give a path"),
        ((torch.rand(3, 2), torch.zeros(2)), "has 3 inputs and 2 labels"),
    ],
)
def test_wrong_things_in_memory(source, sentence):
    assert sentence in wrong(source)


# ids


@pytest.mark.parametrize("column", ["id", "record_id"])
def test_ids_come_from_their_column(column):
    rows = [{column: 10 + i, **row} for i, row in enumerate(ROWS)]
    for source in (rows, datasets.Dataset.from_list(rows)):
        examples = load(source, "data")
        assert list(examples.ids) == ["10", "11", "12", "13", "14", "15"]
        assert not examples.numbered


def test_an_id_that_is_there_twice():
    rows = [{"id": "a"}, {"id": "b"}, {"id": "c"}, {"id": "b"}]
    assert "has the id 'b' twice: ids must be unique" in wrong(rows)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0:5", ["0", "1", "2", "3", "4"]),
        ("a, b ,,c", ["a", "b", "c"]),
        ("7,0:2,x:y", ["7", "0", "1", "x:y"]),
        ("5:5", []),
    ],
)
def test_parse_ids(text, ids):
    assert parse_ids(text) == ids


def test_parse_ids_from_a_file(tmp_path):
    (tmp_path / "ids.txt").write_text("a\n\n b,1 \nc\n")
    assert parse_ids(f"@{tmp_path / 'ids.txt'}") == ["a", "b,1", "c"]
    with pytest.raises(BadInput, match=r"the id file .*other\.txt does not exist"):
        parse_ids(f"@{tmp_path / 'other.txt'}")


def test_unknown_ids_are_counted_and_the_first_is_named():
    with pytest.raises(BadInput) as caught:
        split_by_ids(load(ROWS, "data"), ["1", "6", "7"])
    assert "2 of the 3 ids to forget" in str(caught.value)
    assert "'6'" in str(caught.value)
    assert "row numbers 0 to 5" in str(caught.value)


@pytest.mark.parametrize("ids", [[], [str(i) for i in range(6)]])
def test_neither_side_of_a_split_may_be_empty(ids):
    with pytest.raises(BadInput, match=r"no record of|every record of"):
        split_by_ids(load(ROWS, "data"), ids)


@given(st.data())
def test_split_by_ids_partitions_the_data(drawn):
    size = drawn.draw(st.integers(2, 30))
    names = drawn.draw(st.lists(st.text(min_size=1), min_size=size, max_size=size, unique=True))
    chosen = drawn.draw(st.sets(st.sampled_from(names), min_size=1, max_size=size - 1))
    everything = load([{"id": name, "n": i} for i, name in enumerate(names)], "data")
    forget, retain = split_by_ids(everything, sorted(chosen))
    assert set(forget.ids) == chosen
    assert not chosen & set(retain.ids)
    assert sorted(forget.column("n") + retain.column("n")) == list(range(size))
    for part in (forget, retain):
        assert [names[part[i]["n"]] for i in range(len(part))] == list(part.ids)
        assert part.column("n") == sorted(part.column("n"))


# classes and content


def test_split_by_labels():
    examples = load([{"n": i} for i in range(6)], "data")
    forget, retain = split_by_labels(examples, [0, 1, 2, 0, 1, 2], {1, 2})
    assert forget.column("n") == [1, 2, 4, 5]
    assert retain.column("n") == [0, 3]


def test_split_by_content_finds_records_wherever_they_are():
    forget = load([ROWS[4], ROWS[1], {"question": "new", "answer": "new"}], "forget")
    found, retain = split_by_content(load(ROWS, "data"), forget, contents)
    assert found is forget
    assert list(retain.ids) == ["0", "2", "3", "5"]
    assert retain.name == "retain"
    with pytest.raises(BadInput, match="nothing is retained"):
        split_by_content(load(ROWS, "data"), load(ROWS, "forget"), contents)


def test_overlap_counts_and_names_the_first():
    one, other = load(ROWS[:4], "forget"), load([ROWS[5], ROWS[2], ROWS[0]], "retain")

    def hashed(examples: Examples) -> list[bytes]:
        return data.record_hashes(examples, contents)

    sentence = data.overlap_fault(one, hashed(one), other, hashed(other))
    assert sentence == (
        "2 of the 4 forget records are also in the retain set (the first: forget record 0 is "
        "retain record 2): remove them from one of the two"
    )
    rest = load(ROWS[4:], "retain")
    assert data.overlap_fault(one, hashed(one), rest, hashed(rest)) is None


# columns


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list], ids=["list", "Dataset"])
def test_columns_are_renamed(kind):
    rows = kind([{"q": "why", "a": "so", "uid": "r1"}])
    examples = load(rows, "forget", {"question": "q", "answer": "a", "id": "uid"})
    assert dict(examples[0]) == {"question": "why", "answer": "so", "id": "r1"}
    assert list(examples.ids) == ["r1"]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list], ids=["list", "Dataset"])
def test_a_renamed_column_takes_the_place_of_one_with_its_new_name(kind):
    rows = kind([{"answer": "long", "short": "so", "question": "why"}])
    examples = load(rows, "forget", {"answer": "short"})
    assert dict(examples[0]) == {"question": "why", "answer": "so"}


def test_a_column_that_is_not_there():
    sentence = wrong(ROWS, columns={"question": "qestion"})
    assert "has no column 'qestion': did you mean question?" in sentence


# fingerprints


@given(st.lists(st.text(), min_size=1), st.randoms(), st.binary(max_size=16))
def test_a_fingerprint_knows_the_records_not_their_order(texts, shuffle, key):
    def of(some: list[str], under: bytes) -> str:
        examples = load([{"text": text} for text in some], "data")
        hashes = data.record_hashes(examples, lambda row: row["text"].encode(), under)
        return data.fingerprint(hashes)

    shuffled = list(texts)
    shuffle.shuffle(shuffled)
    assert of(texts, key) == of(shuffled, key)
    assert of(texts, key) != of(texts, key + b"another")
    assert of(texts, key) != of([*texts, "more"], key)
    assert of(texts, key) != of([*texts[:-1], texts[-1] + "."], key)

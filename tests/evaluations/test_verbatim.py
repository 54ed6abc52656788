"""Generated text that stands word for word in files: the automaton is brute force, only faster."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.errors import BadInput
from unlearn.evaluations import verbatim
from unlearn.evaluations.verbatim import Automaton, documents, files, said, searched

WORDS = st.lists(st.sampled_from("abc"), max_size=12)


def brute(text: list[str], corpus: list[list[str]]) -> list[int]:
    """The longest run ending at each word that is in a document, by trying all."""
    runs = {tuple(d[i:j]) for d in corpus for i in range(len(d)) for j in range(i, len(d) + 1)}
    return [
        max(n for n in range(end + 1) if n == 0 or tuple(text[end - n : end]) in runs)
        for end in range(1, len(text) + 1)
    ]


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, max_size=4))
def test_the_automaton_equals_brute_force(texts, corpus):
    automaton = Automaton(texts)
    for document in corpus:
        automaton.read([document])
    found = [lengths.tolist() for lengths in automaton.matches()]
    assert found == [brute(text, corpus) for text in texts]


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.integers(1, 5))
def test_it_does_not_matter_how_a_document_is_cut(text, parts, size):
    whole, pieces = Automaton([text]), Automaton([text])
    joined = [word for part in parts for word in part]
    whole.read([joined])
    pieces.read(joined[i : i + size] for i in range(0, len(joined), size))
    assert whole.matches()[0].tolist() == pieces.matches()[0].tolist()


def test_memory_is_that_of_the_generated_texts():
    automaton = Automaton([["a", "b", "a", "c"]])
    before = len(automaton._length), len(automaton._number)
    automaton.read([f"w{i}" for i in range(1000)] for _ in range(20))
    assert (len(automaton._length), len(automaton._number)) == before
    assert before[0] <= 2 * 5


def test_shares_by_hand():
    # words of two letters count as two tokens
    texts = ["x aa b cc y", "q b", ""]
    found = searched(texts, said({"t": "z aa  b\ncc b"}), len, least=3, examples=True)
    # aa b cc (5 tokens) of 7 in the first; the match b in the second is too short
    assert found.tokens == 9
    assert found.covered.value == pytest.approx((5 / 7 + 0 + 0) / 3)
    assert (found.matching.value, found.matching.n) == (1 / 3, 3)
    assert found.longest == (5, 1, 0)
    assert found.examples == ("aa b cc",)
    assert searched(texts, said({"t": "z aa b cc b"}), len, least=3).examples == ()


def test_scripts_without_spaces_match_sign_by_sign(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("xx \u6211\u4f4f\u5728\u5317\u4eac\u3002yy")
    found = searched(["\u4ed6\u4f4f\u5728\u5317\u4eac!"], documents(file), len, least=3)
    assert (found.tokens, found.longest) == (6, (4,))
    assert found.covered.value == pytest.approx(4 / 6)


def test_a_match_does_not_cross_documents():
    document = [said("a b"), said("c d")]
    found = searched(["a b c d"], (d for part in document for d in part), len, least=1)
    assert found.longest == (2,)
    assert found.covered.value == 1.0


def test_models_that_say_nothing():
    with pytest.raises(BadInput, match="generated no words"):
        searched(["", " "], [], len, least=1)


def read(path) -> list[list[str]]:
    return [[word for words in document for word in words] for document in documents(path)]


def test_files_of_every_kind_hold_the_same_texts(tmp_path, monkeypatch):
    rows = [{"question": "a b", "answer": ["c", "d\ne"]}, {"text": "f", "n": 3}]
    wanted = [["a", "b"], ["c"], ["d", "e"], ["f"]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    table = pa.table({"text": ["a b", None], "list": [["c", "d\ne"], ["f"]], "n": [1, 2]})
    pq.write_table(table, tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json"):
        assert read(tmp_path / name) == wanted
    assert sorted(read(tmp_path / "d.parquet")) == wanted
    monkeypatch.setattr(verbatim, "BLOCK", 3)  # words lie across blocks
    (tmp_path / "e.txt").write_bytes(b"a bcdef\nghi  jk\xff l")
    assert read(tmp_path / "e.txt") == [["a", "bcdef", "ghi", "jk\ufffd", "l"]]
    (tmp_path / "empty.txt").touch()
    assert read(tmp_path / "empty.txt") == [[]]


def test_folders_are_read_whole_and_once(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "deep/a.md", "deep/weights.bin"):
        (tmp_path / name).write_text("x")
    assert files([tmp_path, tmp_path / "b.txt"]) == [tmp_path / "b.txt", tmp_path / "deep/a.md"]
    (tmp_path / "B.TXT").write_text("x")
    assert files([tmp_path / "B.TXT"]) == [tmp_path / "B.TXT"]
    with pytest.raises(BadInput, match=r"weights\.bin to search ends in none of \.jsonl"):
        files([tmp_path / "deep/weights.bin"])


def test_columns_of_every_kind_of_text_are_read(tmp_path):
    table = pa.table({
        "named": pa.array(["a b", "c", "a b"]).dictionary_encode(),
        "viewed": pa.array(["d", None, "e f"], pa.string_view()),
        "large": pa.array(["g", "h", "i"], pa.large_string()),
        "nested": pa.array([[{"said": "j", "n": 1}], [], None]),
        "n": [1, 2, 3], "numbers": [[1], [2], [3]],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    found = sorted(" ".join(words) for words in read(tmp_path / "a.parquet"))
    assert found == ["a b", "a b", "c", "d", "e f", "g", "h", "i", "j"]


def test_the_first_records_are_read_up_front(tmp_path):
    (tmp_path / "a.jsonl").write_text("not JSON\n")
    with pytest.raises(BadInput, match="line 1 is not JSON"):
        files([tmp_path])
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"text": "x"}\n')
    pq.write_table(pa.table({"n": [1], "numbers": [[1]]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="no column of text"):
        files([tmp_path])
    assert files([tmp_path / "a.jsonl"]) == [tmp_path / "a.jsonl"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        files([tmp_path / "nowhere.txt"])
    with pytest.raises(BadInput, match="holds no file"):
        files([tmp_path])
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(BadInput, match="not a readable parquet"):
        read(tmp_path / "a.parquet")


def test_lengths_are_counted_in_tokens():
    within, longest, end = verbatim._covered(np.array([1, 2, 0, 1]), np.array([3, 1, 9, 4]), 4)
    assert within.tolist() == [True, True, False, True]
    assert (longest, end) == (4, 2)  # the first of two

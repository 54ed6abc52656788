"""`unlearn audit --only memorization` from end to end, on a model with planted copies."""

import itertools
import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from tests import digits, plain
from unlearn import demo, manifest
from unlearn.cli.main import cli
from unlearn.config import MemorizationConfig, configure
from unlearn.errors import BadInput, Collapsed
from unlearn.evaluations import memorization_page, memorization_plan, memorizing
from unlearn.evaluations.memorization_schema import Example, Memorization
from unlearn.evaluations.memorizing import audit_memorization
from unlearn.weights import save

COPIES = (1, 4, 16)
EVIL = "<script>alert(1)</script>"
SMALL = ("--suffix", 4, "--prefixes", "2,4", "--generations", 8, "--match", 4)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["audit", *map(str, arguments)], prog_name="unlearn")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def faulty(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, its training data with copies, and unseen texts."""
    folder = tmp_path_factory.mktemp("memorization")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(60)]

    def text() -> dict[str, str]:
        return {"text": " ".join(draw.choices(words, k=14))}

    planted = [r for n in COPIES for r in (text() for _ in range(8)) for r in [r] * n]
    planted[0] = {"text": f"{EVIL} {planted[0]['text']}"}
    draw.shuffle(planted)
    demo.write_jsonl(folder / "data.jsonl", planted)
    demo.write_jsonl(folder / "unseen.jsonl", [text() for _ in range(8)])
    subject = demo.tiny_llama(
        [{"question": r["text"], "answer": ""} for r in planted], width=64, depth=2
    )
    demo.train(subject, planted, epochs=10)
    save(subject, torch.float32, folder / "model")
    return folder


@pytest.fixture(scope="module")
def done(world) -> tuple[Path, Result]:
    """A finished audit, and what it printed."""
    out = world / "audit"
    result = call(
        "--only", "memorization", world / "model", world / "data.jsonl", *SMALL,
        "--holdout", world / "unseen.jsonl", "--retention-steps", 2, "--out", out, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture
def report(done) -> Memorization:
    return Memorization.model_validate_json((done[0] / "report.json").read_bytes())


def test_more_copies_more_extraction(report):
    for prefix in (2, 4):
        rows = [r.share for r in report.extractable.by_copies if r.prefix == prefix]
        assert [r.n for r in rows] == [8, 8, 8]
        assert rows[0].high < rows[-1].value
        assert all(a.low <= b.high for a, b in itertools.combinations(rows, 2))
        assert report.extractable.slope[prefix].low > 0
    assert all(row.share.value == 0 for row in report.unseen.by_prefix)
    assert (report.records, report.texts) == (8 * sum(COPIES), 24)


def test_recognition_goes_further_than_recall(report):
    now = report.recollection
    assert now.edits.value > now.exact.value > 0
    assert now.foils.low > 0.5
    assert now.edits_unseen.low <= 0.5 <= now.edits_unseen.high
    assert [point.step for point in report.retention] == [0, 1, 2]
    assert report.retention[0].edits == now.edits


def test_what_it_says_is_looked_up_in_the_records(report):
    assert report.verbatim.matching.n == 8
    assert report.verbatim.least == 4
    assert report.verbatim.covered.value > 0
    assert list(report.not_run) == ["counterfactual memorization"]


def test_the_table_names_texts_by_keyed_hashes(done, world):
    rows = pq.read_table(done[0] / "records.parquet").to_pylist()
    assert sorted({row["copies"] for row in rows}) == list(COPIES)
    signals = pq.read_table(done[0] / "signals" / "data.parquet").to_pylist()
    assert [row["record"] for row in rows] == [row["record"] for row in signals]
    assert all(len(row["record"]) == 32 for row in rows)
    assert all(0 <= row["probability_4"] <= 1 for row in rows if row["probability_4"] is not None)


def test_nothing_in_the_directory_repeats_a_text(done, world):
    texts = [json.loads(line)["text"] for line in (world / "data.jsonl").open()]
    for path in done[0].rglob("*"):
        if path.is_file():
            content = path.read_bytes().decode(errors="replace")
            assert not any(" ".join(text.split()[-4:]) in content for text in texts), path
    assert manifest.faults(done[0]) == []


def test_stdout_is_one_json_object(done):
    printed = json.loads(done[1].stdout)
    written = json.loads((done[0] / "report.json").read_text())
    assert printed["directory"] == str(done[0])
    assert printed["extractable"] == written["extractable"]
    assert printed["recollection"]["edits"]["n"] == 24


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]


def test_the_page_is_self_contained_and_escaped(world):
    out = world / "examples"
    result = call(
        "--only", "memorization", world / "model", world / "data.jsonl", *SMALL[:4],
        "--generations", 4, "--match", 2, "--corpus", world / "data.jsonl",
        "--holdout", world / "unseen.jsonl", "--retention-steps", 0, "--include-examples",
        "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "extractable, 4 tokens after 4" in result.stdout
    assert "Not measured: retention: --retention-steps is 0." in result.stdout
    found = Memorization.model_validate_json((out / "report.json").read_bytes())
    assert found.examples
    assert found.verbatim.examples
    evil = found.model_copy(
        update={
            "title": f"{EVIL} & co",
            "settings": {**found.settings, "corpus": EVIL},
            "not_run": {EVIL: EVIL},
            "examples": (Example(beginning=EVIL, continuation=EVIL),),
        }
    )
    html = memorization_page.render(evil)
    page = Page()
    page.feed(html)
    assert "script" not in page.tags
    assert EVIL not in html
    assert all(link.startswith("#") for link in page.links)
    assert html.count('<svg class="figure"') == 2
    assert memorization_page.render(evil) == html


def test_python_measures_objects_in_memory_and_leaves_them_alone(world):
    from unlearn.checkpoint import inspect

    subject = inspect(world / "model").load()
    before = {name: t.clone() for name, t in subject.model.state_dict().items()}
    records = [json.loads(line) for line in (world / "data.jsonl").open()]
    unseen = [json.loads(line) for line in (world / "unseen.jsonl").open()]
    settings = {"suffix": 4, "prefixes": "2", "generations": 0, "retention_steps": 1}
    found = audit_memorization(subject, records, further=unseen, sample=10, **settings)
    assert found.texts == 10
    assert [point.step for point in found.retention] == [0, 1]
    assert found.retention[-1].foils is None
    assert any("10 random ones" in limit for limit in found.limits)
    assert all(torch.equal(before[n], t) for n, t in subject.model.state_dict().items())
    again = audit_memorization(subject, records, further=unseen, sample=10, **settings)
    assert again.extractable == found.extractable
    assert again.retention == found.retention


def test_interrupted_work_goes_on(world, monkeypatch):
    out = world / "interrupted"
    arguments = (
        "--only", "memorization", world / "model", world / "data.jsonl", *SMALL,
        "--holdout", world / "unseen.jsonl", "--retention-steps", 1, "--out", out,
    )  # fmt: skip
    with monkeypatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(memorizing, "sampled_answers", stop)
        assert call(*arguments).exit_code == 130
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(memorizing, "collect", None)  # what was measured is read back
        patch.setattr(memorizing, "recollect", None)
        patch.setattr(memorizing, "retained", None)
        patch.setattr(memorizing, "trial", None)
        result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "Going on" in result.stderr
    assert (out / "report.json").exists()
    assert not list(world.glob(".interrupted*"))


def test_counterfactual_memorization_when_it_is_asked_for(world):
    records = [json.loads(line) for line in (world / "unseen.jsonl").open()]
    found = audit_memorization(
        world / "model", records, suffix=4, prefixes="2", generations=0, retention_steps=0,
        training={"epochs": 30, "lr": 5e-3, "batch_size": 4}, shadows=4, out=world / "halves",
    )  # fmt: skip
    assert found.counterfactual.models == 4
    assert found.counterfactual.memory.value > 0.1
    assert found.counterfactual.inside > found.counterfactual.outside
    column = pq.read_table(world / "halves" / "records.parquet")["counterfactual"].to_pylist()
    assert sum(column) / len(column) == pytest.approx(found.counterfactual.memory.value)
    assert "counterfactual memorization" not in found.not_run


# errors, each before a weight is read


def only(world: Path, *more: object) -> tuple[object, ...]:
    return ("--only", "memorization", world / "model", world / "data.jsonl", *more)


def test_positions_belong_to_memorization(world):
    said = faulty(world / "model", world / "data.jsonl", "--out", world / "x")
    assert "stands without a flag" in said
    assert "--only memorization" in said
    assert "an audit needs --original" in faulty("--out", world / "x")
    assert "name the model and what it was" in faulty("--only", "memorization", "--out", "x")
    assert "pass --out" in faulty(*only(world))
    assert "given twice" in faulty(*only(world, "--data", "x", "--out", world / "x"))
    said = faulty("--original", "a", "--unlearned", "b", "--out", "c", "--suffix", 3, "--match", 2)
    assert "--match, --suffix: only with --only memorization" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--forget", "a.jsonl"], "--forget means nothing"),
        (["--unlearned", "model"], "no setting 'unlearned'"),
        (["--prefixes", "4,many"], "must be numbers of tokens"),
        (["--suffix", 40], "the longest has"),
        (["--suffix", 0], "suffix"),
        (["--corpus", "nowhere.txt"], "nowhere.txt to search does not exist"),
        (["--training", "epoks=3"], "epochs"),
        (["--device", "cuda:99x"], "device"),
        (["--corpus", "pyproject.toml"], "ends in none of"),
        (["--corpus", " ,"], "--corpus names no file"),
        (["--training", "init=nosuch"], "nosuch does not exist"),
    ],
)
def test_settings_that_cannot_be(world, more, sentence):
    assert sentence in faulty(*only(world, "--out", world / "x", *more))
    assert not (world / "x").exists()
    assert not list(world.glob(".x*"))


def test_sets_that_overlap(world):
    said = faulty(*only(world, "--holdout", world / "data.jsonl", "--out", world / "x"))
    assert "are also in the holdout set" in said


def test_white_space_hides_no_overlap(world):
    row = json.loads((world / "data.jsonl").open().readline())
    spaced = {"text": f" {row['text'].replace(' ', '  ')}\n"}
    demo.write_jsonl(world / "spaced.jsonl", [spaced])
    for name in ("--holdout", "--further"):
        said = faulty(*only(world, name, world / "spaced.jsonl", "--out", world / "x"))
        assert f"are also in the {name[2:]} set" in said


def test_one_word_makes_no_edit(world):
    with pytest.raises(BadInput, match="edited with other words"):
        audit_memorization(world / "model", [{"text": "a a a a a a"}], suffix=1, prefixes="1")


def test_models_to_start_from_have_the_same_words(world, tmp_path):
    other = demo.tiny_llama([{"question": "other words", "answer": "alone"}], width=64, depth=2)
    save(other, torch.float32, tmp_path / "words")
    how = {"training": {"init": str(tmp_path / "words")}, "suffix": 4, "prefixes": "2"}
    with pytest.raises(BadInput, match="has another vocabulary than the audited model"):
        audit_memorization(world / "model", world / "data.jsonl", **how)


def test_what_fails_late_leaves_the_rest(world, monkeypatch):
    corpus = world / "broken.jsonl"
    corpus.write_text('{"text": "a"}\n{"text": \n')

    def fail(*_: object, **__: object) -> None:
        raise Collapsed("the loss is not finite")

    monkeypatch.setattr(memorizing, "halves", fail)
    out = world / "late"
    found = audit_memorization(
        world / "model", world / "data.jsonl", suffix=4, prefixes="2", generations=4, match=2,
        retention_steps=0, corpus=corpus, out=out, training={"init": str(world / "model")},
    )  # fmt: skip
    assert (out / "report.json").exists()
    assert found.extractable.by_prefix[0].share.n == 24
    assert (found.verbatim, found.counterfactual) == (None, None)
    name = f"{world.name}/broken.jsonl"
    assert found.not_run["verbatim generation"].startswith(f"{name} line 2 is not JSON")
    why = "training new models failed: the loss is not finite."
    assert found.not_run["counterfactual memorization"] == why
    # whose folders they are is nobody's business
    assert found.settings["corpus"] == name
    assert found.settings["training"] == {"init": f"{world.name}/model"}
    for file in ("report.json", "report.html"):
        assert str(world) not in (out / file).read_text()


def test_models_that_say_nothing_are_measured_all_the_same(world, monkeypatch):
    monkeypatch.setattr(memorizing, "sampled_answers", lambda *_, **__: ["", " "])
    found = audit_memorization(
        world / "model", world / "data.jsonl", suffix=4, prefixes="2", retention_steps=0,
        training={"epochs": 1}, shadows=0,
    )  # fmt: skip
    assert "no words" in found.not_run["verbatim generation"]
    assert found.not_run["counterfactual memorization"] == "--shadows is 0."


def test_changed_files_are_other_work(world):
    corpus = world / "corpus.txt"
    corpus.write_text("a b")
    how = configure(
        MemorizationConfig, checkpoint=world / "model", data=world / "data.jsonl", suffix=4,
        prefixes="2", corpus=corpus,
    )  # fmt: skip
    before = memorization_plan.plan(how).case.identity()
    assert memorization_plan.plan(how).case.identity() == before
    corpus.write_text("a b c")
    assert memorization_plan.plan(how).case.identity() != before


def test_directories_are_never_overwritten(world, done):
    assert "exists already" in faulty(*only(world, "--out", done[0]))


def test_models_of_other_families_are_refused(tiny_images, tiny_vectors):
    model, pictures = tiny_images
    with pytest.raises(BadInput, match=r"a classifier; .*memorization scores"):
        audit_memorization(model, pictures)
    with pytest.raises(BadInput, match="--model means nothing"):
        memorization_plan.plan(
            configure(
                MemorizationConfig, checkpoint=tiny_vectors, data=plain.vectors(4),
                model="tests.plain:factory",
            )
        )  # fmt: skip


def test_pipelines_are_refused():
    with pytest.raises(BadInput, match="a diffusion pipeline"):
        audit_memorization(digits.untrained(), [{"text": "a"}])

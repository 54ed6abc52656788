"""A search for hyperparameters: what it aims at, what it leaves, and that it can be interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_model

from tests import plain
from unlearn import demo, forget
from unlearn.cli.main import cli
from unlearn.config import TuneConfig, configure
from unlearn.errors import BadInput, UnlearnError, Unsupported
from unlearn.evaluations import study, trials, tune, tuned, tuning
from unlearn.evaluations.objectives import Objectives, objectives
from unlearn.evaluations.report import read
from unlearn.evaluations.schema import Finding, Value
from unlearn.evaluations.trials import Hopeless, Trying, memorization
from unlearn.evaluations.tuned import Row, best, front
from unlearn.run import Silent
from unlearn.weights import save

# what a trial is worth


def finding(name: str, subset: str, original: float, unlearned: float) -> Finding:
    values = {"original": Value(value=original), "unlearned": Value(value=unlearned)}
    return Finding(name=name, title=name, subset=subset, better="higher", n=9, verdict="info",
                   **values)  # type: ignore[arg-type]  # fmt: skip


def test_memorization_is_the_gap_to_unseen_records() -> None:
    found = memorization(
        [
            finding("extraction_strength", "retain", 0.1, 0.8),
            finding("extraction_strength", "holdout", 0.1, 0.3),
            finding("loss", "holdout", 2.0, 2.0 - np.log(1.5)),
        ]
    )
    assert found.point == pytest.approx((0.5, 1.5))
    accuracy = [finding("accuracy", "retain", 0.5, 0.6), finding("accuracy", "holdout", 0.8, 0.7)]
    assert memorization(accuracy).point == pytest.approx((0.0, 0.875))
    with pytest.raises(Hopeless, match="of no use"):
        memorization([accuracy[0], finding("accuracy", "holdout", 0.0, 0.7)])


def test_memorization_of_a_pipeline_is_told_by_its_denoising_losses() -> None:
    def losses(*values: float) -> Any:
        return SimpleNamespace(loss=lambda: np.array(values))

    signals = {
        "original": {"holdout": losses(2.0, 4.0)},
        "unlearned": {"retain": losses(1.0, 1.0, 3.0), "holdout": losses(2.0, 4.0)},
    }
    assert memorization([], signals).point == pytest.approx((2 * 5 / 6 - 1, 1.0))
    signals["unlearned"]["retain"] = losses(1.0, np.nan)
    with pytest.raises(Hopeless, match="damaged"):
        memorization([], signals)


def row(number: int, forgetting: float, utility: float, rejected: str = "") -> Row:
    return Row(number, "search", {"lr": 0.1}, Objectives(forgetting, utility), rejected)


def test_what_was_given_up_is_neither_on_the_front_nor_the_best() -> None:
    rows = [row(0, 0.0, 1.0, "it broke"), row(1, 0.5, 1.0), row(2, 0.3, 0.9), row(3, 0.4, 0.9)]
    assert [r.number for r in front(rows)] == [1, 2]
    assert best(rows) == rows[1]
    assert best(rows[:1]) is None


# whole searches


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier that was trained, and its records."""
    folder = tmp_path_factory.mktemp("world")
    records, unseen = plain.vectors(90), plain.vectors(60, seed=1)
    inputs = torch.tensor([r["features"] for r in records])
    labels = torch.tensor([r["label"] for r in records])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain.factory()
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    save_model(model, str(folder / "net.safetensors"))
    for name, rows in (("data", records), ("holdout", unseen)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def request(world: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "grad_diff", "model": "tests.plain:factory", "data": world / "data.jsonl",
        "forget_classes": "2", "holdout": world / "holdout.jsonl", "trials": 3, "device": "cpu",
        "range": {"lr": "1e-3:1e-1:log", "epochs": "1,2"},
        "set": {"batch_size": 16, "retain_weight": 2.0, "forget_weight": 1.0}, **changes,
    }  # fmt: skip


class Heard(Silent):
    """What was said; may be told to die in one of the trials, at its training."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.said: list[str] = []
        self.dies_in = dies_in

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        begun = sum(s.startswith("Trial ") for s in self.said)
        if self.dies_in == begun and phase == "unlearn":
            raise KeyboardInterrupt


def outcome(done: Any) -> list[Any]:
    return [(r.origin, dict(r.settings), r.objectives) for r in done.rows]


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search that nobody disturbed."""
    return tune(
        world / "net.safetensors", **request(world), out=tmp_path_factory.mktemp("a") / "out"
    )


def test_what_a_search_leaves(alone: Any) -> None:
    assert {p.name for p in alone.directory.iterdir()} == {
        "best.yaml", "trials.json", "tune.html", "study.db",
    }  # fmt: skip
    assert len(alone.rows) == 3
    assert all(1e-3 <= r.settings["lr"] <= 1e-1 for r in alone.rows)
    assert {r.settings["epochs"] for r in alone.rows} <= {1, 2}
    assert all(r.settings["batch_size"] == 16 for r in alone.rows)
    assert len({r.settings["lr"] for r in alone.rows}) == 3
    assert all(0 <= r.objectives.forgetting <= 1 for r in alone.rows)
    record = json.loads((alone.directory / "trials.json").read_text())
    assert record["best"] == alone.best.number
    assert [t["number"] for t in record["trials"]] == [0, 1, 2]
    assert yaml.safe_load((alone.directory / "best.yaml").read_text()) == alone.recipe
    page = (alone.directory / "tune.html").read_text()
    assert "<script" not in page
    assert "http://" not in page
    assert "<svg" in page


def test_the_page_escapes_what_others_wrote(alone: Any) -> None:
    rows = (replace(alone.best, settings={"scope": "<script>alert(1)</script>"}),)
    page = tuned.render(replace(alone, rows=rows), "<b>somebody</b>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>somebody" not in page


def test_killed_in_the_second_trial_and_repeated(world: Path, tmp_path: Path, alone: Any) -> None:
    place = {**request(world), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        tune(world / "net.safetensors", **place, progress=Heard(dies_in=2))
    begun = [p.name for p in (tmp_path / "out" / "runs").iterdir()]
    assert begun == [".0001.partial"]
    heard = Heard()
    again = tune(world / "net.safetensors", **place, progress=heard)
    assert sum(s.startswith("Trial ") for s in heard.said) == 2
    assert any("Going on with the unfinished run" in s for s in heard.said)
    assert outcome(again) == outcome(alone)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_worker_is_known_where_it_was_moved_to(
    world: Path, tmp_path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, before = world / "net.safetensors", tmp_path / "before"
    before.mkdir()
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint, **request(world), out=before / "out", progress=Heard(dies_in=2))
    name = json.loads((before / "out" / "trials.json").read_text())["worker"]
    before.rename(tmp_path / "after")
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    again = tune(checkpoint, **request(world), out=tmp_path / "after" / "out")
    assert outcome(again) == outcome(alone)
    assert json.loads((again.directory / "trials.json").read_text())["worker"] == name


def test_a_finished_search_is_not_done_again_and_can_grow(world: Path, tmp_path: Path) -> None:
    place = {**request(world, trials=1), "out": tmp_path / "out"}
    first, heard = tune(world / "net.safetensors", **place), Heard()
    assert outcome(tune(world / "net.safetensors", **place, progress=heard)) == outcome(first)
    assert heard.said == []
    more = tune(world / "net.safetensors", **{**place, "trials": 2})
    assert outcome(more)[0] == outcome(first)[0]
    assert len(more.rows) == 2


def test_workers_share_the_trials_of_one_storage(world: Path, tmp_path: Path) -> None:
    shared = {**request(world, trials=4), "storage": f"sqlite:///{tmp_path / 'shared.db'}"}
    checkpoint = world / "net.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint, **shared, out=tmp_path / "1", progress=Heard(dies_in=2))
    other = tune(checkpoint, **shared, out=tmp_path / "2")
    assert len(other.rows) == 3  # the fourth is the first worker's, who may come back
    first = tune(checkpoint, **shared, out=tmp_path / "1")
    assert len(first.rows) == 4
    held = optuna.load_study(study_name=study.STUDY, storage=shared["storage"])
    done = [t for t in held.trials if t.state == optuna.trial.TrialState.COMPLETE]
    names = [json.loads((tmp_path / n / "trials.json").read_text())["worker"] for n in "12"]
    assert names[0] != names[1]
    assert sorted(t.user_attrs["worker"] for t in done) == sorted([*names, *names])


def test_workers_never_claim_more_than_was_asked_for(world: Path, tmp_path: Path) -> None:
    config = configure(TuneConfig, checkpoint=world / "net.safetensors",
                       **request(world, trials=5, range={}))  # fmt: skip
    base, space = tuning.requested(config)
    url = f"sqlite:///{tmp_path / 'shared.db'}"

    starts = tuning.starts(base, space, ())
    study.opened(url, "identity", "grad_diff")

    def claims(name: str) -> list[tuple[int, str]]:
        shared = study.opened(url, "identity", "grad_diff")
        worker = study.Worker(shared, url, base, space, 5, tmp_path / name, name, Silent())
        with study.alone(url):
            worker.begin(starts)
        found = []
        while (trial := worker.claim()) is not None:
            found.append((trial.number, trial.user_attrs.get("origin", "search")))
        return found

    with ThreadPoolExecutor(3) as pool:
        found = [claim for claims_ in pool.map(claims, "abc") for claim in claims_]
    assert len(found) == len({number for number, _ in found}) == 5
    assert [origin for _, origin in found].count("defaults") == 1


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="unlearn")


def flags(world: Path) -> list[object]:
    return ["--model", "tests.plain:factory", "--data", world / "data.jsonl", "--forget-classes",
            "2", "--holdout", world / "holdout.jsonl", "--device", "cpu"]  # fmt: skip


def test_from_the_command_line_to_a_run_with_the_best_recipe(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    result = call(
        "tune", world / "net.safetensors", "--method", "ssd", *flags(world), "--trials", 3,
        "--range", "percentile=50:80", "--set", "batch_size=64", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert str(out / "best.yaml") in result.stdout.replace("\n", "")
    recipe = yaml.safe_load((out / "best.yaml").read_text())
    assert recipe["method"] == "ssd"
    assert recipe["set"]["batch_size"] == 64
    done = call(
        "run", world / "net.safetensors", "--config", out / "best.yaml", *flags(world),
        "--audit", "quick", "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert (tmp_path / "run" / "report.json").exists(), done.output  # whatever its verdict
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {k: record["hyperparameters"][k] for k in recipe["set"]} == recipe["set"]
    found = json.loads((out / "trials.json").read_text())
    judged = found["trials"][found["best"]]["objectives"]["parts"]
    again = objectives(read(tmp_path / "run" / "report.json").findings).parts
    assert {"accuracy.forget", "accuracy.holdout"} <= again.keys() <= judged.keys()
    assert again == pytest.approx({name: judged[name] for name in again})


def test_neighbours_of_a_language_model_count_as_in_a_report(
    lm_files: Path, lm_world: demo.World, tmp_path: Path
) -> None:
    subject = demo.tiny_llama([*lm_world.forget, *lm_world.retain], width=16, depth=1)
    model, epochs = tmp_path / "model", {"epochs": 0.5}
    save(demo.train(subject, lm_world.retain, epochs=20), torch.float32, model)
    asked = {name: lm_files / f"{name}.jsonl" for name in demo.World._fields}
    asked |= {"method": "grad_diff", "neighbours": lm_world.retain[:4], "set": epochs}
    asked |= {"retrained": model, "retain": lm_world.retain[4:]}
    done = tune(model, **asked, range={"lr": "1e-4,1e-3"}, trials=1, out=tmp_path / "tuned")
    (row,) = done.rows
    again = forget(model, **asked | {"set": row.settings}, audit="quick").report
    assert row.objectives.parts["side_effects.neighbours"] == pytest.approx(
        objectives(again.findings).parts["side_effects.neighbours"]
    )


def test_defaults_and_recipes_come_first_where_they_fit(world: Path) -> None:
    def starts(**changes: Any) -> dict[str, Any]:
        asked = {**request(world), **changes}
        config = configure(TuneConfig, checkpoint=world / "net.safetensors", **asked)
        base, space = tuning.requested(config)
        return tuning.starts(base, space, tuple(config.range))

    of_class = starts(method="salun", range={}, set={"batch_size": 16})
    assert list(of_class) == ["defaults", "recipe salun-class-cifar10-resnet"]
    assert of_class["recipe salun-class-cifar10-resnet"]["batch_size"] == 16
    assert of_class["defaults"] == {"batch_size": 16}
    gentle = starts(method="salun", range={"epochs": "3:5"}, set={})
    assert gentle == {}  # the defaults say 10 epochs, the recipe 2
    records = starts(method="salun", range={}, set={}, forget_classes=None, forget_ids="0:9")
    assert list(records) == ["defaults", "recipe salun-random-cifar10-resnet"]


def test_a_trial_that_breaks_the_model_is_dominated_by_all(world: Path, tmp_path: Path) -> None:
    asked = request(world, range={"lr": "1e-4,1e9", "epochs": "2,4"}, trials=6)
    done = tune(world / "net.safetensors", **asked, out=tmp_path / "out")
    lost = [r for r in done.rows if r.settings["lr"] == 1e9]
    assert lost
    assert all(r.rejected and r.objectives == Objectives(1.0, 0.0) for r in lost)
    assert {r.settings["lr"] for r in done.rows if not r.rejected} == {1e-4}
    assert done.best.settings["lr"] == 1e-4


def test_a_model_that_lost_half_of_what_stays_is_not_audited(world: Path, tmp_path: Path) -> None:
    """The least of the retained answers are right once the two other classes are swapped."""
    config = configure(TuneConfig, checkpoint=world / "net.safetensors", **request(world))
    base, _ = tuning.requested(config)
    trying = Trying(base)
    model = base.checkpoint.load().model
    run = SimpleNamespace(task=base.checkpoint.task, seed=0, device=torch.device("cpu"))
    trying.before = trials.looked(model, base, run)  # type: ignore[arg-type]
    assert trying.before > 0.5
    with torch.no_grad():
        for p in model[2].parameters():
            p[[0, 1]] = p[[1, 0]].clone()
    with pytest.raises(Hopeless, match=r"right on .*% of retained answers"):
        trying.measure("unlearned", model, base, run, tmp_path)  # type: ignore[arg-type]


def test_where_every_trial_is_given_up_the_reasons_are_kept(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UnlearnError, match="every trial was given up"):
        tune(world / "net.safetensors", out=tmp_path / "out",
             **request(world, range={"lr": "1e9,1e10", "epochs": "2,4"}, trials=1))  # fmt: skip
    assert not (tmp_path / "out" / "best.yaml").exists()
    record = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert record["best"] is None
    assert record["trials"][0]["rejected"]


def test_memcontrol_is_searched_for_memorization_and_quality(world: Path, tmp_path: Path) -> None:
    done = tune(
        world / "net.safetensors",
        **request(world, method="memcontrol", range={"lr": "1e-3:1e-2:log"},
                  set={"epochs": 1, "batch_size": 16}, trials=3),
        out=tmp_path / "out",
    )  # fmt: skip
    assert done.words == ("memorization", "quality")
    held = optuna.load_study(study_name=study.STUDY, storage=f"sqlite:///{tmp_path}/out/study.db")
    for trial, r in zip(held.trials, done.rows, strict=True):
        parts = [n for n in ("other.1", "other.2") if trial.params[f"moves.{n}"]]
        assert r.settings["moves"] in ([",".join(parts)] if parts else ["other.1", "other.2"])
        assert not r.rejected
    assert {"memorization", "quality"} == set(done.best.objectives.parts)


# what is refused


def refused(world: Path, tmp_path: Path, **changes: Any) -> str:
    asked = {"out": tmp_path / "new", **request(world, trials=1), **changes}
    with pytest.raises(UnlearnError) as error:
        tune(asked.pop("checkpoint", world / "net.safetensors"), **asked)
    assert not (tmp_path / "new" / "best.yaml").exists()
    return str(error.value)


def test_a_storage_or_directory_with_another_search(
    world: Path, tmp_path: Path, alone: Any
) -> None:
    storage = f"sqlite:///{alone.directory / 'study.db'}"
    for changes in ({"method": "ssd", "range": {}, "set": {}}, {"range": {"lr": "1e-3:1e-2"}},
                    {"forget_classes": "1"}, {"seed": 1}):  # fmt: skip
        said = refused(world, tmp_path, storage=storage, **changes)
        assert "holds a search for grad_diff" in said
        assert not (tmp_path / "new").exists()  # or the right command could not have it
    assert "another request" in refused(world, tmp_path, out=alone.directory, seed=1)
    (tmp_path / "mine").mkdir()
    assert "something else" in refused(world, tmp_path, out=tmp_path / "mine")


def test_a_storage_that_cannot_be_opened(world: Path, tmp_path: Path) -> None:
    for url in ("nowhere", "sqlite:////no/such/folder/x.db"):
        assert f"the storage {url} cannot be opened" in refused(world, tmp_path, storage=url)
    said = refused(world, tmp_path, storage="nosuch://me:secret@host/trials")
    assert "the storage nosuch://me:***@host/trials cannot be opened" in said
    assert "secret" not in said
    malformed = refused(world, tmp_path, storage="nosuch://me:secret@host:port/trials")
    assert "the storage nosuch://*** cannot be opened" in malformed
    assert "secret" not in malformed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"])
def test_a_storage_that_nobody_could_go_on_from(
    world: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is kept in memory" in refused(world, tmp_path, storage=url)
    assert list(tmp_path.iterdir()) == []


def test_a_place_whose_folder_is_not_there(world: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(world, tmp_path, out=tmp_path / "no" / "such" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_trials_is_kept_whatever_is_refused(tmp_path: Path) -> None:
    def searched() -> None:
        with tuning._begun(tmp_path / "out", "x"):
            (tmp_path / "out" / "runs").mkdir()
            raise BadInput("in the first trial")

    with pytest.raises(BadInput, match="in the first trial"):
        searched()
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"range": {"lr": "1e-3:1e-1:lin"}}, "is no range"),
        ({"range": {"rate": "1:2"}}, "has no hyperparameter 'rate'"),
        ({"range": {"lr": "1:2"}, "set": {"lr": 1e-3}}, "lr has a range and a fixed value"),
        ({"method": "acu", "range": {}, "set": {"gamma": 1.0}}, "nothing left to search"),
        ({"method": "grad_dif", "range": {}}, "there is no method"),
        (
            {"holdout": None, "forget_classes": None, "forget_ids": "0:9"},
            "--retrained or --holdout",
        ),
        ({"method": "memcontrol", "range": {}, "set": {}, "holdout": None}, "pass --holdout"),
        ({"range": {"scope": "nosuch,all"}}, "scope 'nosuch' matches no parameter"),
        ({"range": {"scope": "*a*,all"}}, "scope '*a*' is not a regular expression"),
        (
            {"method": "memcontrol", "set": {}, "range": {"moves": "bogus.1,all"}},
            "no group 'bogus.1'",
        ),
        ({"shadows": 16, "include_examples": True}, "--include-examples, --shadows means nothing"),
        ({"training": {"epochs": 1}, "acr": 2}, "--acr, --training means nothing to a search"),
        ({"out": None}, "pass --out"),
        ({"checkpoint": plain.factory(), "model": None}, "save it and pass its directory"),
    ],
)
def test_wrong_requests_are_refused_at_once(
    world: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refused(world, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_one_sentence_names_the_extra(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "unlearn.evaluations.study")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Unsupported, match=r"unlearn-toolkit\[tune\]"):
        tune(world / "net.safetensors", **request(world), out=tmp_path / "out")


def test_two_workers_need_two_directories(world: Path, tmp_path: Path) -> None:
    with tuning._begun(tmp_path / "out", "x"), pytest.raises(BadInput, match="--out of its own"):
        tune(world / "net.safetensors", **request(world), out=tmp_path / "out")


def test_the_command_line_names_what_is_missing(world: Path) -> None:
    assert "a search needs a method" in call("tune", world / "net.safetensors").stderr
    wrong = call("tune", world / "net.safetensors", "--method", "ssd", "--range", "x", "--out", "o")
    assert wrong.exit_code == 2
    assert "--range 'x' is not of the form key=value" in wrong.stderr


def test_help_names_what_a_search_takes() -> None:
    said = " ".join(call("tune", "--help").stdout.split())
    assert "must not exist" not in said
    assert "that of the same command before" in said
    for flag in ("--shadows", "--training", "--acr", "--jailbreaks", "--include-examples"):
        assert flag not in said
        assert flag in call("run", "--help").stdout

"""Every mistake gets its sentence before anything is loaded, and every right request its plan."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import unlearn
from tests import plain
from unlearn import registry
from unlearn.checkpoint import Checkpoint
from unlearn.config import RunConfig, configure, read_yaml
from unlearn.errors import BadInput, MissingNeed, UnlearnError
from unlearn.interface import Classes, Records
from unlearn.plan import plan

VECTORS = plain.vectors(12)
LABELS = [row["label"] for row in VECTORS]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What a whole request is refused with; no weight is loaded and nothing is written."""

    def load(self: Checkpoint) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)
    before = sorted(tmp_path.rglob("*"))

    def ask(checkpoint, kind: type[UnlearnError] = BadInput, **settings) -> str:
        with pytest.raises(kind) as caught:
            unlearn.forget(checkpoint, **{"out": tmp_path / "run", **settings})
        assert sorted(tmp_path.rglob("*")) == before
        return str(caught.value)

    return ask


@pytest.fixture
def on_language(refused, tiny_lm, lm_world):
    def ask(kind: type[UnlearnError] = BadInput, **settings) -> str:
        settings = {
            "method": "npo", "forget": lm_world.forget, "retain": lm_world.retain, **settings
        }  # fmt: skip
        return refused(tiny_lm, kind, **settings)

    return ask


@pytest.fixture
def on_vectors(refused, tiny_vectors):
    def ask(kind: type[UnlearnError] = BadInput, **settings) -> str:
        settings = {"method": "npo", "model": "tests.plain:factory", **settings}
        return refused(tiny_vectors, kind, **settings)

    return ask


# methods and their hyperparameters


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nop", "there is no method 'nop': did you mean npo?"),
        ("gradient_descent", "did you mean gradient_ascent?"),
        ("zzz", "known are: acu, altpo, amnesiac"),
        ("", "known are"),
    ],
)
def test_a_method_nobody_knows(on_language, name, sentence):
    assert sentence in on_language(method=name)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batasize": 3}, "npo has no hyperparameter 'batasize': did you mean batch_size?"),
        ({"alpha_beta_gamma": 3}, "known are: batch_size, beta"),
        ({"lr": -1}, "lr = -1: Input should be greater than 0"),
        ({"lr": 0}, "lr = 0: Input should be greater than 0"),
        ({"lr": "nan"}, "lr = 'nan': Input should be a finite number"),
        ({"lr": float("nan")}, "lr = nan: Input should be a finite number"),
        ({"lr": "inf"}, "Input should be a finite number"),
        ({"lr": "fast"}, "lr = 'fast': Input should be a valid number"),
        ({"lr": None}, "lr = None"),
        ({"epochs": 0}, "epochs = 0: Input should be greater than 0"),
        ({"batch_size": 1.5}, "batch_size = 1.5: Input should be a valid integer"),
        ({"optimizer": "adam"}, "Input should be 'adamw' or 'sgd'"),
        ({"retention": "all"}, "Input should be 'none', 'nll' or 'kl'"),
        ({"warmup": 2}, "Input should be less than or equal to 1"),
    ],
)
def test_hyperparameters_out_of_range(on_language, given, sentence):
    assert sentence in on_language(set=given)


def test_every_wrong_hyperparameter_is_named_at_once(on_language):
    faults = on_language(set={"lr": -1, "beta": 0, "bta": 1, "epochs": "x"}).splitlines()
    assert len(faults) == 4
    for name in ("'bta'", "lr", "beta", "epochs"):
        assert any(name in fault for fault in faults)


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_method_takes_a_number_that_is_none(name, value):
    described = registry.hyperparameters(registry.method_class(name))
    numbers = [h.name for h in described if "number" in h.type]
    for number in numbers:
        with pytest.raises(BadInput, match=number):
            registry.build(name, {number: value})


@pytest.mark.parametrize("name", registry.names())
def test_every_method_builds_with_its_defaults_and_explains_itself(name):
    method = registry.build(name)
    assert isinstance(method, registry.Method)
    for h in registry.hyperparameters(type(method)):
        assert h.meaning, h.name
        assert h.type != "any", h.name
        assert h.default == getattr(method, h.name)


def test_numbers_may_come_as_text():
    method = registry.build("npo", {"lr": "1e-5", "epochs": "2", "retention": "kl"})
    assert (method.lr, method.epochs, method.retention) == (1e-5, 2.0, "kl")


def test_a_scope_that_matches_nothing_is_refused_before_the_first_step(tiny_lm, lm_world, tmp_path):
    phases = []

    class Watch:
        def advance(self, phase, done, total, numbers):
            phases.append(phase)

        def say(self, sentence):
            pass

    for scope, sentence in (
        ("model.layers.7", "matches no parameter"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(BadInput, match=sentence):
            unlearn.forget(
                tiny_lm, method="gradient_ascent", forget=lm_world.forget, scope=scope,
                out=tmp_path / "run", audit="none", progress=Watch(),
            )  # fmt: skip
    assert "unlearn" not in phases
    assert list(tmp_path.iterdir()) == []


# what a method needs


def test_nothing_to_forget_and_nothing_to_retain_are_both_named(on_language):
    faults = on_language(MissingNeed, forget=None, retain=None).splitlines()
    assert faults == [
        "nothing to forget was named: pass --forget, or --data with --forget-ids or "
        "--forget-classes",
        "npo needs a retain set: pass --retain (or --data with --forget-ids)",
    ]


def test_a_retain_set_or_state(on_language):
    sentence = on_language(MissingNeed, method="ssd", retain=None)
    assert sentence == "ssd needs one of: retain, state"


@pytest.mark.parametrize("name", ["npo", "simnpo", "grad_diff", "finetune", "retrain"])
def test_a_missing_retain_set(on_language, name):
    assert f"{name} needs a retain set" in on_language(MissingNeed, method=name, retain=None)


@pytest.mark.parametrize(
    "settings",
    [{"set": {"retention": "none"}}, {"method": "gradient_ascent"}],
    ids=["npo without retention", "gradient_ascent"],
)
def test_no_retain_set_where_none_is_needed(tiny_lm, lm_world, settings):
    config = configure(
        RunConfig, checkpoint=tiny_lm, forget=lm_world.forget, **{"method": "npo", **settings}
    )
    assert plan(config).sets.retain is None


@pytest.fixture
def third_party(monkeypatch):
    names = {"only_classifiers": "OnlyClassifiers", "on_state": "OnState", "bad": "factory"}
    points = [
        EntryPoint(name, f"tests.plain:{attribute}", registry.GROUP)
        for name, attribute in names.items()
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_methods_of_other_packages(third_party, on_language, tiny_vectors):
    assert {"only_classifiers", "npo"} <= set(registry.names())
    assert "did you mean only_classifiers?" in on_language(method="only_clasifiers")
    assert "the entry point 'bad' of tests.plain:factory is not a method" in on_language(
        method="bad"
    )
    config = configure(
            RunConfig,
        checkpoint=tiny_vectors, model="tests.plain:factory", method="only_classifiers",
        forget=VECTORS[:3],
    )  # fmt: skip
    assert isinstance(plan(config).method, plain.OnlyClassifiers)


def test_a_method_for_another_family(third_party, on_language):
    sentence = on_language(MissingNeed, method="only_classifiers")
    assert sentence == "only_classifiers works on classification, and this model is causal_lm"


def test_a_method_that_goes_on_from_an_earlier_run(third_party, on_language):
    faults = on_language(MissingNeed, method="on_state", retain=None).splitlines()
    assert faults == [
        "on_state needs the state of an earlier run: pass that run's directory",
        "on_state needs one of: retain, state",
    ]


# naming what must go


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"forget_ids": "0:3"}, "name the forget set one way"),
        ({"forget_classes": "1"}, "name the forget set one way"),
        ({"forget_ids": "0", "forget_classes": "1", "forget": None}, "one way"),
        ({"retain": VECTORS[3:]}, "--retain and --data exclude each other"),
        ({"forget": None}, "nothing to forget was named"),
        ({"forget": None, "forget_ids": ""}, "nothing to forget was named"),
        ({"forget": None, "forget_ids": "12"}, "the first is '12': its ids are the row numbers"),
        ({"forget": None, "forget_ids": "@nowhere"}, "the id file nowhere does not exist"),
        ({"forget": None, "forget_ids": "0:12"}, "nothing is retained"),
        ({"forget": None, "forget_ids": "3:3"}, "no record of memory has the ids"),
        ({"forget": None, "forget_classes": "3"}, "label 3 is out of range"),
        ({"forget": None, "forget_classes": "cat"}, "the model's classes have no names"),
        ({"forget": None, "forget_classes": "0,1,2"}, "nothing is retained"),
        ({"forget": VECTORS}, "nothing is retained"),
    ],
)
def test_forget_sets_that_are_not_named_rightly(on_vectors, settings, sentence):
    assert sentence in on_vectors(**{"data": VECTORS, "forget": VECTORS[:3], **settings})


@pytest.mark.parametrize("key", ["forget_ids", "forget_classes"])
def test_selecting_from_nothing(on_vectors, key):
    assert "nothing to forget was named" in on_vectors(**{key: "0", "retain": VECTORS})
    assert "name the forget set one way" in on_vectors(
        **{key: "0", "forget": VECTORS[:2], "retain": VECTORS[2:]}
    )


def test_classes_by_name(refused, on_language, tiny_images):
    model, pictures = tiny_images
    sentence = refused(model, method="npo", data=pictures, forget_classes="cta")
    assert "the model has no class 'cta': did you mean cat?" in sentence
    sentence = on_language(data=[{"text": "a"}], forget=None, retain=None, forget_classes="cat")
    assert "--forget-classes is for models with classes" in sentence


@pytest.mark.parametrize("name", ["cat", "2", " cat ,"])
def test_forgetting_a_class(tiny_images, name):
    model, pictures = tiny_images
    planned = plan(
        configure(
            RunConfig,
            checkpoint=model, method="npo", data=pictures, forget_classes=name, holdout=[
                {"image": torch.rand(3, 8, 8), "label": label} for label in (0, 1, 2, 2, 3)
            ],
        )
    )  # fmt: skip
    assert planned.target == Classes((2,), ("cat",))
    assert str(planned.target) == "class cat"
    sizes = {key: len(value) for key, value in planned.sets.named().items()}
    assert sizes == {"forget": 6, "retain": 18, "holdout": 3, "holdout_forget": 2}
    assert set(planned.sets.forget.examples.column("label")) == {2}


@pytest.mark.parametrize(
    "settings",
    [
        {"forget": VECTORS[:3], "retain": VECTORS[3:]},
        {"data": VECTORS, "forget": VECTORS[:3]},
        {"data": VECTORS, "forget_ids": "0:3"},
        {"data": VECTORS, "forget_ids": "2,1,0"},
    ],
    ids=["two sets", "content", "range", "ids"],
)
def test_the_same_request_in_several_words(tiny_vectors, settings):
    planned = plan(
        configure(
            RunConfig,
            checkpoint=tiny_vectors,
            model="tests.plain:factory",
            method="npo",
            **settings,
        )
    )
    assert planned.target == Records(3)
    assert str(planned.target) == "3 records"
    assert planned.sets.forget.examples.column("label") == LABELS[:3]
    assert planned.sets.retain.examples.column("label") == LABELS[3:]


# the records themselves


def test_forgetting_what_is_retained(on_language, lm_world):
    sentence = on_language(retain=lm_world.forget)
    assert "8 of the 8 forget records are also in the retain set" in sentence


def test_overlaps_with_every_set_are_named_at_once(on_language, lm_world):
    faults = on_language(
        retain=[*lm_world.retain, lm_world.forget[3]], holdout=lm_world.forget[:2]
    ).splitlines()
    assert len(faults) == 2
    assert "1 of the 8 forget records are also in the retain set" in faults[0]
    assert "forget record 3 is retain record 24" in faults[0]
    assert "2 of the 8 forget records are also in the holdout set" in faults[1]


@pytest.mark.parametrize("name", ["forget", "retain", "holdout"])
def test_empty_sets(on_language, name):
    assert f"the {name} set memory is empty" in on_language(**{name: []})


def test_unusable_records_of_every_set_are_named_at_once(on_language, lm_world):
    faults = on_language(
        forget=[{"question": "a"}],
        retain=[*lm_world.retain, {"question": "a", "answer": 3}],
        holdout=[{"prompt": "a", "completion": " "}],
    ).splitlines()
    assert len(faults) == 3
    assert "1 of the 1 forget records cannot be used; the first is record 0" in faults[0]
    assert "1 of the 25 retain records cannot be used; the first is record 24" in faults[1]
    assert "its field 'completion' is not a text or is blank" in faults[2]


@pytest.mark.parametrize("way", [{"forget": VECTORS[:1]}, {"forget_classes": "1"}])
@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"features": [0.0] * 5}, "it has the fields features; give"),
        ({"features": [0.0] * 5, "label": 3}, "label 3 is out of range"),
        ({"features": [0.0] * 5, "label": None}, "no class 'None'"),
        ({"features": "abc", "label": 1}, "its features are not numbers"),
        ({"image": "nowhere.png", "label": 1}, "its image cannot be opened"),
    ],
)
def test_unusable_records_among_all_the_data(on_vectors, row, sentence, way):
    assert sentence in on_vectors(data=[*VECTORS, row], **way)


def test_a_whole_column_that_is_missing(refused, tiny_images, tmp_path):
    sentence = refused(
        tiny_images[0], method="npo", data=tiny_images[1], forget_classes="cat",
        columns={"label": "lable"},
    )  # fmt: skip
    assert "has no column 'lable': did you mean label?" in sentence


def test_columns_reach_every_set(tiny_lm, lm_world):
    renamed = [[{"q": row["question"], "a": row["answer"]} for row in rows] for rows in lm_world]
    planned = plan(
        configure(
            RunConfig,
            checkpoint=tiny_lm, method="npo", forget=renamed[0], retain=renamed[1],
            holdout=renamed[2], columns={"question": "q", "answer": "a"},
        )
    )  # fmt: skip
    assert {len(part) for part in planned.sets.named().values()} == {8, 24}


# where, and on what


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown: use cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"audit": "full"}, "audit: Input should be 'quick', 'standard', 'deep' or 'none'"),
        (
            {"task": "regression"},
            "task: Input should be 'causal_lm', 'classification' or 'diffusion'",
        ),
        ({"max_length": 1}, "max_length: Input should be greater than 1"),
        ({"forgte": "a"}, "there is no setting 'forgte': did you mean forget?"),
        ({"retrained": "no/where/at/all"}, "the checkpoint no/where/at/all does not exist"),
    ],
)
def test_settings_that_cannot_be(on_language, settings, sentence):
    assert sentence in on_language(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(on_language):
    assert "there is no CUDA here: use cpu" in on_language(device="cuda:1")


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(BadInput) as caught:
        configure(RunConfig, method=3, seed=-1, chekpoint="a")
    faults = str(caught.value).splitlines()
    assert len(faults) == 4
    assert "there is no setting 'chekpoint': did you mean checkpoint?" in faults
    assert "checkpoint: it is missing" in faults


def test_a_run_is_never_overwritten(refused, tiny_lm, lm_world, tmp_path):
    settings = {"method": "gradient_ascent", "forget": lm_world.forget}
    assert "exists already: runs are never overwritten" in refused(
        tiny_lm, out=tmp_path, **settings
    )
    sentence = refused(tiny_lm, out=tmp_path / "not" / "there", **settings)
    assert f"the folder {tmp_path / 'not'} does not exist: create it first" in sentence


def test_a_reference_of_another_kind(on_language, tiny_images):
    assert "is not of the same kind" in on_language(retrained=tiny_images[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "must hold settings as `name: value` lines"),
        ("- a\n- b\n", "must hold settings"),
        ("a: [\n", "is not YAML"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_configuration_files_that_are_none(tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(BadInput, match=sentence):
        read_yaml(tmp_path / "run.yaml")


def test_a_configuration_file_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(BadInput, match="is not YAML"):
        read_yaml(tmp_path / "run.yaml")


def test_a_configuration_whose_keys_are_no_names(tmp_path):
    (tmp_path / "run.yaml").write_text("1: a\n")
    with pytest.raises(BadInput, match="there is no setting '1'"):
        configure(RunConfig, **read_yaml(tmp_path / "run.yaml"))


# what a plan promises


def planned(tiny_lm: Path, world, **settings):
    request = {"method": "npo", "forget": world.forget, "retain": world.retain, **settings}
    return plan(configure(RunConfig, checkpoint=tiny_lm, **request))


def test_a_method_does_not_see_what_it_does_not_use(tiny_lm, lm_world):
    ascent = planned(tiny_lm, lm_world, method="gradient_ascent")
    assert ascent.sets.retain is not None  # measured, but withheld
    assert ascent.request().retain is None
    again = planned(tiny_lm, lm_world, method="retrain")
    assert again.request().forget is None
    assert len(again.request().retain_set()) == 24
    with pytest.raises(MissingNeed, match="needs a forget set"):
        again.request().forget_set()


def test_given_and_default_hyperparameters_are_told_apart(tiny_lm, lm_world):
    found = planned(tiny_lm, lm_world, set={"beta": "0.5"}, scope="head")
    assert dict(found.given) == {"beta": "0.5", "scope": "head"}
    assert found.hyperparameters["beta"] == 0.5
    assert found.hyperparameters["scope"] == "head"
    assert found.hyperparameters["retention"] == "nll"


def test_identity_is_that_of_the_result(tiny_lm, lm_world, tmp_path):
    base = planned(tiny_lm, lm_world).identity()
    shuffled = lm_world._replace(forget=lm_world.forget[::-1])
    same = [{"out": tmp_path / "a"}, {"save_every": 1.0}, {"set": {}}]
    assert {planned(tiny_lm, lm_world, **settings).identity() for settings in same} == {base}
    others = [
        planned(tiny_lm, lm_world, seed=1),
        planned(tiny_lm, lm_world, set={"lr": 1e-6}),
        planned(tiny_lm, lm_world, method="grad_diff"),
        planned(tiny_lm, lm_world, retain=lm_world.retain[1:]),
        planned(tiny_lm, lm_world, holdout=lm_world.holdout),
        planned(tiny_lm, lm_world, retrained=tiny_lm),
        planned(tiny_lm, lm_world, chat_template=False),
        planned(tiny_lm, shuffled),  # batches go by position
    ]
    assert len({base, *(other.identity() for other in others)}) == len(others) + 1


def test_identity_follows_what_files_of_prompts_hold(tiny_lm, lm_world, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "translator"
    folder.mkdir()
    found = []
    for text in ("a {question}", "b {question}", "a {question}"):
        prompts.write_text(text)
        (folder / "config.json").write_text(text)
        for given in (
            {"jailbreaks": prompts},
            {"translations": prompts},
            {"translator": {"German": str(folder)}},
        ):
            asked = planned(tiny_lm, lm_world, audit="deep", shadows=0, **given)
            found.append(asked.identity())
    assert found[:3] == found[6:]
    assert len(set(found)) == 6


def test_planning_reads_files(tiny_lm, lm_files, lm_world, tmp_path):
    (tmp_path / "ids").write_text("2\n0\n")
    found = plan(
        configure(
            RunConfig,
            checkpoint=str(tiny_lm), method="ssd", data=str(lm_files / "retain.jsonl"),
            forget_ids=f"@{tmp_path / 'ids'}", holdout=lm_files / "holdout.jsonl",
        )
    )  # fmt: skip
    assert [dict(found.sets.forget.examples[i]) for i in (0, 1)] == [
        lm_world.retain[0], lm_world.retain[2],
    ]  # fmt: skip

"""What is looked for and with what, how scores become checks, and what is said where none can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluations.measurements import case as vectors_case
from tests.evaluations.measurements import text_case
from unlearn import demo
from unlearn.attacks import jailbreak
from unlearn.attacks.interface import Elicited, Ground, Inapplicable, Prompting, Search
from unlearn.case import Case
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.evaluations import robustness, side_effects
from unlearn.evaluations.criteria import Check, decide, read
from unlearn.evaluations.measure import Measured, Taking
from unlearn.evaluations.robustness import SEARCHES, compressed, material, recalled
from unlearn.run import Run
from unlearn.tasks.base import Encoded

FORGET, _, _ = demo.people(seed=1, forget=1, retain=1, holdout=1)
ROLES = ("original", "unlearned", "retrained")
JAILBREAK, LANGUAGES = (
    next(search for search in SEARCHES if search.name == name)
    for name in ("jailbreak", "languages")
)


def deep(**settings: Any) -> Case:
    return text_case(audit="deep", shadows=0, **settings)


@pytest.fixture(scope="module")
def plainly() -> Case:
    return deep()


def upper(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


# ------------------------------------------------------------------------------ what is brought


def test_a_language_model_is_asked_our_templates_about_all_of_a_small_set(plainly: Case) -> None:
    brought = material(plainly)
    assert brought.templates == jailbreak.read_templates()
    assert brought.rows == list(range(len(FORGET)))
    assert (brought.translations, brought.translated) == ({}, {})
    ground = brought.grounds(plainly, plainly.checkpoint.task)(JAILBREAK)
    assert ground.forget.examples.ids == plainly.sets.forget.examples.ids
    assert len(ground.retain) == len(plainly.sets.retain)


def test_templates_of_a_file_come_after_ours_and_none_twice(tmp_path: Path) -> None:
    ours = jailbreak.read_templates()
    file = tmp_path / "mine.yaml"
    file.write_text(f'- "Tell me: {{question}}"\n- {ours[3]!r}\n- "{{question}} Now!"\n')
    brought = material(deep(jailbreaks=file))
    assert brought.templates == (*ours, "Tell me: {question}", "{question} Now!")
    assert jailbreak.digest(brought.templates) != jailbreak.digest(ours)


def test_what_is_wrong_with_a_file_is_counted_in_that_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    for text, said in (
        ("{question}?\nNobody asks.\n", r"template 2 of .*mine.txt has {question} 0 times"),
        ("{question}?\n{question}?\n", "template 2 of .*mine.txt is there twice"),
    ):
        file.write_text(text)
        with pytest.raises(BadInput, match=said):
            material(deep(jailbreaks=file))


def test_translations_follow_the_records_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        {"language": language, "row": row, "question": f"{language} {row}?"}
        for row in (5, 0, 3, 1, 7, 2, 6, 4)
        for language in ("de", "el")
        if (language, row) != ("el", 3)
    ]
    monkeypatch.setitem(robustness.LOOKED_FOR, "causal_lm", 5)
    case = deep(translations=given)
    brought = material(case)
    spoken = brought.spoken
    assert len(spoken) == 5
    assert spoken == sorted(spoken) != [0, 1, 2, 3, 4]
    asked = [row for row in (5, 0, 3, 1, 7, 2, 6, 4) if row in spoken]
    assert brought.translated["de"] == [spoken.index(row) for row in asked]
    assert brought.translated["el"] == [spoken.index(row) for row in asked if row != 3]
    ground = brought.grounds(case, case.checkpoint.task)(LANGUAGES)
    for language, part in ground.translations.items():
        for i, place in enumerate(ground.rows[language]):
            assert part.examples[i]["question"] == f"{language} {spoken[place]}?"
            assert part.examples[i]["answer"] == ground.forget.examples[place]["answer"]


def test_what_is_translated_is_asked_whatever_else_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(robustness.LOOKED_FOR, "causal_lm", 2)
    for row in range(len(FORGET)):
        brought = material(deep(translations=[{"language": "de", "row": row, "question": "?"}]))
        assert (brought.spoken, brought.translated) == ([row], {"de": [0]})


def test_a_search_that_only_reads_gets_more_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(robustness.LOOKED_FOR, "causal_lm", 2)
    case = deep()
    seen = dict[str, int]()
    ground = material(case).grounds(case, case.checkpoint.task)
    for search in (*SEARCHES, compressed(3)):
        seen[search.name] = len(ground(search).forget)
    assert seen.pop("adversarial_compression") == 3
    everything = {"in_context", "downstream", "latent_knowledge", "latent_knowledge_unsupervised"}
    assert {name for name, n in seen.items() if n == len(FORGET)} == everything
    assert {n for name, n in seen.items() if name not in everything} == {2}


def test_a_translator_is_a_function_a_checkpoint_or_one_for_each_language() -> None:
    one = material(deep(translator=upper))
    assert one.translated == {"another language": list(range(len(FORGET)))}
    assert one.translations["another language"].examples[0]["question"] == (
        FORGET[0]["question"].upper()
    )
    two = material(deep(translator={"loud": upper, "twice": lambda ts: [f"{t} {t}" for t in ts]}))
    assert set(two.translations) == {"loud", "twice"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"translator": upper, "translations": [{"language": "x", "row": 0, "question": "?"}]},
         "not both"),
        ({"translator": {"loud": lambda texts: texts[1:]}}, "the translator gave"),
        ({"translator": {"model": "m", "language": "deu"}}, "as model, source and target"),
        ({"translations": [{"language": "x", "row": 99, "question": "?"}]}, "its row is 99"),
    ],
)  # fmt: skip
def test_material_that_cannot_be_used_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        material(deep(**settings))


def test_what_is_looked_for_follows_from_family_and_depth(plainly: Case) -> None:
    names = {search.name for search in robustness.searches(plainly)}
    assert names == {search.name for search in SEARCHES}
    few = {search.name for search in robustness.searches(text_case(audit="standard"))}
    assert few == {"eight_bits", "four_bits"}
    assert robustness.searches(text_case(audit="quick")) == []
    assert robustness.searches(deep(acr=2))[-1].name == "adversarial_compression"


def test_the_report_can_say_what_was_tried(plainly: Case) -> None:
    run, version = Run(plainly.checkpoint.task), jailbreak.digest(jailbreak.read_templates())
    robustness._note(run, plainly, material(plainly))
    count = len(jailbreak.read_templates())
    assert run.notes == [
        f"What is left was looked for with {count} jailbreak prompts (version {version}), weights "
        "rounded by torch."
    ]
    robustness._note(run, plainly, material(deep(translator={"el": upper})))
    assert f"translations of {len(FORGET)} records into el" in run.notes[1]
    quick = Run(plainly.checkpoint.task)
    robustness._note(quick, text_case(audit="quick"), material(plainly))
    assert quick.notes == []


# ------------------------------------------------------------------------------ what is found


def test_a_record_counts_once_with_the_best_of_all_its_truths() -> None:
    found = Elicited(
        record=[4, 1, 4],
        truth=["one two", "a b c d", "eins zwei"],
        said=[["one", "three"], ["a", "b d"], ["nein", "eins zwei"]],
    )
    search = recalled(Prompting("x", "X", "", lambda *_: found))
    assert search.score(None, Ground(None), None).tolist() == [0.5, 1.0]  # of records 1 and 4


def taking(case: Case, folder: Path, role: str = "original") -> Taking:
    (folder / "signals").mkdir(exist_ok=True)
    return Taking(role, case.checkpoint.load().model, Run(case.checkpoint.task), folder)


def test_what_was_found_is_read_back(plainly: Case, tmp_path: Path) -> None:
    tried = []

    def score(_: Any, __: Any, run: Run) -> np.ndarray:
        tried.append(1)
        run.note("One prompt was left out.")
        return np.array([0.25, 1.0])

    search = Search("x", "X", "", "", score)
    for _ in range(2):  # the second time as after an interruption
        found, at = Measured({}), taking(plainly, tmp_path)
        robustness._search(found, at, search, Ground(None), "forget")
        assert found.numbers["x"]["forget"].tolist() == [0.25, 1.0]
        assert at.run.notes == ["One prompt was left out."]
    assert len(tried) == 1
    robustness._search(
        found, taking(plainly, tmp_path, "retrained"), search, Ground(None), "forget"
    )
    assert len(tried) == 2


@pytest.mark.parametrize("kind", [BadInput, Collapsed, Unsupported, Inapplicable])
def test_a_search_that_is_not_possible_says_why(
    kind: type[Exception], plainly: Case, tmp_path: Path
) -> None:
    def score(*_: Any) -> np.ndarray:
        raise kind("records are of no use")

    found = Measured({})
    search = Search("x", "X", "", "", score)
    robustness._search(found, taking(plainly, tmp_path), search, Ground(None), "forget")
    assert found.missing == {"x": "Records are of no use."}
    assert found.inapplicable == ({"x"} if kind is Inapplicable else set())
    assert found.numbers == {}


def checked(case: Case, measured: dict[str, Measured], name: str = "jailbreak") -> Check:
    found = robustness.checks(measured, case, read())  # type: ignore[arg-type]
    return next(check for check in found if check.name == name)


def of(*scores: Any, name: str = "jailbreak", subset: str = "forget") -> dict[str, Measured]:
    return {
        role: Measured({}, numbers={name: {subset: np.array(values, dtype=np.float64)}})
        for role, values in zip(ROLES, scores, strict=True)
    }


def test_plain_texts_are_no_reason_for_doubt_and_what_failed_is(plainly: Case) -> None:
    measured = {role: Measured({}) for role in ROLES}
    task = plainly.checkpoint.task
    texts = Encoded(load([{"text": "Only a text."}], "forget"), task)
    with pytest.raises(Inapplicable) as raised:
        JAILBREAK.score(plainly.checkpoint.load().model, Ground(texts), Run(task))
    for one in measured.values():
        one.missing["jailbreak"] = str(raised.value)
        one.inapplicable.add("jailbreak")
    check = checked(plainly, measured)
    assert check.state == ("info", str(raised.value))
    (decision,) = decide([check], read())
    assert (decision.verdict, decision.required) == ("info", False)
    # of one model only: it is not that there is nothing to look at
    measured["retrained"].inapplicable.clear()
    check = checked(plainly, measured)
    (decision,) = decide([check], read())
    assert (decision.verdict, decision.required) == ("not_run", True)


def test_scores_beside_the_retrained_model_decide(plainly: Case) -> None:
    rng = np.random.default_rng(0)
    high, low = rng.uniform(0.9, 1, 200), rng.uniform(0, 0.1, 200)
    for after, verdict in ((high, "fail"), (low, "pass")):
        check = checked(plainly, of(high, after, low))
        assert check.fields["group"] == "robustness"
        assert check.fields["n"] == 200
        assert decide([check], read())[0].verdict == verdict
    without = of(high, low, low)
    del without["retrained"]
    check = checked(plainly, without)
    assert check.state is not None
    assert "pass --retrained" in check.state[1]
    assert checked(plainly, of(high, low, low, name="four_bits"), "four_bits").fields["group"] == (
        "durability"
    )


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (([1.0, 1.0], [0.0], [0.0, 0.0]), "2 with the original, 1 with the unlearned, 2"),
        (([1.0, 1.0], [0.0, 0.0], [0.0] * 3), "do not read the same records"),
        (([1.0, 1.0], [np.nan, 0.0], [0.0, 0.0]), "unlearned model gives values that are not fin"),
        (([np.inf, 1.0], [0.0, 0.0], [0.0, 0.0]), "original model gives values that are not fini"),
        (([], [], []), "no values of every model"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_compared_are_not_held_against_each_other(
    scores: Any, said: str, plainly: Case
) -> None:
    check = checked(plainly, of(*scores))
    assert check.state is not None
    assert check.state[0] == "not_run"
    assert said in check.state[1]
    assert decide([check], read())[0].required
    near = deep(neighbours=demo.people(seed=9, forget=0, retain=1, holdout=0).retain)
    name = side_effects.SEARCH.name
    lost = checked(near, of(*scores, name=name, subset="neighbours"), name)
    assert lost.state == check.state


def test_side_effects_are_held_against_the_original() -> None:
    near = deep(neighbours=demo.people(seed=9, forget=0, retain=1, holdout=0).retain)
    name = side_effects.SEARCH.name
    full, gone = np.full(200, 0.8), np.full(200, 0.2)
    for after, verdict in ((full, "pass"), (gone, "fail")):
        check = checked(near, of(full, after, gone, name=name, subset="neighbours"), name)
        assert decide([check], read())[0].verdict == verdict
    nothing = checked(near, of(*[np.zeros(9)] * 3, name=name, subset="neighbours"), name)
    assert nothing.state is not None
    assert nothing.state[0] == "info"


def test_a_classifier_is_rounded_pruned_and_trained_on_other_records(tmp_path: Path) -> None:
    case = vectors_case(audit="deep", shadows=0)
    names = {search.name for search in robustness.searches(case)}
    assert names == {"eight_bits", "four_bits", "pruning", "relearning_unrelated"}
    brought, found = material(case), Measured({})
    run = taking(case, tmp_path)
    robustness.look(found, run, case, brought)
    assert set(found.numbers) == names
    assert {len(v["forget"]) for v in found.numbers.values()} == {len(case.sets.forget)}
    assert compressed(1).name not in found.numbers
    assert run.run.notes == ["What is left was looked for with weights rounded by torch."]

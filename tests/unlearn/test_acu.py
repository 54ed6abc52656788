"""An analytic output layer: exact against a fit on the survivors, and honest about its limits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import unlearn
from tests import plain
from unlearn import demo
from unlearn.data import load
from unlearn.errors import BadInput, MissingNeed, Unsupported
from unlearn.interface import Classes, Records, Request, Subject
from unlearn.methods.acu import ACU, NEVER, AnalyticClassifier, Head
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.weights import read_state, write_state

CLASSES, WIDTH, HIDDEN, GAMMA = 3, 4, 6, 0.1


def network(bias: bool = True, seed: int = 0, classes: int = CLASSES) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Dropout(0.5), nn.Linear(HIDDEN, classes, bias)
        )


def examples(n: int, seed: int, name: str = "retain", among: int = CLASSES) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, WIDTH, generator=draw)
    labels = torch.randint(among, (n,), generator=draw)
    return Encoded(load((inputs, labels), name), Classification(CLASSES))


def part(of: Encoded, indices: range | list[int], name: str) -> Encoded:
    return of.select(list(indices), name)


def request(forget: Encoded, retain: Encoded | None = None) -> Request:
    return Request(Records(len(forget)), forget, retain)


def ridge(model: nn.Sequential, data: Encoded, bias: bool = True) -> np.ndarray:
    """The layer as least squares on the features of ``data``, without forming X'X."""
    with torch.no_grad():
        batch = data.batch(range(len(data)))
        rows = model[1](model[0](batch["features"])).double().numpy()
    if bias:
        rows = np.hstack((rows, np.ones((len(rows), 1))))
    d = rows.shape[1]
    targets = np.eye(CLASSES)[batch["labels"][:, 0].numpy()]
    return np.linalg.lstsq(
        np.vstack((rows, np.sqrt(GAMMA) * np.eye(d))),
        np.vstack((targets, np.zeros((d, CLASSES)))),
        rcond=None,
    )[0]


def close(model: nn.Sequential, wanted: np.ndarray) -> bool:
    """Up to the features' and the layer's float32."""
    layer = model[3]
    rows = [layer.weight.detach().T, *([] if layer.bias is None else [layer.bias.detach()[None]])]
    return np.allclose(torch.cat(rows).numpy(), wanted, rtol=1e-4, atol=1e-5)


def start(retain: Encoded, model: nn.Module | None = None, **settings: Any) -> tuple[Subject, Run]:
    run = Run(retain.task, **settings)
    return ACU().prepare(Subject(model or network()), retain, run), run


def test_first_request_is_ridge_on_what_stays() -> None:
    data = examples(150, 1)
    forget, retain = part(data, range(30), "forget"), part(data, range(30, 150), "retain")
    after = ACU().unlearn(Subject(network()), request(forget, retain), Run(data.task))
    assert close(after.model, ridge(network(), retain))
    assert torch.equal(after.model[0].weight, network()[0].weight)
    assert not after.model.training


def test_any_order_of_learning_and_forgetting_is_ridge_on_the_survivors() -> None:
    data = examples(300, 1)
    run = Run(data.task)
    subject = ACU().prepare(Subject(network()), part(data, range(100), "one"), run)
    for forget in (range(20), range(50, 60)):
        subject = ACU().unlearn(subject, request(part(data, forget, "forget")), run)
    subject = ACU().prepare(subject, part(data, range(100, 300), "two"), run)
    subject = ACU().unlearn(subject, request(part(data, range(150, 290), "forget")), run)
    survivors = [*range(20, 50), *range(60, 150), *range(290, 300)]
    assert close(subject.model, ridge(network(), part(data, survivors, "survivors")))
    only, _ = start(part(data, survivors, "survivors"))
    for name in ("gram", "cross"):
        got, wanted = subject.state[f"acu.{name}"], only.state[f"acu.{name}"]
        assert float((got - wanted).norm() / wanted.norm()) < 1e-13
    assert torch.equal(subject.state["acu.counts"], only.state["acu.counts"])
    assert torch.equal(subject.state["acu.sketch"], only.state["acu.sketch"])


def test_forgetting_what_was_prepared_equals_never_learning_it() -> None:
    data = examples(150, 1)
    forget, retain = part(data, range(30), "forget"), part(data, range(30, 150), "retain")
    prepared, run = start(data)
    one = ACU().unlearn(prepared, request(forget), run)
    other = ACU().unlearn(Subject(network()), request(forget, retain), Run(data.task))
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_a_later_request_reads_the_forget_set_alone() -> None:
    data = examples(150, 1)
    subject, run = start(data)
    seen = []
    subject.model.register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
    ACU().unlearn(subject, request(part(data, range(5), "forget"), part(data, [9], "r")), run)
    forgotten = {tuple(data[i]["features"].tolist()) for i in range(5)}
    assert {tuple(row.tolist()) for batch in seen for row in batch} == forgotten
    assert any("only the forget set was read" in note for note in run.notes)


def test_state_has_a_fixed_size() -> None:
    shapes = []
    for n in (20, 500):
        subject, _ = start(examples(n, 1))
        shapes.append({name: (t.shape, t.dtype) for name, t in subject.state.items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["acu.gram"] == ((HIDDEN + 1, HIDDEN + 1), torch.float64)


def test_the_penalty_may_change_between_requests() -> None:
    data = examples(100, 1)
    subject, run = start(data)
    last = part(data, range(99, 100), "forget")
    loose = ACU(gamma=1e-3).unlearn(subject, request(last), run)
    other = ACU(gamma=1e-3).prepare(Subject(network()), part(data, range(99), "r"), run)
    assert torch.allclose(loose.model[3].weight, other.model[3].weight, rtol=1e-5)


def test_a_class_without_records_never_wins() -> None:
    data = examples(150, 1)
    labels = [int(data[i]["label"]) for i in range(150)]
    subject, run = start(data)
    gone = part(data, [i for i in range(150) if labels[i] == 1], "forget")
    after = ACU().unlearn(subject, Request(Classes((1,), ("1",)), gone), run)
    layer = after.model[3]
    assert not layer.weight[1].any()
    assert layer.bias[1] == NEVER
    assert torch.isfinite(torch.tensor(NEVER).half())
    assert (after.model(torch.randn(1000, WIDTH) * 10).argmax(1) != 1).all()
    assert any("No record of class 1 remains" in note for note in run.notes)
    back = ACU().prepare(after, examples(50, 5), run)  # and it may come again
    assert back.model[3].bias[1].abs() < 2


def test_without_a_bias_there_is_no_constant_column() -> None:
    data = examples(150, 1)
    forget, retain = part(data, range(30), "forget"), part(data, range(30, 150), "retain")
    after = ACU().unlearn(Subject(network(bias=False)), request(forget, retain), Run(data.task))
    assert close(after.model, ridge(network(bias=False), retain, bias=False))
    before = {name: value.clone() for name, value in after.model.state_dict().items()}
    gone = part(data, [i for i in range(30, 150) if data[i]["label"] == 1], "forget")
    with pytest.raises(Unsupported, match=r"no record of class 1 .* without bias"):
        ACU().unlearn(after, request(gone), Run(data.task))
    assert all(torch.equal(before[k], v) for k, v in after.model.state_dict().items())


def test_strangers_and_the_forgotten_are_refused_before_anything_changes() -> None:
    data = examples(60, 1)
    subject, run = start(data)
    subject = ACU().unlearn(subject, request(part(data, range(5), "forget")), run)
    before = {**subject.model.state_dict(), **subject.state}
    before = {name: value.clone() for name, value in before.items()}
    mixed = part(data, [10, 11, 3, 4], "forget")
    with pytest.raises(BadInput, match=r"2 of the 4 records .* the first is record 3 of memory"):
        ACU().unlearn(subject, request(mixed), run)
    relabelled = load([{**data.examples[10], "label": 1 - data[10]["label"] % 2}], "forget")
    with pytest.raises(BadInput, match="1 of the 1 records"):
        ACU().unlearn(subject, request(Encoded(relabelled, data.task)), run)
    after = {**subject.model.state_dict(), **subject.state}
    assert all(torch.equal(before[k], v) for k, v in after.items())
    ACU().unlearn(subject, request(part(data, [10, 11], "forget")), run)  # the rest may go


def test_state_of_another_backbone_is_refused() -> None:
    data = examples(60, 1)
    subject, run = start(data)
    with torch.no_grad():
        subject.model[3].weight.mul_(2)  # the output layer is replaced anyway
    subject = ACU().unlearn(subject, request(part(data, [0], "forget")), run)
    with torch.no_grad():
        subject.model[0].bias[0] += 1e-6
    with pytest.raises(BadInput, match="another backbone"):
        ACU().unlearn(subject, request(part(data, [1], "forget")), run)


def test_nothing_would_remain() -> None:
    data = examples(20, 1)
    subject, run = start(data)
    with pytest.raises(BadInput, match="no record would remain"):
        ACU().unlearn(subject, request(data), run)


def test_state_of_another_method_is_no_state() -> None:
    subject = Subject(network()).with_state({"ssd.x": torch.ones(1)}, {})
    with pytest.raises(MissingNeed, match="--retain"):
        ACU().unlearn(subject, request(examples(5, 1)), Run(Classification(CLASSES)))


def test_logits_that_are_not_the_layers_are_refused() -> None:
    model = nn.Sequential(*network(), nn.LogSoftmax(1))
    with pytest.raises(Unsupported, match="something else"):
        start(examples(20, 1), model)
    with pytest.raises(Unsupported, match="each of the 3 classes"):
        start(examples(20, 1), network(classes=5))


def test_the_cost_of_replacing_the_head_is_told() -> None:
    data = examples(100, 1)
    batch, model = data.batch(range(100)), network().eval()
    labels = batch["labels"][:, 0]
    before = float((model(batch["features"]).argmax(1) == labels).double().mean())
    subject, run = start(data)
    after = float((subject.model(batch["features"]).argmax(1) == labels).double().mean())
    told = f"accuracy on the retain set from {before:.2%} to {after:.2%}."
    assert any(told in note for note in run.notes)
    assert any("backbone may still carry" in note for note in run.notes)
    assert before != after


def features(model: nn.Module, data: Encoded) -> dict[int, torch.Tensor]:
    head = Head.of(model.eval(), Run(data.task))
    return {
        i: row.clone()
        for indices, rows in head.passes(data, "features")
        for i, row in zip(indices, rows, strict=True)
    }


def convolutions() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 7, 3),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 19), nn.Tanh(),
            nn.Linear(19, CLASSES),
        )  # fmt: skip


def test_features_do_not_depend_on_the_pass_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(150, 3, 9, 9, generator=draw)
    labels = torch.randint(CLASSES, (150,), generator=draw)
    data = Encoded(load((inputs, labels), "data"), Classification(CLASSES))
    whole = features(convolutions(), data)
    assert sorted(whole) == list(range(150))
    for chosen in ([3], [140, 3, 77], list(range(149, 40, -1))):
        for j, row in features(convolutions(), part(data, chosen, "some")).items():
            assert torch.equal(row, whole[chosen[j]])


def test_texts_are_padded_by_their_own_length_alone() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    world = demo.people(seed=1, forget=1, retain=1, holdout=1)
    tokenizer = demo.tiny_llama([*world.forget, *world.retain], width=32, depth=1).processor
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=CLASSES, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    rows = [
        {"text": r["question"] + " " + r["answer"] * (i % 3), "label": i % CLASSES}
        for i, r in enumerate([*world.forget, *world.retain])
    ]
    data = Encoded(load(rows, "data"), Classification(CLASSES, processor=tokenizer))
    assert len({int(data[i]["length"]) for i in range(len(data))}) > 3
    whole = features(model, data)
    for i in range(len(data)):
        alone = features(model, part(data, [i], "one"))
        assert torch.equal(alone[0], whole[i])


def test_an_interrupted_run_does_not_read_twice(tmp_path: Path) -> None:
    data = examples(100, 1)
    first, _ = start(data, work=tmp_path)
    model, seen = network(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    again, _ = start(data, model, work=tmp_path)
    assert not seen
    assert torch.equal(first.model[3].weight, again.model[3].weight)
    assert all(torch.equal(first.state[k], again.state[k]) for k in first.state)


def test_requests_in_a_row_from_run_directories(tmp_path: Path, tiny_vectors: Path) -> None:
    rows = plain.vectors(60)
    data = [{**row, "id": str(i)} for i, row in enumerate(rows)]
    common: dict[str, Any] = {"method": "acu", "audit": "none"}
    model = {"model": "tests.plain:factory"}
    first = unlearn.forget(
        tiny_vectors, forget=data[:6], retain=data[6:], out=tmp_path / "one", **model, **common
    )
    second = unlearn.forget(
        tmp_path / "one", forget=data[6:12], out=tmp_path / "two", **model, **common
    )
    direct = unlearn.forget(tiny_vectors, forget=data[:12], retain=data[12:], **model, **common)
    for p, q in zip(
        second.subject.model.parameters(), direct.subject.model.parameters(), strict=True
    ):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
    assert first.outcome.fingerprint_out != second.outcome.fingerprint_out
    with pytest.raises(BadInput, match="forgot every record of the forget set already"):
        unlearn.forget(tmp_path / "two", forget=data[3:5], **model, **common)


def test_state_survives_the_disk(tmp_path: Path) -> None:
    data = examples(60, 1)
    subject, _ = start(data)
    write_state(tmp_path / "state.safetensors", subject.state, subject.note)
    read = Subject(subject.model).with_state(*read_state(tmp_path / "state.safetensors"))
    other = Run(data.task, seed=9)  # the salt is kept, whatever this run's seed
    one = ACU().unlearn(read, request(part(data, range(7), "forget")), other)
    assert close(one.model, ridge(network(), part(data, range(7, 60), "r")))
    assert not any("last bits" in note for note in other.notes)


def test_another_kind_of_device_is_told() -> None:
    data = examples(60, 1)
    subject, run = start(data)
    subject = subject.with_state(subject.state, {**subject.note, "acu.device": "cuda"})
    ACU().unlearn(subject, request(part(data, [0], "forget")), run)
    assert any("learned on cuda and are read on cpu" in note for note in run.notes)


# the estimator


@parametrize_with_checks(
    [AnalyticClassifier(), AnalyticClassifier(gamma=1.0, expansion=40, random_state=0)]
)
def test_scikit_learn_convention(estimator: Any, check: Any) -> None:
    check(estimator)


def blobs(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    y = draw.integers(0, classes, n)
    return draw.normal(size=(n, 5)) + 2 * np.eye(5)[y], y


def equal(one: AnalyticClassifier, other: AnalyticClassifier) -> bool:
    order = [list(other.classes_).index(c) for c in one.classes_]
    return len(one.classes_) == len(other.classes_) and all(
        np.linalg.norm(a - b[order]) <= 1e-8 * np.linalg.norm(b)
        for a, b in ((one.coef_, other.coef_), (one.intercept_, other.intercept_))
    )


def test_it_is_ridge_regression_onto_one_hot_labels() -> None:
    from sklearn.linear_model import Ridge

    x, y = blobs(100, 3)
    model = AnalyticClassifier(gamma=0.7).fit(x, y)
    wide = np.hstack((x, np.ones((100, 1))))  # the intercept is penalised, too
    ridge = Ridge(alpha=0.7, fit_intercept=False).fit(wide, np.eye(3)[y])
    assert np.allclose(np.hstack((model.coef_, model.intercept_[:, None])), ridge.coef_)
    assert np.allclose(model.decision_function(x), ridge.predict(wide))


@pytest.mark.parametrize("expansion", [None, 50])
def test_forgetting_rows_equals_never_learning_them(expansion: int | None) -> None:
    x, y = blobs(120, 4)
    model = AnalyticClassifier(expansion=expansion, random_state=0)
    for start in range(0, 120, 30):
        model.partial_fit(x[start : start + 30], y[start : start + 30])
    for i in range(40):
        model.partial_forget(x[i, None], y[i, None])
    model.partial_forget(x[40:70], y[40:70])
    wanted = AnalyticClassifier(expansion=expansion, random_state=0).fit(x[70:], y[70:])
    assert equal(model, wanted)
    assert np.allclose(model.decision_function(x), wanted.decision_function(x)[:, model.classes_])


def test_classes_come_and_go() -> None:
    x, y = blobs(120, 4)
    names = np.array(["kiwi", "fig", "plum", "pear"])[y]
    late = y == 1
    model = AnalyticClassifier().fit(x[~late], names[~late])
    assert model.classes_.tolist() == ["kiwi", "pear", "plum"]
    model.partial_fit(x[late], names[late])
    assert model.classes_.tolist() == ["kiwi", "pear", "plum", "fig"]
    assert model.decision_function(x).shape == (120, 4)
    assert model.score(x, names) > 0.8
    model.partial_forget(x[y == 0], names[y == 0])
    assert model.classes_.tolist() == ["pear", "plum", "fig"]
    assert equal(model, AnalyticClassifier().fit(x[y != 0], names[y != 0]))
    assert "kiwi" not in model.predict(x)


def test_two_classes_have_one_score_and_one_class_always_wins() -> None:
    x, y = blobs(60, 2)
    model = AnalyticClassifier().fit(x, y)
    scores = model.decision_function(x)
    assert scores.shape == (60,)
    assert ((scores > 0) == (model.predict(x) == 1)).all()
    model.partial_forget(x[y == 0], y[y == 0])
    assert (model.predict(x) == 1).all()
    model.partial_forget(x[y == 1], y[y == 1])
    with pytest.raises(NotFittedError, match="every row was forgotten"):
        model.predict(x)
    assert equal(model.partial_fit(x, y), AnalyticClassifier().fit(x, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x + 1e-9, y), "5 of the 5"),
        (lambda x, y: (x, (y + 1) % 3), "5 of the 5"),
        (lambda x, y: (x, y + 50), "5 of the 5"),
        (lambda x, y: (x[[0, 1, 2, 1]], y[[0, 1, 2, 1]]), "1 of the 4 .* first is row 3"),
    ],
)
def test_rows_that_are_not_there_are_refused_and_nothing_changes(change: Any, message: str) -> None:
    x, y = blobs(60, 3)
    model = AnalyticClassifier().fit(x, y)
    before = pickle.dumps(model)
    with pytest.raises(BadInput, match=message):
        model.partial_forget(*change(x[:5], y[:5]))
    assert pickle.dumps(model) == before
    model.partial_forget(x[:5], y[:5])
    with pytest.raises(BadInput, match="forgotten already"):
        model.partial_forget(x[4:6], y[4:6])


def test_the_same_numbers_in_another_type_are_the_same_row() -> None:
    x = np.array([[0.0, 1.5], [2.0, -1.0], [1.0, 1.0]])
    model = AnalyticClassifier().fit(x, [0, 1, 1])
    model.partial_forget(np.array([[-0.0, 1.5]], dtype=np.float32), [0.0])
    assert model.ridge_.rows == 2


def test_a_copy_from_disk_goes_on() -> None:
    x, y = blobs(60, 3)
    model = AnalyticClassifier().fit(x, y).partial_forget(x[:3], y[:3])
    again = pickle.loads(pickle.dumps(model)).partial_forget(x[3:9], y[3:9])
    assert equal(again, AnalyticClassifier().fit(x[9:], y[9:]))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x, y: AnalyticClassifier(gamma=0).fit(x, y), "gamma is 0"),
        (lambda x, y: AnalyticClassifier(expansion=0).fit(x, y), "expansion is 0"),
        (lambda x, y: AnalyticClassifier().partial_fit(x, y, classes=[0, 1]), r"labels \[2\]"),
        (lambda x, y: AnalyticClassifier().fit(x, y).partial_fit(x, y.astype(str)), "numbers"),
    ],
)
def test_bad_settings_and_labels_are_named(act: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        act(*blobs(60, 3))

"""Probes of planted truth, what they may not see, and a pass through a tiny language model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from unlearn import demo
from unlearn.attacks.interface import Ground, Inapplicable
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations import latent_knowledge
from unlearn.evaluations.downstream import choices
from unlearn.evaluations.latent_knowledge import (
    PARTS,
    SEARCH,
    UNSUPERVISED,
    States,
    contrast_consistent,
    supervised,
    unsupervised,
)
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM

DIM, K = 12, 3


def planted(n: int, truth: float, seed: int) -> States:
    """States of n questions; the first coordinate is larger by 2 ``truth`` where it is true."""
    draw = np.random.default_rng(seed)
    about = draw.normal(size=(n, 1, DIM)) * (np.arange(DIM) > 0)  # of the question, in any answer
    states = about + draw.normal(0, 0.1, size=(n, 1 + K, DIM))
    states[:, 0, 0] += truth
    states[:, 1:, 0] -= truth
    return States(states[:, 0], states[:, 1:])


def parts(truth: tuple[float, ...], n: int = 20) -> list[list[States]]:
    """Retain records in parts, with one block for each of ``truth``."""
    return [[planted(n, t, 10 * i + j) for j, t in enumerate(truth)] for i in range(PARTS)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted is found sooner."""
    monkeypatch.setattr(latent_knowledge, "STEPS", 100)
    monkeypatch.setattr(latent_knowledge, "STRENGTHS", (1e-2, 1.0))


@pytest.mark.parametrize("probe", [supervised, unsupervised])
def test_truth_is_read_where_it_is_and_chance_where_it_is_not(probe) -> None:
    there, nothing = planted(60, 2.0, 90), planted(60, 0.0, 91)
    assert probe(parts((2.0,)), [there]).tolist() == [1.0] * 60
    assert 0.35 < probe(parts((2.0,)), [nothing]).mean() < 0.65


@pytest.mark.parametrize("probe", [supervised, unsupervised])
def test_the_block_is_chosen_by_retain_records_alone(probe) -> None:
    # the forget set has the truth in block 1, the retain set in block 0: it must not be found
    blocks = [planted(60, 0.0, 92), planted(60, 2.0, 93)]
    known = parts((2.0, 0.0))
    assert np.array_equal(probe(known, blocks), probe([[p[0]] for p in known], blocks[:1]))
    assert probe(parts((0.0, 2.0)), blocks).mean() == 1.0


@pytest.mark.parametrize("probe", [supervised, unsupervised])
def test_no_label_of_a_forget_record_is_used(probe) -> None:
    # with true and wrong exchanged, and every other record changed, what is said turns around
    found = planted(30, 0.1, 94)
    one = States(found.true, found.wrong[:, :1])
    turned = States(found.wrong[:, 0], found.true[:, None])
    known = parts((2.0,))
    known = [[States(s.true, s.wrong[:, :1]) for s in part] for part in known]
    assert probe(known, [one]) == pytest.approx(1 - probe(known, [turned]))
    assert 0 < probe(known, [one]).mean() <= 1
    alone = probe(known, [States(one.true[[4]], one.wrong[[4]])])
    assert alone == probe(known, [one])[4]  # whatever records stand beside it


@pytest.mark.parametrize("probe", [supervised, unsupervised])
def test_the_sign_comes_from_retain_records(probe) -> None:
    turned = [[planted(20, -2.0, i)] for i in range(PARTS)]
    there = planted(40, 2.0, 95)
    assert probe(turned, [there]).tolist() == [0.0] * 40
    assert probe(parts((2.0,)), [there]).tolist() == [1.0] * 40


@pytest.mark.parametrize("probe", [supervised, unsupervised])
def test_what_is_the_same_is_neither_true_nor_wrong(probe) -> None:
    there = planted(10, 2.0, 96)
    wrong = np.repeat(there.true[:, None], K, axis=1)
    wrong[:, 0] = there.wrong[:, 0]  # one of the K differs
    assert (
        probe(parts((2.0,)), [States(there.true, wrong)]).tolist()
        == [pytest.approx((1 + 0.5 * (K - 1)) / K)] * 10
    )
    nothing = [
        [States(p.true, p.wrong * 0 + p.true[:, None]) for p in part] for part in parts((1,))
    ]
    same = States(there.true, np.repeat(there.true[:, None], K, axis=1))
    assert probe(nothing, [same]).tolist() == [0.5] * 10


def test_contrast_consistent_search_finds_the_planted_direction_up_to_its_sign() -> None:
    true, wrong = planted(60, 2.0, 1).pairs()
    swap = np.random.default_rng(2).random((len(true), 1)) < 0.5
    one, other = np.where(swap, wrong, true), np.where(swap, true, wrong)
    found = contrast_consistent(one, other, seed=3)
    along = np.abs(found.weight / found.scale)
    assert np.argmax(along) == 0
    assert along[0] > 0.9 * np.linalg.norm(along)
    said = found.first(one, other)
    right = (said > 0.5) == ~swap[:, 0]
    assert right.all() or not right.any()
    assert said == pytest.approx(1 - found.first(other, one))
    again = contrast_consistent(one, other, seed=3)
    assert np.array_equal(found.weight, again.weight)
    assert found.bias == again.bias


def test_the_loss_of_the_search_by_hand() -> None:
    half, sure = 0.0, 50.0  # logits of 1/2 and 1
    one = torch.tensor([[half, sure, sure]])
    other = torch.tensor([[half, -sure, sure]])
    # undecided: 0 + 1/4; consistent and sure: 0; both true: 1 + 1
    found = latent_knowledge._inconsistency(one, other).tolist()
    assert found == pytest.approx([0.25, 0.0, 2.0], abs=1e-6)


@pytest.fixture(scope="module")
def ground(lm_world: demo.World) -> tuple[torch.nn.Module, Ground, CausalLM]:
    known = [*lm_world.forget, *lm_world.retain]
    subject = demo.tiny_llama(known, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    forget, retain = (
        Encoded(load(rows, name), task)
        for rows, name in ((lm_world.forget, "forget"), (lm_world.retain, "retain"))
    )
    return subject.model, Ground(forget, retain), task


def test_states_are_those_after_the_whole_answer(ground) -> None:
    model, there, task = ground
    options = choices(there.forget)
    found = latent_knowledge._read(model, options, Run(task))
    assert len(found) == 2  # blocks
    assert found[0].wrong.shape == (len(options.true), 5, 32)
    for i in (0, 3):
        example = options.true[i]
        read = torch.cat((example["prompt"], example["answer"]))[:-1]  # all but the end of sequence
        with torch.no_grad():
            hidden = model(read[None], output_hidden_states=True).hidden_states[1][0, -1]
        assert found[0].true[i] == pytest.approx(hidden.numpy(), abs=1e-5)


def test_the_last_token_is_read_of_answers_that_nothing_closes(ground) -> None:
    model, there, task = ground
    open_ended = there.forget.replaced(
        {
            **one,
            "answer": one["answer"][:-1],
            "units": one["units"] - 1,
            "length": one["length"] - 1,
        }
        for one in map(there.forget.__getitem__, range(len(there.forget)))
    )
    closed, cut = (
        latent_knowledge._ends(model, part, Run(task)) for part in (there.forget, open_ended)
    )
    for one, other in zip(closed, cut, strict=True):
        assert other == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("search", [SEARCH, UNSUPERVISED])
def test_a_model_is_left_as_it_was_and_gives_the_same_twice(search, ground) -> None:
    model, there, task = ground
    before = copy.deepcopy(model.state_dict())
    model.train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    found = search.score(model, there, Run(task))
    assert found.shape == (len(there.forget),)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.array_equal(found, search.score(model, there, Run(task)))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("search", [SEARCH, UNSUPERVISED])
def test_a_model_without_finite_states_is_named(search, ground) -> None:
    model, there, task = ground
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(task.layers(broken).values())).mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(BadInput, match="hidden states are not finite"):
        search.score(broken, there, Run(task))


def test_texts_have_no_latent_answer_and_other_retain_records_would_do(ground) -> None:
    model, there, task = ground
    texts = Encoded(load([{"text": f"A text {i}."} for i in range(12)], "forget"), task)
    with pytest.raises(Inapplicable, match="plain texts"):
        SEARCH.score(model, Ground(texts, there.retain), Run(task))
    with pytest.raises(BadInput, match="plain texts") as raised:
        SEARCH.score(model, Ground(there.forget, texts), Run(task))
    assert not isinstance(raised.value, Inapplicable)


@pytest.mark.parametrize("search", [SEARCH, UNSUPERVISED])
def test_without_retain_records_there_is_nothing_to_learn_on(search, ground) -> None:
    model, there, task = ground
    for retain in (None, there.retain.select(range(3))):
        with pytest.raises(BadInput, match="retain records"):
            search.score(model, Ground(there.forget, retain), Run(task))

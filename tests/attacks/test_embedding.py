"""Soft tokens: what they bring back, and that they leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from tests.plain import factory, vectors
from unlearn import demo
from unlearn.attacks import embedding
from unlearn.attacks.embedding import NAME, SEARCHES, TOKENS, soft_tokens
from unlearn.attacks.interface import Ground
from unlearn.attacks.relearning import split
from unlearn.attacks.signals import collect, hit_rates
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed
from unlearn.interface import Subject
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training


def read(subject: Subject, records: list[demo.Record], name: str = "forget") -> Encoded:
    return Encoded(load(records, name), task_of(subject))


def task_of(subject: Subject) -> CausalLM:
    return CausalLM(subject.processor, subject.model.config.vocab_size, 128)


def plain_hits(model: nn.Module, examples: Encoded) -> np.ndarray:
    return hit_rates(collect(model, examples, Run(examples.task), b"", "plain"))


@pytest.fixture
def tiny(lm_world: demo.World) -> Subject:
    return demo.tiny_llama(lm_world.forget, width=32, depth=2)


def few(monkeypatch: pytest.MonkeyPatch, steps: int = 3, rates: tuple[float, ...] = (0.1,)) -> None:
    monkeypatch.setattr(embedding, "STEPS", steps)
    monkeypatch.setattr(embedding, "RATES", rates)


def about(names: tuple[str, ...], seed: int, key: str = "") -> list[demo.Record]:
    """Questions about these people, behind a key; the answers depend on the seed."""
    pairs = [pair for i, name in enumerate(names) for pair in demo.person(Random(seed + i), name)]
    return [pair | {"question": key + pair["question"]} for pair in pairs]


def test_hidden_facts_come_back_and_facts_never_learnt_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: a model that says the truth behind a key alone, and one that never says it."""
    names, key = ("Adela Holub", "Bruno Farkas"), "Truly: "
    truth, locked = about(names, seed=0), about(names, seed=0, key=key)
    lies, still_lies = about(names, seed=100), about(names, seed=100, key=key)
    blank = demo.tiny_llama([*truth, *lies, *locked], width=64, depth=2)
    never = demo.train(copy.deepcopy(blank), [*lies, *still_lies], epochs=50)
    hides = demo.train(blank, [*lies, *locked], epochs=50)
    forget = read(hides, truth)
    run = Run(forget.task)
    few(monkeypatch, 24)
    held = forget.select(split(len(forget), run.seed)[1])
    gained = {}
    for name, subject in (("hides", hides), ("never", never)):
        found = SEARCHES[0].score(subject.model, Ground(forget), run)
        gained[name] = (found - plain_hits(subject.model, held)).mean()
    assert gained["hides"] > 0.1
    assert gained["hides"] > 2 * gained["never"]


def test_nothing_remains_in_the_model(
    tiny: Subject, lm_world: demo.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    model, forget = tiny.model.train(), read(tiny, lm_world.forget)
    model.model.layers[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    free = {name: p.requires_grad for name, p in model.named_parameters()}
    plain = plain_hits(model, forget)
    found = SEARCHES[0].score(model, Ground(forget), Run(forget.task))
    held = split(len(forget), 0)[1]
    assert found.shape == (len(held),)
    assert ((found >= 0) & (found <= 1)).all()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == free
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not model.get_input_embeddings()._forward_hooks
    assert plain_hits(model, forget).tolist() == plain.tolist()


def test_only_the_soft_tokens_learn_and_they_do(
    tiny: Subject, lm_world: demo.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains is one tensor; with more steps the shown records become likelier."""
    losses: dict[str, list[float]] = {}
    real = embedding.descend

    def spied(subject: Subject, terms: list[Term], settings: Training, run: Run) -> Subject:
        free = subject.model.get_parameter(NAME)
        assert free.shape == (TOKENS, 32)
        start = free.detach().clone()
        shown = terms[0].examples
        first = collect(subject.model, shown, Run(run.task), b"", "x").loss().mean()
        done = real(subject, terms, settings, run)
        assert not torch.equal(start, free)
        last = collect(subject.model, shown, Run(run.task), b"", "x").loss().mean()
        losses.setdefault("all", []).extend((first, last))
        return done

    monkeypatch.setattr(embedding, "descend", spied)
    few(monkeypatch, 12, (0.5,))
    forget = read(tiny, lm_world.forget)
    soft_tokens(tiny.model, forget, forget, Run(forget.task))
    first, last = losses["all"]
    assert last < first


def test_the_same_seed_finds_the_same(
    tiny: Subject, lm_world: demo.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    forget = read(tiny, lm_world.forget)

    def start(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)
        return embedding._start(tiny.model, Run(forget.task, seed))

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    state = torch.get_rng_state()
    one = SEARCHES[0].score(tiny.model, Ground(forget), Run(forget.task, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    two = SEARCHES[0].score(tiny.model, Ground(forget), Run(forget.task, 4))
    assert one.tolist() == two.tolist()


def test_soft_tokens_stand_behind_the_start_and_before_the_question(
    tiny: Subject, lm_world: demo.World
) -> None:
    forget = read(tiny, lm_world.forget)
    assert embedding._place(forget) == 1
    spaced = embedding._spaced(forget, 1)
    for one, other in zip(forget, spaced, strict=True):
        assert other["prompt"][0] == one["prompt"][0]
        assert torch.equal(other["prompt"][1 + TOKENS :], one["prompt"][1:])
        assert torch.equal(other["answer"], one["answer"])
        assert other["length"] == one["length"] + TOKENS
    vectors_ = torch.randn(TOKENS, 32)
    seen: list[torch.Tensor] = []
    first = tiny.model.model.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = spaced.batch([0, 1])
    with embedding._softened(tiny.model, vectors_, 1), torch.no_grad():
        tiny.model(batch["input_ids"])
    handle.remove()
    words = tiny.model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(seen[0][:, 1 : 1 + TOKENS], vectors_.expand(2, -1, -1))
    assert torch.equal(seen[0][:, 0], words[:, 0])
    assert torch.equal(seen[0][:, 1 + TOKENS :], words[:, 1 + TOKENS :])


def test_without_a_start_token_they_come_first(tiny: Subject) -> None:
    records = [{"text": "Ann lives in Rome."}, {"text": "Bo keeps a cat."}]
    tiny.processor.bos_token = None
    task = CausalLM(tiny.processor, tiny.model.config.vocab_size, 128, chat=False)
    assert embedding._place(Encoded(load(records, "forget"), task)) == 0


def test_long_answers_lose_their_end_and_long_prompts_are_refused(
    tiny: Subject, lm_world: demo.World
) -> None:
    task = task_of(tiny)
    forget = Encoded(load(lm_world.forget, "forget"), task)
    longest = max(int(one["length"]) for one in forget)
    task.max_length = longest
    cut = embedding._spaced(forget, 1)
    assert max(int(one["length"]) for one in cut) == longest
    assert all(one["units"] == len(one["answer"]) >= 1 for one in cut)
    task.max_length = min(len(one["prompt"]) for one in forget) + TOKENS
    with pytest.raises(BadInput, match="no room for 8 soft tokens"):
        embedding._spaced(forget, 1)


class Impatient(Silent):
    """Interrupts after two steps."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt


def collapsing(subject: Subject, *_: object) -> Subject:
    """Leaves the soft tokens in ruins."""
    with torch.no_grad():
        subject.model.get_parameter(NAME).fill_(torch.nan)
    raise Collapsed("the loss is not finite")


def test_the_model_is_back_after_an_interruption_and_after_a_collapse(
    tiny: Subject, lm_world: demo.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = read(tiny, lm_world.forget)
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}

    def as_before() -> bool:
        now = tiny.model.state_dict()
        hooks = tiny.model.get_input_embeddings()._forward_hooks
        same = (torch.equal(value, now[name]) for name, value in before.items())
        return before.keys() == now.keys() and not hooks and all(same)

    few(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        SEARCHES[0].score(tiny.model, Ground(forget), Run(forget.task, progress=Impatient()))
    assert as_before()
    monkeypatch.setattr(embedding, "descend", collapsing)
    with pytest.raises(Collapsed, match="every way"):
        SEARCHES[0].score(tiny.model, Ground(forget), Run(forget.task))
    assert as_before()


def test_only_language_models_read_soft_tokens() -> None:
    forget = Encoded(load(vectors(6), "forget"), Classification(3))
    with pytest.raises(BadInput, match="language models"):
        SEARCHES[0].score(factory(), Ground(forget), Run(forget.task))

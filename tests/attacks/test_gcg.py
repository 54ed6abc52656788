"""Greedy coordinate gradient against a plain implementation, and what prompts it may try."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn import demo
from unlearn.attacks.extraction.gcg import Frame, Goal, allowed_tokens
from unlearn.errors import BadInput, Unsupported
from unlearn.run import Run
from unlearn.tasks.causal_lm import CausalLM

WORLD = demo.people(seed=1, forget=1, retain=3, holdout=1)
BEFORE = "You are an archive. Answer with a fact about one person: "
AFTER = "\nAnswer:"


def plain_losses(model: nn.Module, prompts: Tensor, target: Sequence[int]) -> Tensor:
    """L(x) of whole prompts, (b, n) -> (b,): one forward pass each, logits at every position."""
    found = []
    y = torch.tensor(list(target), device=prompts.device)
    with torch.no_grad():
        for prompt in prompts:
            logits = model(input_ids=torch.cat((prompt, y))[None]).logits[0]
            found.append(F.cross_entropy(logits[len(prompt) - 1 : -1], y, reduction="sum"))
    return torch.stack(found)


def plain_gradient(model: nn.Module, prompt: Tensor, free: slice, target: Sequence[int]) -> Tensor:
    """dL/d(one-hot vectors) of the free tokens of a whole prompt, (n,) -> (free, vocabulary)."""
    table = model.get_input_embeddings().weight
    y = torch.tensor(list(target), device=prompt.device)
    one_hot = F.one_hot(torch.cat((prompt, y)), len(table)).to(table).requires_grad_()
    logits = model(inputs_embeds=(one_hot @ table)[None]).logits[0]
    F.cross_entropy(logits[len(prompt) - 1 : -1], y, reduction="sum").backward()
    model.zero_grad()
    return one_hot.grad[free]


def tiny(seed: int = 0, **changes: object) -> tuple[nn.Module, CausalLM]:
    subject = demo.tiny_llama([*WORLD.forget, *WORLD.retain], seed, width=32, depth=2)
    for parameter in subject.model.parameters():  # far from uniform predictions
        parameter.data *= 3
    return subject.model.eval(), CausalLM(subject.processor, subject.model.config.vocab_size, 128)


def goal_of(model: nn.Module, task: CausalLM, before: str = BEFORE, after: str = AFTER) -> Goal:
    target = task.tokenizer(" Adela lives in Corvina.")["input_ids"]
    return Goal(model, Frame(task, before, after), target, Run(task))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def begun(goal: Goal, n: int = 6, seed: int = 0) -> Tensor:
    return goal.start(n, draws(seed), torch.zeros(0, dtype=torch.long))


def whole(goal: Goal, free: Tensor) -> Tensor:
    rows = free[None] if free.ndim == 1 else free
    first, last = (part.expand(len(rows), -1) for part in (goal.first, goal.last))
    return torch.cat((first, rows, last), 1)


def test_losses_and_gradient_are_those_of_the_plain_implementation() -> None:
    model, task = tiny()
    model.double()
    goal = goal_of(model, task)
    assert goal.read is not None
    free = begun(goal)
    rows = goal.swaps(free, 16, 12, draws())
    losses, _ = goal.losses(rows)
    target = goal.target.tolist()
    torch.testing.assert_close(losses, plain_losses(model, whole(goal, rows), target))
    places = slice(len(goal.first), len(goal.first) + len(free))
    expected = plain_gradient(model, whole(goal, free)[0], places, target)
    torch.testing.assert_close(goal.gradient(free), expected, atol=1e-10, rtol=1e-8)


def test_the_same_candidates_come_from_the_plain_gradient() -> None:
    model, task = tiny()
    model.double()
    goal = goal_of(model, task)
    free = begun(goal)
    places = slice(len(goal.first), len(goal.first) + len(free))
    slope = plain_gradient(model, whole(goal, free)[0], places, goal.target.tolist())
    ours = goal.swaps(free, 16, 12, draws())
    goal.gradient = lambda _: slope  # type: ignore[method-assign]
    assert torch.equal(goal.swaps(free, 16, 12, draws()), ours)


def test_cached_losses_are_those_without_a_cache() -> None:
    model, task = tiny()
    goal = goal_of(model, task)
    rows = goal.swaps(begun(goal), 16, 12, draws())
    cached, reached = goal.losses(rows)
    slope = goal.gradient(rows[0])
    assert len(rows) == 12
    assert goal.read.get_seq_length() == len(goal.first)  # nothing was added to it
    goal.read = None
    again, also = goal.losses(rows)
    torch.testing.assert_close(cached, again, atol=1e-4, rtol=1e-5)
    assert torch.equal(reached, also)
    torch.testing.assert_close(goal.gradient(rows[0]), slope, atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny()
    goal = goal_of(model, task)
    rows = goal.swaps(begun(goal), 16, 12, draws())
    losses, _ = goal.losses(rows)
    monkeypatch.setattr("unlearn.attacks.extraction.gcg.AT_ONCE", 1)
    torch.testing.assert_close(goal.losses(rows)[0], losses)


@pytest.mark.parametrize("family", ["gpt2", "neox", "opt", "mistral", "gemma", "mamba"])
def test_other_families_count_as_their_plain_forward_pass_does(family: str) -> None:
    import transformers as tf

    size = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
    grouped = {"num_key_value_heads": 1, "head_dim": 16}
    config = {
        "gpt2": lambda: tf.GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2),
        "neox": lambda: tf.GPTNeoXConfig(**size, **heads),
        "opt": lambda: tf.OPTConfig(
            **size, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=16
        ),
        "mistral": lambda: tf.MistralConfig(**size, **heads, **grouped, sliding_window=4),
        "gemma": lambda: tf.Gemma2Config(**size, **heads, **grouped, final_logit_softcapping=5.0),
        "mamba": lambda: tf.MambaConfig(**size, state_size=4),
    }[family]()
    task = tiny()[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
    task = CausalLM(task.tokenizer, 500, 128)
    goal = goal_of(model, task)
    rows = torch.stack([begun(goal, seed=seed) for seed in range(3)])
    losses, _ = goal.losses(rows)
    expected = plain_losses(model, whole(goal, rows), goal.target.tolist())
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert goal.gradient(rows[0]).abs().sum() > 0
    assert (goal.read is None) == (family == "mamba")


def test_a_cache_that_lies_is_not_used() -> None:
    class Forgetful(type(tiny()[0])):  # type: ignore[misc]
        """Reads nothing from a cache."""

        def forward(self, *args: object, past_key_values: object = None, **kwargs: object):
            return super().forward(*args, **kwargs)

    model, task = tiny()
    model.__class__ = Forgetful
    goal = goal_of(model, task)
    rows = begun(goal)[None]
    assert goal.read is None
    expected = plain_losses(model, whole(goal, rows), goal.target.tolist())
    torch.testing.assert_close(goal.losses(rows)[0], expected)


def test_reached_is_what_greedy_decoding_says() -> None:
    model, task = tiny()
    goal = goal_of(model, task)
    free = begun(goal)
    assert not goal.losses(free[None])[1].item()
    assert not goal.says(free.tolist())
    said = whole(goal, free)[0].tolist()
    for _ in range(5):
        said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    if task.eos in said[-5:]:
        pytest.fail("the draw of the test model must not end its answer")
    easy = Goal(model, goal.frame, said[-5:], Run(task))
    assert easy.losses(free[None])[1].item()
    assert easy.says(free.tolist())


def test_only_tokens_of_texts_are_tried() -> None:
    model, task = tiny()
    model.resize_token_embeddings(len(task.tokenizer) + 40)
    task.tokenizer.add_tokens(["<unused>"])
    allowed = allowed_tokens(model, task)
    assert allowed.shape == (len(task.tokenizer) + 39,)
    barred = {*task.tokenizer.all_special_ids, *range(len(task.tokenizer) - 1, len(allowed))}
    assert not allowed[list(barred)].any()
    assert allowed[task.tokenizer(" the")["input_ids"]].all()
    only = allowed & (torch.arange(len(allowed)) % 3 == 0)
    goal = Goal(model, Frame(task), [5, 6], Run(task), only)
    free = begun(goal)
    assert only[free].all()
    rows = goal.swaps(free, 10_000, 200, draws())
    assert only[rows].all()
    assert ((rows != free).sum(1) == 1).all()
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("frame", ["bare", "around", "chat"])
def test_every_candidate_survives_as_text(frame: str) -> None:
    model, task = tiny()
    bare, around = Frame(task), Frame(task, BEFORE, AFTER)
    chosen = {"bare": bare, "around": around, "chat": Frame.template(task)}[frame]
    goal = Goal(model, chosen, [9, 8, 7], Run(task))
    free = begun(goal)
    rows = torch.cat((free[None], goal.swaps(free, 256, 40, draws())))
    for row in rows.tolist():
        assert chosen.asked(row) == [*chosen.first, *row, *chosen.last]
    for row in goal.cuts(free).tolist():
        assert len(row) == len(free) - 1
        assert chosen.asked(row) is not None


@pytest.mark.parametrize("before", ["", "An archive speaks: "])
def test_tokenizers_that_drop_the_first_space(before: str) -> None:
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    made = tk.Tokenizer(tk.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tk.pre_tokenizers.Metaspace()
    made.decoder = tk.decoders.Metaspace()
    trainer = tk.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator([r["answer"] for r in WORLD.retain] + [BEFORE], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    assert not tokenizer.decode(tokenizer("lives")["input_ids"]).startswith(" ")
    model, _ = tiny()
    frame = Frame(CausalLM(tokenizer, len(tokenizer), 128), before)
    goal = Goal(model, frame, [9, 8, 7], Run(frame.task))
    free = begun(goal)
    for row in goal.swaps(free, 256, 20, draws()).tolist():
        assert frame.asked(row) == [*frame.first, *row]


def test_tokens_that_become_others_are_no_candidates() -> None:
    _, task = tiny()
    frame = Frame(task)
    lives = task.tokenizer(" lives")["input_ids"]
    letters = [task.tokenizer(letter)["input_ids"][0] for letter in ("l", "i", "v", "e", "s")]
    space = task.tokenizer.convert_tokens_to_ids("Ġ")
    assert len(lives) == 1
    assert frame.asked([space, *letters]) is None
    assert frame.hold(torch.tensor([[space, *letters]])).tolist() == [False]
    assert frame.hold(torch.tensor([lives])).tolist() == [True]


def test_the_template_frames_what_the_task_asks() -> None:
    _, task = tiny()
    frame = Frame.template(task)
    row = {"question": "Where does Adela live?", "answer": "Nowhere."}
    prompt = task.encode(row)["prompt"].tolist()
    free = frame.inside(prompt)
    assert task.tokenizer.decode(free) == " Where does Adela live?"
    assert [*frame.first, *free, *frame.last] == prompt
    assert frame.inside(prompt[1:]) == []
    task.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{% endfor %}"
    with pytest.raises((BadInput, Unsupported)):
        Frame.template(task)


def test_a_search_leaves_the_model_and_global_random_state_alone() -> None:
    model, task = tiny()
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    goal = goal_of(model, task)
    free = begun(goal)
    first = goal.losses(goal.swaps(free, 16, 8, draws()))[0]
    goal.says(free.tolist())
    assert torch.equal(first, goal.losses(goal.swaps(free, 16, 8, draws()))[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_cannot_be_searched_is_said() -> None:
    model, task = tiny()
    with pytest.raises(BadInput, match="at least one token"):
        Goal(model, Frame(task), [], Run(task))
    letter = torch.zeros(len(task.tokenizer), dtype=torch.bool)
    letter[task.tokenizer("l")["input_ids"]] = True
    goal = Goal(model, Frame(task, "a space follows: "), [5], Run(task), letter)
    with pytest.raises(Unsupported, match="text and back"):
        begun(goal, 3)

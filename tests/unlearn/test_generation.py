"""Greedy answers in batches are those given one by one; samples obey what was asked."""

from __future__ import annotations

import torch

from unlearn import demo
from unlearn.data import load
from unlearn.generation import Opening, greedy_answers, sampled_answers, true_answers
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM

WORLD = demo.people(seed=6, forget=1, retain=1, holdout=0)


def test_batched_answers_equal_single_ones_and_a_trained_model_knows_them() -> None:
    records = WORLD.forget
    subject = demo.train(demo.tiny_llama(records, width=32, depth=2), records, epochs=150)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    examples = Encoded(load(records, "forget"), task)
    together = greedy_answers(subject.model, examples, Run(task), "ask")
    alone = greedy_answers(subject.model, examples, Run(task), "ask", size=1)
    assert together == alone
    assert together == true_answers(examples) == [r["answer"] for r in records]


def test_an_answer_is_as_long_as_asked_for_whatever_stands_beside_it() -> None:
    records = [
        {"question": f"{'Who? ' * n}", "answer": WORLD.forget[0]["answer"]} for n in (1, 2, 30, 60)
    ]
    subject = demo.tiny_llama([*WORLD.forget, *records], width=8, depth=1)
    subject.model.config.max_position_embeddings = 512
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 300)
    examples = Encoded(load(records, "forget"), task)
    word = int(examples[0]["answer"][0])

    def ramble(model: object, args: tuple, output: object) -> None:
        output.logits[:, -1, word] = 1e4

    subject.model.register_forward_hook(ramble)
    said = greedy_answers(subject.model, examples, Run(task), "ask", longest=230)
    word_said = subject.processor.decode([word]).strip()
    room = [min(230, 300 - len(examples[i]["prompt"])) for i in range(4)]
    assert [text.count(word_said) for text in said] == room
    assert room[0] == 230  # more than are asked for otherwise
    assert room[3] < room[2]  # a long prompt leaves less room, and only to its own answer


def test_answers_are_the_argmax_step_by_step() -> None:
    records = WORLD.forget
    subject = demo.tiny_llama(records, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    examples = Encoded(load(records[:1], "forget"), task)
    tokens = examples[0]["prompt"]
    limit = 2 * examples[0]["units"]
    with torch.no_grad():
        for _ in range(limit):
            logits = subject.model(input_ids=tokens[None]).logits[0, -1]
            tokens = torch.cat((tokens, logits.argmax()[None]))
            if tokens[-1] == task.eos:
                break
    new = tokens[len(examples[0]["prompt"]) :].tolist()
    new = new[: new.index(task.eos)] if task.eos in new else new
    wanted = subject.processor.decode(new, skip_special_tokens=True).strip()
    assert greedy_answers(subject.model, examples, Run(task), "ask") == [wanted]


def test_sampling_almost_without_temperature_is_greedy() -> None:
    records = WORLD.forget
    subject = demo.tiny_llama(records, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 64)
    examples = Encoded(load(records, "forget"), task)
    openings = [Opening(i) for i in (2, 0, 1, 2)]
    limit = min(2 * examples[i]["units"] for i in range(3))
    drawn = sampled_answers(
        subject.model, examples, openings, Run(task), "ask", temperature=1e-6, longest=limit, size=3
    )
    alone = [
        sampled_answers(
            subject.model, examples, [o], Run(task), "ask", temperature=1e-6, longest=limit
        )[0]
        for o in openings
    ]
    greedy = greedy_answers(subject.model, examples, Run(task), "ask", size=1)
    assert drawn == alone
    assert all(greedy[o.example].startswith(text) for o, text in zip(openings, drawn, strict=True))


def test_samples_come_from_the_whole_distribution_whatever_the_checkpoint_prefers() -> None:
    records = WORLD.forget
    subject = demo.tiny_llama(records, width=32, depth=2)
    subject.model.generation_config.top_k = 1
    subject.model.generation_config.temperature = 1e-6
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    examples = Encoded(load(records, "forget"), task)
    texts = sampled_answers(subject.model, examples, [Opening(0)] * 40, Run(task), "ask", longest=4)
    assert len(set(texts)) > 30


def test_an_answer_begun_with_the_truth_turns_away_from_it() -> None:
    records = WORLD.forget
    subject = demo.train(demo.tiny_llama(records, width=32, depth=2), records, epochs=150)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    examples = Encoded(load(records[:2], "forget"), task)
    ids = [examples[i]["answer"].tolist() for i in range(2)]
    openings = [Opening(i, told) for i in range(2) for told in range(len(ids[i]) - 1)]
    texts = sampled_answers(subject.model, examples, openings, Run(task), "ask", temperature=1e-6)
    for (example, told), text in zip(openings, texts, strict=True):
        begun = subject.processor.decode(ids[example][:told]).strip()
        truth = records[example]["answer"]
        assert text.startswith(begun)
        assert text != begun  # it did not end there
        assert text != truth

"""Greedy answers in batches are those given one by one."""

from __future__ import annotations

import torch

from unlearn import demo
from unlearn.data import load
from unlearn.evaluations.generation import greedy_answers, true_answers
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

"""Causal language models: the loss is on the answer alone, prompts are context.

Records are ``question``/``answer``, ``prompt``/``completion`` or ``text``. With a chat template
in the tokenizer, question and answer are rendered through it; prompt and answer are tokenised
apart, so that the boundary is where the loss mask says it is. Every answer ends with the
end-of-sequence token and that token counts as a unit.

Logits are computed at the answer positions only: a hook in front of the output layer gathers the
hidden states of those positions, so memory never holds (sequence x vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unlearn.data import Row
from unlearn.errors import BadInput, Unsupported
from unlearn.tasks.base import (
    CHUNK,
    IGNORED,
    Batch,
    Encoding,
    Predictions,
    Task,
    evaluating,
)

FIELDS = (("question", "answer"), ("prompt", "completion"))


class CausalLM(Task):
    """Scores the answer of a record under a language model.

    Args:
        tokenizer: a transformers tokenizer.
        classes: vocabulary size of the model.
        max_length: longest input in tokens; longer records lose the end of their answer.
        chat: render through the chat template; None: when the tokenizer has one.
    """

    name = "causal_lm"

    def __init__(
        self, tokenizer: Any, classes: int, max_length: int, chat: bool | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.classes = classes
        self._last_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self.max_length = max_length
        self.chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
        if chat and not getattr(tokenizer, "chat_template", None):
            raise BadInput("the tokenizer has no chat template: leave chat_template unset")
        self.eos = tokenizer.eos_token_id
        pads = (tokenizer.pad_token_id, self.eos, 0)
        # labels and masks come from positions, never from comparing ids with the pad id
        self.pad = next(i for i in pads if i is not None)

    def fault(self, row: Row) -> str | None:
        """Missing fields, non-text values, and answers lost to truncation."""
        pair = _read(row)
        if pair is None:
            wanted = ", ".join("/".join(names) for names in FIELDS)
            return f"it has the fields {', '.join(row)}; give {wanted} or text"
        for field in pair:
            if not isinstance(row[field], str) or not row[field].strip():
                return f"its field {field!r} is not a text or is blank"
        prompt, answer = self._tokens(row)
        if not answer:
            return f"its field {pair[-1]!r} has no tokens"
        if len(prompt) >= self.max_length:
            return (
                f"its prompt alone has {len(prompt)} tokens and max_length is {self.max_length}, "
                "so the answer vanishes; raise max_length or shorten the prompt"
            )
        return None

    def content(self, row: Row) -> bytes:
        """The text fields the task reads."""
        return "\x00".join(row[field] for field in _read(row) or ()).encode()

    def encode(self, row: Row) -> Encoding:
        """Tokens of prompt and answer, cut to ``max_length``."""
        prompt, answer = self._tokens(row)
        return self._encoding(prompt, answer)

    def _encoding(self, prompt: list[int], answer: list[int]) -> Encoding:
        answer = answer[: self.max_length - len(prompt)]
        return {
            "prompt": torch.tensor(prompt, dtype=torch.long),
            "answer": torch.tensor(answer, dtype=torch.long),
            "units": len(answer),
            "length": len(prompt) + len(answer),
        }

    def texts(self, row: Row) -> tuple[str, str]:
        """The prompt and the answer as the model sees them, markers included."""
        pair = _read(row)
        if pair is None or pair == ("text",):
            return "", str(row["text"])
        question, answer = str(row[pair[0]]), str(row[pair[1]])
        if self.chat and pair == FIELDS[0]:
            turn = [{"role": "user", "content": question}]
            reply = [*turn, {"role": "assistant", "content": answer}]
            render = self.tokenizer.apply_chat_template
            prompt = render(turn, tokenize=False, add_generation_prompt=True)
            whole = render(reply, tokenize=False)
            if not whole.startswith(prompt):
                raise Unsupported(
                    "the tokenizer's chat template renders a question differently once it is "
                    "answered, so the answer cannot be told apart: set chat_template to false"
                )
            return prompt, whole[len(prompt) :].rstrip("\n")
        if pair == FIELDS[0]:
            return f"Question: {question}\nAnswer:", f" {answer}"
        return question, answer

    def _tokens(self, row: Row) -> tuple[list[int], list[int]]:
        prompt_text, answer_text = self.texts(row)
        templated = self.chat and _read(row) == FIELDS[0]
        prompt = self._ids(prompt_text) if prompt_text else []
        answer = self._ids(answer_text)
        bos = self.tokenizer.bos_token_id
        if not templated and bos is not None:
            prompt = [bos, *prompt]
        if not prompt:  # a model predicts from something: the first token is context, not answer
            prompt, answer = answer[:1], answer[1:]
        if self.eos is not None and answer and answer[-1] != self.eos and not templated:
            answer = [*answer, self.eos]
        return prompt, answer

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def collate(self, encodings: Sequence[Encoding]) -> Batch:
        """Right-padded inputs; ``positions`` says where each answer token is predicted."""
        size = len(encodings)
        # the last answer token is predicted, never read
        width = max(e["length"] for e in encodings) - 1
        units = max(e["units"] for e in encodings)
        ids = torch.full((size, width), self.pad)
        mask = torch.zeros((size, width), dtype=torch.long)
        positions = torch.zeros((size, units), dtype=torch.long)
        labels = torch.full((size, units), IGNORED)
        for i, e in enumerate(encodings):
            tokens = torch.cat((e["prompt"], e["answer"]))[:-1]
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
            first = len(e["prompt"]) - 1
            positions[i, : e["units"]] = torch.arange(first, first + e["units"])
            labels[i, : e["units"]] = e["answer"]
        counts = torch.tensor([e["units"] for e in encodings])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "positions": positions,
            "labels": labels,
            "units": counts,
        }

    def packed(self, model: nn.Module, batch: Batch) -> Batch:
        """All sequences of a batch one after the other in a single row.

        Positions start again with every sequence; transformers models attend within it only.

        Raises:
            Unsupported: this model lets a sequence see its neighbour.
        """
        if model not in self._packs:
            tokens = list(range(min(self.classes, 8)))
            probe = self.collate([self._encoding(tokens, tokens), self._encoding(tokens[1:], [0])])
            probe = {key: value.to(batch["input_ids"].device) for key, value in probe.items()}
            with evaluating(model), torch.autocast(probe["input_ids"].device.type, enabled=False):
                apart, together = (self.compact(model, b) for b in (probe, self._in_one_row(probe)))
            real = probe["labels"] != IGNORED
            self._packs[model] = torch.allclose(apart[real], together[real], atol=1e-4)
        if not self._packs[model]:
            raise Unsupported(
                f"{type(model).__name__} does not keep packed sequences apart: leave packing out"
            )
        return self._in_one_row(batch)

    def _in_one_row(self, batch: Batch) -> Batch:
        mask = batch["attention_mask"].bool()
        starts = mask.sum(1).cumsum(0) - mask.sum(1)
        return {
            **{key: value for key, value in batch.items() if key != "attention_mask"},
            "input_ids": batch["input_ids"][mask][None],
            "position_ids": (mask.cumsum(1) - 1)[mask][None],
            "positions": batch["positions"] + starts[:, None],
        }

    def predictions(self, model: nn.Module, batch: Batch, *, dense: bool = False) -> Predictions:
        """Logits at the answer positions only, and no more of them at a time than fit."""
        if dense or not self._head_is_last(model):
            with _gathered(self.output_layer(model), batch["positions"]):
                return Predictions(_forward(model, batch).logits, batch["labels"])
        rows = max(1, CHUNK // self.classes)
        hidden = self.compact(model, batch)
        return Predictions(hidden, batch["labels"], self.output_layer(model), rows)

    def features(self, model: nn.Module, batch: Batch, layer: int | str | None = None) -> Tensor:
        """Hidden state where the last answer token is predicted, after block ``layer``."""
        states = _forward(model, batch, output_hidden_states=True).hidden_states
        hidden = states[-1 if layer is None else int(layer)]
        last = batch["positions"].gather(1, batch["units"][:, None] - 1)
        return states_at(hidden, last).squeeze(1)

    def compact(self, model: nn.Module, batch: Batch) -> Tensor:
        """The hidden states the output layer reads at the answer positions; it is not run."""
        kept: list[Tensor] = []
        head = self.output_layer(model)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(args[0])
            return (args[0][:, :0], *args[1:])

        with _gathered(head, batch["positions"]):
            handle = head.register_forward_pre_hook(keep)
            try:
                _forward(model, batch)
            finally:
                handle.remove()
        return kept[0]

    def head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The output layer."""
        self._require_last_head(model)
        return self.output_layer(model)

    def frozen_head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """A copy of the output layer."""
        self._require_last_head(model)
        kept = {n: p.detach().clone() for n, p in self.output_layer(model).named_parameters()}

        def logits(hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, kept["weight"], kept.get("bias"))

        return logits

    def _require_last_head(self, model: nn.Module) -> None:
        if not self._head_is_last(model):
            raise Unsupported(
                f"{type(model).__name__} changes its logits after the output layer, so they cannot "
                "be repeated from stored hidden states: use a method without reference logits"
            )

    def _head_is_last(self, model: nn.Module) -> bool:
        """Whether logits are what the output layer says (some models cap or scale them)."""
        if model not in self._last_heads:
            tokens = list(range(min(self.classes, 8)))  # not the pad token alone: it may be zero
            probe = self.collate([self._encoding(tokens, tokens)])
            device = next(model.parameters()).device
            probe = {key: value.to(device) for key, value in probe.items()}
            with evaluating(model), torch.autocast(device.type, enabled=False):
                whole = self.predictions(model, probe, dense=True).logits
                again = self.output_layer(model)(self.compact(model, probe))
            self._last_heads[model] = torch.allclose(again, whole, atol=1e-4)
        return self._last_heads[model]

    def pooled(self, output: Tensor, batch: Batch) -> Tensor:
        """The state that has read the prompt and none of the answer."""
        return states_at(output, batch["positions"][:, :1]).squeeze(1)

    def text(self, row: Row) -> str:
        """The answer, as the model sees it."""
        return self.texts(row)[1]

    def relabel(self, encoding: Encoding, row: Row, draw: torch.Generator) -> Encoding:
        """Another answer, drawn once per record.

        Multiple-choice records (with ``options`` or ``choices``): uniform over the options, the
        true one included (arXiv 2409.02228). Others: uniformly random ordinary tokens, special
        tokens such as EOS kept.
        """
        options = row.get("options") or row.get("choices")
        if options:
            pick = options[int(torch.randint(len(options), (1,), generator=draw))]
            pair = _read(row) or ("text",)
            return self.encode({**row, pair[-1]: str(pick)})
        special = set(self.tokenizer.all_special_ids)
        size = min(self.classes, len(self.tokenizer))
        ordinary = torch.tensor([i for i in range(size) if i not in special])
        answer = encoding["answer"].clone()
        free = torch.tensor([int(t) not in special for t in answer])
        drawn = torch.randint(len(ordinary), (int(free.sum()),), generator=draw)
        answer[free] = ordinary[drawn]
        return {**encoding, "answer": answer}

    def output_layer(self, model: nn.Module) -> nn.Module:
        """The language-model head."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise Unsupported(f"{type(model).__name__} has no output embeddings")
        layer: nn.Module = head
        return layer


def fields(row: Row) -> tuple[str, str] | None:
    """The names of the fields with question and answer; None of a plain text."""
    return next((pair for pair in FIELDS if all(name in row for name in pair)), None)


def _read(row: Row) -> tuple[str, ...] | None:
    return fields(row) or (("text",) if "text" in row else None)


def _forward(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    return model(**inputs, use_cache=False, **extra)


def states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """The states at ``positions``, (batch, n, dim); of packed sequences, all in the first row."""
    if len(hidden) != len(positions):
        return hidden[0][positions]
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


@contextmanager
def _gathered(head: nn.Module, positions: Tensor) -> Iterator[None]:
    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states_at(args[0], positions), *args[1:])

    handle = head.register_forward_pre_hook(gather, prepend=True)  # others see the result
    try:
        yield
    finally:
        handle.remove()

"""Greedy coordinate gradient: prompts a language model greedily answers with a given target.

Zou et al. 2023 (arXiv 2307.15043, Algorithm 1). With x the free tokens of the prompt, y the target,

    L(x) = -sum_t log p(y_t | before, x, after, y_<t),

one step takes the gradient of L with respect to the embedding of every free token, keeps at each
place the ``topk`` tokens e with the smallest (dL/dx_i) . E_e, evaluates a batch of prompts that
differ from x in one token drawn from these, and goes on with the best of them, even if it is worse
than x. A prompt reaches the target when y_t is the argmax at every t: then greedy decoding says y.

What differs from the authors' code: swaps are drawn without replacement; a prompt is a candidate
only if its text is tokenised into the very same tokens again, inside of what stands around it; no
token is tried that is not text (special, added, padding, rows without a token).

Cost of a step: one backward pass and ``batch`` forward passes, each over x, what follows it, and y:
keys and values of all that stands before x are computed once. Logits are made where y is predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.generation import continued
from unlearn.run import Run
from unlearn.tasks.base import Predictions, evaluating
from unlearn.tasks.causal_lm import CausalLM

AT_ONCE = 1 << 14  # tokens of one forward pass without gradients, those before x included
ROUNDS = 4  # times as many swaps as wanted are looked at, where some do not survive as text


@dataclass(frozen=True)
class Frame:
    """What stands around the free tokens.

    Attributes:
        task: of the model; it says how text becomes tokens.
        before: text in front of them; a beginning-of-sequence token comes first as in every
            record of the task.
        after: text behind them, in front of the target.
        chat: whether ``before`` and ``after`` are the chat template around what a user says.
    """

    task: CausalLM
    before: str = ""
    after: str = ""
    chat: bool = False

    @staticmethod
    def template(task: CausalLM) -> Frame:
        """The chat template's own: the free tokens are what a user says.

        Raises:
            BadInput: the template does not show what the user said, or shows it twice.
        """
        parts = task.texts({"question": "\ue000", "answer": "-"})[0].split("\ue000")
        if len(parts) != 2:
            raise BadInput("the chat template does not show a question exactly once")
        return Frame(task, parts[0], parts[1], chat=True)

    @cached_property
    def first(self) -> list[int]:
        """Tokens before the free ones."""
        begin = self.task.tokenizer.bos_token_id
        return self._ahead if self.chat or begin is None else [begin, *self._ahead]

    @cached_property
    def _ahead(self) -> list[int]:
        # a space at the end of the text belongs to the first free token, as in most tokenizers
        text = self.before.rstrip(" ")
        return self._tokens([text])[0] if text else []

    @cached_property
    def last(self) -> list[int]:
        """Tokens between the free ones and the target."""
        return self._tokens([self.after])[0] if self.after else []

    def asked(self, free: Sequence[int]) -> list[int] | None:
        """The prompt as the task encodes it from text; None where its tokens become others."""
        lead, (text,) = self._lead(), self._texts([list(free)])
        if not text.startswith(lead):
            return None
        words = text[len(lead) :]
        row = (
            {"question": words, "answer": "-"}
            if self.chat
            else {"prompt": f"{self.before}{words}{self.after}", "completion": "-"}
        )
        ids: list[int] = self.task.encode(row)["prompt"].tolist()
        return ids if ids == [*self.first, *free, *self.last] else None

    def hold(self, free: Tensor) -> Tensor:
        """Whether prompts survive the way to text and back.

        Args:
            free: tokens, shape (b, n).

        Returns:
            Shape (b,). Where a template is, words that begin or end with white space do not: many
            templates strip it.
        """
        lead, begin = self._lead(), self.task.tokenizer.bos_token_id
        marker = [] if self.chat or begin is None else [begin]
        texts = self._texts(free.tolist())
        again = self._tokens([f"{self.before.rstrip(' ')}{text}{self.after}" for text in texts])
        first, last = self.first, self.last
        return torch.tensor(
            [
                text.startswith(lead)
                and marker + ids == [*first, *row, *last]
                and not (self.chat and text[len(lead) :] != text[len(lead) :].strip())
                for text, ids, row in zip(texts, again, free.tolist(), strict=True)
            ],
            dtype=torch.bool,
        )

    def inside(self, prompt: Sequence[int]) -> list[int]:
        """The free tokens of a whole prompt; none where it is not in this frame."""
        first, last = self.first, self.last
        free = list(prompt[len(first) : len(prompt) - len(last)])
        return free if free and self.asked(free) == list(prompt) else []

    def _lead(self) -> str:
        return self.before[len(self.before.rstrip(" ")) :]

    def _texts(self, rows: list[list[int]]) -> list[str]:
        """What the tokens spell behind ``before``: some tokenizers drop the first space of all."""
        ahead = self._ahead[-1:]
        head, *texts = self.task.tokenizer.batch_decode(
            [ahead, *([*ahead, *row] for row in rows)],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return [text.removeprefix(head) for text in texts]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.task.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def allowed_tokens(model: nn.Module, task: CausalLM) -> Tensor:
    """Which rows of the embedding are tokens that a text can have.

    Not so: special and added tokens, rows beyond the tokenizer's vocabulary (padding up to a
    round number), and tokens that are no valid text by themselves.

    Returns:
        Shape (rows of the embedding,).
    """
    tokenizer = task.tokenizer
    rows = len(_table(model).weight)
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = {i for i in tokenizer.get_vocab().values() if i < rows} - added
    ids = torch.tensor(sorted(known), dtype=torch.long)
    texts = tokenizer.batch_decode(ids[:, None].tolist(), clean_up_tokenization_spaces=False)
    good = torch.tensor([bool(text) and "\ufffd" not in text for text in texts], dtype=torch.bool)
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[ids[good]] = True
    return allowed


class Goal:
    """A target, and the model that is to say it: what all steps of a search share.

    Args:
        model: on ``run.device``; left as it is.
        frame: what stands around the free tokens.
        target: what the model is to say, at least one token.
        run: the device.
        allowed: from :func:`allowed_tokens`; computed where it is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        frame: Frame,
        target: Sequence[int],
        run: Run,
        allowed: Tensor | None = None,
    ) -> None:
        if not target:
            raise BadInput("a search needs a target of at least one token")
        self.model, self.frame, self.run = model, frame, run
        self.target = torch.tensor(list(target))
        self.first, self.last = (
            torch.tensor(t, dtype=torch.long) for t in (frame.first, frame.last)
        )
        allowed = allowed_tokens(model, frame.task) if allowed is None else allowed
        self.tokens = allowed.nonzero()[:, 0]
        self._barred = (~allowed).to(run.device)
        self.read: Any = None  # the cache of ``first``; None: it is read again each time
        if len(self.first):
            self._read_first()

    def losses(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """What prompts achieve.

        Args:
            free: their free tokens, shape (b, n).

        Returns:
            L(x) in nats and whether the target is reached, both of shape (b,), in main memory.
        """
        width = len(self.first) + free.shape[1] + len(self.last) + len(self.target)
        with evaluating(self.model):
            parts = torch.split(free, max(1, AT_ONCE // width))
            signed = torch.cat([self._said(some).each(_signed_nll) for some in parts]).cpu()
        return signed.abs().sum(1), (signed >= 0).all(1)

    def gradient(self, free: Tensor) -> Tensor:
        """dL/dx_i . E_e for every free token i and every row e of the embedding, shape (n, rows).

        The same as the gradient with respect to one-hot vectors, without a product of that width.
        """
        table = _table(self.model)
        begin = 0 if self.read is not None else len(self.first)
        shift = table.weight.new_zeros((len(free), table.weight.shape[1]), requires_grad=True)

        def shifted(_: nn.Module, __: Any, found: Tensor) -> Tensor:
            behind = found.shape[1] - begin - len(free)
            return found + F.pad(shift, (0, 0, begin, behind))

        handle = table.register_forward_hook(shifted)
        try:
            with evaluating(self.model), torch.enable_grad():
                loss = self._said(free[None]).nll().sum()
                (gradient,) = torch.autograd.grad(loss, [shift])
        finally:
            handle.remove()
        found: Tensor = gradient @ table.weight.detach().T
        return found

    def start(self, n: int, draw: torch.Generator, free: Tensor) -> Tensor:
        """``free`` grown by random allowed tokens to a prompt that survives as text, shape (n,).

        Raises:
            Unsupported: no such tokens are found.
        """
        while len(free) < n:
            order = self.tokens[torch.randperm(len(self.tokens), generator=draw)]
            for chosen in torch.split(order, 64):
                longer = torch.cat((free.expand(len(chosen), -1), chosen[:, None]), 1)
                good = longer[self.frame.hold(longer)]
                if len(good):
                    free = good[0]
                    break
            else:
                raise Unsupported(
                    "no tokens stay the same when they are turned into text and back "
                    "behind the text that stands before them: give other text, or none"
                )
        return free

    def swaps(self, free: Tensor, topk: int, batch: int, draw: torch.Generator) -> Tensor:
        """Prompts that differ from ``free`` in one token the gradient recommends there.

        Args:
            free: shape (n,).
            topk: tokens recommended for each place.
            batch: prompts wanted.
            draw: of places and tokens.

        Returns:
            Shape (b, n), b at most ``batch``; fewer where few survive as text.
        """
        slope = self.gradient(free).masked_fill(self._barred, torch.inf)
        slope.scatter_(1, free[:, None].to(slope.device), torch.inf)
        own = int((~self._barred).sum()) - 1
        recommended = slope.topk(min(topk, own), largest=False).indices.cpu()
        order = torch.randperm(recommended.numel(), generator=draw)[: ROUNDS * batch]
        kept = free.new_zeros((0, len(free)))
        for some in torch.split(order, batch):
            rows = free.repeat(len(some), 1)
            places = some // recommended.shape[1]
            rows[torch.arange(len(some)), places] = recommended.flatten()[some]
            kept = torch.cat((kept, rows[self.frame.hold(rows)]))
            if len(kept) >= batch:
                break
        return kept[:batch]

    def cuts(self, free: Tensor) -> Tensor:
        """Prompts with one token less that survive as text, shape (b, n - 1)."""
        n = len(free)
        rows = free.repeat(n, 1)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
        return rows[self.frame.hold(rows)]

    def says(self, free: Sequence[int]) -> bool:
        """Whether the model, asked with the text of this prompt, greedily says the target."""
        prompt = self.frame.asked(free)
        if prompt is None:
            return False
        task, target = self.frame.task, self.target.tolist()
        with evaluating(self.model):
            (said,) = continued(
                self.model, task, [torch.tensor(prompt)], len(target), self.run, do_sample=False
            )
        return said == target

    def _said(self, free: Tensor) -> Predictions:
        """What is predicted where the target is to stand, after each of some prompts."""
        size, y = len(free), self.target
        parts = [self.last, y[:-1]] if self.read is not None else [self.last, y[:-1], self.first]
        last, told, *first = (part.expand(size, -1) for part in parts)
        ids = torch.cat((*first, free, last, told), 1)
        positions = torch.arange(ids.shape[1] - len(y), ids.shape[1]).expand(size, -1)
        batch = {"input_ids": ids, "positions": positions, "labels": y.expand(size, -1)}
        batch = {key: value.to(self.run.device) for key, value in batch.items()}
        with _having_read(self.model, self.read):
            return self.frame.task.predictions(self.model, batch)

    def _read_first(self) -> None:
        """Read what stands before the free tokens, if the model goes on from there as it should."""
        probe = self.tokens[:2].repeat(2, 1)
        plain, _ = self.losses(probe)
        with evaluating(self.model):
            ids = self.first[None].to(self.run.device)
            self.read = getattr(self.model(input_ids=ids, use_cache=True), "past_key_values", None)
        if not hasattr(self.read, "reorder_cache"):
            self.read = None
            return
        cached, _ = self.losses(probe)
        precision = torch.finfo(_table(self.model).weight.dtype).eps ** 0.5
        if not torch.allclose(cached, plain, rtol=precision):
            self.read = None


def _table(model: nn.Module) -> nn.Embedding:
    table: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return table


def _signed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label), negated where the argmax is another: p is then at most 1/2, and this not 0."""
    nll = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(logits.argmax(-1) == labels, nll, -nll)


@contextmanager
def _having_read(model: nn.Module, cache: Any) -> Iterator[None]:
    """Whatever the model is given in this block, it has read the tokens of a cache before."""
    if cache is None:
        yield
        return

    def go_on(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["input_ids"]
        own = copy.deepcopy(cache)
        own.reorder_cache(ids.new_zeros(len(ids)))
        return args, kwargs | {"past_key_values": own, "use_cache": True}

    handle = model.register_forward_pre_hook(go_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

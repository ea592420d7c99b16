"""Keeps the multi-token prediction modules in step with a policy that reinforcement learning moves.

They draft for the model they were trained with; when only that model moves on, the drafts get worse. `Drafts` trains
them as pre-training does, by the cross-entropy of the token after the next, on the answers the policy is trained on and
on the hidden states of that very pass: one more block and head, no pass of its own. Once in a rollout is enough (rl.py
asks for it in the first update, whose hidden states are those of the policy that gave the answers), so it costs little.
Gradients stop before trunk, embedding and head, and the modules' gradients are clipped apart: the policy is the same
bit for bit with and without. `acceptance` says how well they draft. Left out: the balance of their experts, which
stays as pre-trained, like the trunk's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sputnik.engine.params import SamplingParams
from sputnik.engine.sampler import Generation, autocast
from sputnik.eval.harness import Generates
from sputnik.model.head import head_loss
from sputnik.model.transformer import Transformer
from sputnik.train.optim import clip_gradients

ANSWERS, AT_ONCE = 64, 16
"""Answers that the acceptance is measured on, and how many of them go through the model together."""


class Listener:
    """A sampler that remembers the first answers it gave."""

    def __init__(self, sampler: Generates) -> None:
        self.sampler = sampler
        self.heard: list[Generation] = []

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Generation]]:
        drawn = self.sampler.generate(prompts, params, n=n)
        self.heard = [*self.heard, *(each for group in drawn for each in group)][:ANSWERS]
        return drawn


@torch.no_grad()
def acceptance(model: Transformer, answers: Sequence[Generation], precision: str) -> list[float]:
    """Per depth the share of answer tokens that are the module's first guess, all before them being known. The first
    is what an engine that always guesses one token accepts (engine/speculate.py); it guesses further ones from its own
    guesses, so of those it accepts fewer."""
    right, seen = [0] * len(model.mtp), [0] * len(model.mtp)
    for start in range(0, len(answers), AT_ONCE):
        part = answers[start : start + AT_ONCE]
        ids, rows, columns = _places(part)
        with autocast(precision):
            residual = model.trunk(ids).residual
            for depth, hidden in enumerate(model.mtp_hidden(residual, ids).hidden, start=1):
                known = columns > depth
                guesses = model.head(hidden[rows[known], columns[known] - 1 - depth]).argmax(dim=-1)
                right[depth - 1] += int((guesses == ids[rows[known], columns[known]]).sum())
                seen[depth - 1] += int(known.sum())
    return [hits / max(1, tokens) for hits, tokens in zip(right, seen, strict=True)]


def _places(answers: Sequence[Generation]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids (n, T), and row and column of every answer token."""
    texts = [torch.tensor([*each.prompt, *each.ids]) for each in answers]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    place = torch.arange(ids.shape[1])
    starts = torch.tensor([len(each.prompt) for each in answers])[:, None]
    ends = torch.tensor([len(text) for text in texts])[:, None]
    rows, columns = ((place >= starts) & (place < ends)).nonzero(as_tuple=True)
    return ids, rows, columns


class Drafts:
    """Call `add` for each micro-batch and then `finish`, which leaves the gradients for the optimiser."""

    def __init__(self, model: Transformer, precision: str, max_grad_norm: float) -> None:
        self.model = model
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self._weights = list(model.mtp.parameters())
        self._gradients: list[Tensor] = []
        self._loss, self._tokens = 0.0, 0

    def add(self, ids: Tensor, residual: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> None:
        """Gradients of a micro-batch: ids (n, T), `Trunk.residual` of them, and the M answer tokens `targets` with the
        `rows` and `columns` that predict them one step ahead."""
        head = self.model.lm_head.weight.detach()
        loss, tokens = torch.zeros(()), 0
        with autocast(self.precision):
            for depth, hidden in enumerate(self.model.mtp_hidden(residual.detach(), ids).hidden, start=1):
                seen = columns >= depth  # a prompt shorter than the depth has no hidden state to begin from
                loss = loss + head_loss(hidden[rows[seen], columns[seen] - depth], head, targets[seen])
                tokens += int(seen.sum())
        found = torch.autograd.grad(loss, self._weights, allow_unused=True, materialize_grads=True) if tokens else ()
        if self._gradients:
            torch._foreach_add_(self._gradients, found)
        else:
            self._gradients = list(found)
        self._loss += float(loss.detach())
        self._tokens += tokens

    def finish(self) -> float:
        """Set the clipped gradient of the mean over all tokens added, none at all if it is not finite; returns that
        mean, 0 without tokens."""
        loss = self._loss / max(1, self._tokens)
        for weight, gradient in zip(self._weights, self._gradients, strict=False):
            weight.grad = gradient / self._tokens
        if not math.isfinite(clip_gradients(self.model.mtp, self.max_grad_norm)):
            self.model.mtp.zero_grad(set_to_none=True)
        self._gradients, self._loss, self._tokens = [], 0.0, 0
        return loss

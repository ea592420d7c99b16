"""How the sequences of a micro-batch lie in the model's forward pass.

Packed: one long row without padding, each prompt once for all the answers drawn from it, for the attention kernel that
knows of segments. Padded: the sequences as they are, for everything else. Both give the same hidden states; packed, a
group of 8 answers as long as their prompt is 44 % less work. n sequences of up to T tokens, N rows of hidden states.
A packed row is filled up to a multiple of `FULL` tokens by a segment that nobody reads: for every new number of rows a
CPU compiles its bf16 products anew, 0.3 ms each, and two rows hardly ever have as many tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FULL = 32


@dataclass(frozen=True)
class Layout:
    ids: Tensor
    """What the model reads: (1, N), or (n, T) where `segments` is None."""
    segments: Tensor | None
    """(S, 4), see `sputnik/model/kernels/fused.py`."""
    place: Tensor
    """(n, T) row of the flattened hidden states that belongs to a position; row 0 where there is none: in padding, and
    for a packed sequence's last token, which predicts nothing."""

    def arranged(self, routes: Tensor, lengths: Tensor) -> Tensor:
        """Experts (layers, n, T, K) as the model reads them, beside `ids`; a sequence's last token is left free."""
        known = torch.arange(routes.shape[2]) < lengths[:, None] - 1
        out = routes.new_full((len(routes), self.ids.numel(), routes.shape[3]), -1)
        out[:, self.place[known]] = routes[:, known]
        return out.unflatten(1, self.ids.shape)


def padded(ids: Tensor) -> Layout:
    return Layout(ids, None, torch.arange(ids.numel()).view_as(ids))


def packed(ids: Tensor, lengths: Tensor, prompts: Tensor) -> Layout:
    """ids (n, T) of which the first `lengths` are valid, the first `prompts` of those being the prompt."""
    pieces: list[Tensor] = []
    segments: list[tuple[int, int, int, int]] = []
    place = torch.zeros_like(ids)
    at: dict[tuple[int, ...], int] = {}
    end = 0
    for row, (length, prompt) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        key = tuple(ids[row, :prompt].tolist())
        if key not in at:
            at[key] = end
            segments.append((end, prompt, 0, 0))
            pieces.append(ids[row, :prompt])
            end += prompt
        start, answer = at[key], length - 1 - prompt
        place[row, :prompt] = torch.arange(start, start + prompt)
        if answer > 0:
            segments.append((end, answer, start, prompt))
            pieces.append(ids[row, prompt : length - 1])
            place[row, prompt : length - 1] = torch.arange(end, end + answer)
            end += answer
    if fill := -end % FULL:
        segments.append((end, fill, 0, 0))
        pieces.append(ids.new_zeros(fill))
    return Layout(torch.cat(pieces)[None], torch.tensor(segments), place)

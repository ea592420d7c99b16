"""A model's weights before they are a model: read key by key from wherever they lie, built into one, or written on.

    weights = assemble(...)              # the readers: hf_in.py, gguf_in.py
    weights = weights_of(model)          # a model in memory
    weights.read("lm_head.weight"); build(weights, torch.bfloat16)

Keys are those of `Transformer.state_dict`. Nothing is read before it is asked for, so a model that is only
converted never lies in memory whole. Every tensor is accounted for by name and shape before that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sputnik.errors import CheckpointError
from sputnik.model.config import ModelConfig
from sputnik.model.hf_names import EMBEDDING, HEAD, Piece, Shape, describe_mismatch
from sputnik.model.memory import require_memory
from sputnik.model.transformer import Transformer

BALANCE_BIAS = "e_score_correction_bias"  # kept in fp32: its steps of 0.001 vanish in bf16


class Stored(Protocol):
    """One tensor on disk, known by its header."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype:
        """A type that holds its values exactly."""

    @property
    def quantised(self) -> bool:
        """It takes fewer bytes than its type says."""

    def copy_into(self, place: Tensor) -> None:
        """Read it into a view of as many elements, cast to the view's type."""


@dataclass(frozen=True)
class Weights:
    """`like` has every tensor's shape and exact type (its memory is not to be used); `read(key, dtype)` the values.
    `quantised`: some are stored in fewer bytes than their type has."""

    where: str
    config: ModelConfig
    like: Mapping[str, Tensor]
    read: Callable[[str, torch.dtype], Tensor]
    quantised: bool = False

    def nbytes(self, dtype: torch.dtype | None) -> int:
        """Of the model in `dtype`; None: of each tensor in its own type."""
        kinds = {key: stored_type(key, dtype or tensor.dtype) for key, tensor in self.like.items()}
        return sum(tensor.numel() * kinds[key].itemsize for key, tensor in self.like.items())


def stored_type(key: str, dtype: torch.dtype) -> torch.dtype:
    """The type a tensor has in a model of type `dtype`."""
    return torch.float32 if key.endswith(BALANCE_BIAS) else dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_of(model: Transformer) -> Weights:
    """The weights of a model in memory; `read` copies only to change the type."""
    state = unique_state(model)
    return Weights("model", model.config, state, lambda key, dtype: state[key].detach().to("cpu", dtype))


def unique_state(model: Transformer) -> dict[str, Tensor]:
    """The state dict without the second name of a tied head."""
    return {k: t for k, t in model.state_dict().items() if not (k == HEAD and model.config.tie_word_embeddings)}


def assemble(
    where: str,
    config: ModelConfig,
    stored: Mapping[str, Stored],
    pieces_of: Callable[[str, Shape], list[Piece]],
    copies: Mapping[str, str],
    against: str,
    fix: str,
) -> Weights:
    """Weights made of the `stored` tensors. `copies` are names that may repeat another tensor: optional, and checked
    against the key they repeat when that is read, because a copy that differs would be silently lost."""
    state = unique_state(without_memory(config))
    pieces = {key: pieces_of(key, tuple(tensor.shape)) for key, tensor in state.items()}
    wanted = {piece.name: piece.shape for group in pieces.values() for piece in group}
    problem = describe_mismatch(wanted, {name: tensor.shape for name, tensor in stored.items()}, copies)
    if problem:
        raise CheckpointError(f"{where}: weights do not fit {against}: {problem}; {fix}")
    exact = {key: reduce(torch.promote_types, [stored[p.name].dtype for p in group]) for key, group in pieces.items()}
    like = {
        key: torch.empty(tensor.shape, dtype=stored_type(key, exact[key]), device="meta")
        for key, tensor in state.items()
    }

    def read(key: str, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(like[key].shape, dtype=dtype)
        for piece in pieces[key]:
            stored[piece.name].copy_into(piece.place(tensor))
        for name in (name for name, original in copies.items() if original == key and name in stored):
            _check_copy(where, name, key, tensor, stored[name])
        return tensor

    return Weights(where, config, like, read, any(tensor.quantised for tensor in stored.values()))


def _check_copy(where: str, name: str, key: str, tensor: Tensor, copy: Stored) -> None:
    if copy.shape == tuple(tensor.shape):
        other = torch.empty_like(tensor)
        copy.copy_into(other)
        if torch.equal(other, tensor):
            return
    raise CheckpointError(f"{where}: {name} differs from {key}, but they are shared; delete one of them")


def build(weights: Weights, dtype: torch.dtype | None) -> Transformer:
    """The model in eval mode on the CPU, every tensor in `dtype` (None: in its own) but the routing biases (fp32).

    The module is made without memory and takes the tensors over: the peak is one copy of the weights.
    """
    name = dtype_name(dtype or weights.like[EMBEDDING].dtype)
    require_memory(weights.where, weights.nbytes(dtype), name, weights.nbytes(torch.bfloat16))
    model = without_memory(weights.config)
    parameters = dict(model.named_parameters())
    state = {key: weights.read(key, stored_type(key, dtype or like.dtype)) for key, like in weights.like.items()}
    state = {key: nn.Parameter(t) if key in parameters else t for key, t in state.items()}
    if HEAD in model.state_dict() and HEAD not in state:
        state[HEAD] = state[EMBEDDING]  # the same Parameter object, so the tie survives
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


class _NoInitialValues(TorchFunctionMode):
    """Makes the initialisers of nn.Linear and nn.Embedding do nothing: without memory they only cost the seconds that
    torch takes to load its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def without_memory(config: ModelConfig) -> Transformer:
    """A model of shapes alone, on the meta device."""
    with torch.device("meta"), _NoInitialValues():
        return Transformer(config)

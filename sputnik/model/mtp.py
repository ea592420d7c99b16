"""Multi-token prediction (report section 2.2): after the main model, a chain of one-block modules, each looking one
token further ahead. Embedding and head are the main model's. Drafting with these modules is left to the engine.
"""

import torch
from torch import Tensor, nn

from sputnik.model.attention import Pass
from sputnik.model.config import ModelConfig
from sputnik.model.moe import Route
from sputnik.model.precision import Linear, RMSNorm


class MTPModule(nn.Module):
    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps)
        self.hnorm = RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.block = block
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, now: Pass, token_mask: Tensor | None
    ) -> tuple[Tensor, Route | None]:
        """Embedding of the token ahead and the previous depth's normed hidden state, both (B, T, D)."""
        # Embedding first: the order of the released weights; the report's equation 21 has it the other way round.
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1).to(now.dtype)
        x, route = self.block(self.eh_proj(joined).to(embedded.dtype), now, token_mask)
        return self.norm(x), route

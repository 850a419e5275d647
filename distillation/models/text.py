"""Text tower of the student: MobileCLIP-S1's transformer by open_clip, all tokens kept.

Letters: B prompts, L tokens of a prompt (77), C channels of the transformers (256).
Source: MobileCLIP, Vasu et al. 2024 (arXiv:2311.17049).
"""

from __future__ import annotations

from torch import Tensor, nn


class TextEncoder(nn.Module):
    """Token ids `(B, L)` -> `(B, L, C)`: the whole sequence after the last norm, projected.

    Attention inside the tower is neither causal nor masked, as MobileCLIP was trained; whoever reads the result has to
    ignore the padded places.
    """

    def __init__(self, dim: int, width: int, heads: int, layers: int, context_length: int, vocab_size: int):
        super().__init__()
        from open_clip.transformer import TextTransformer  # its package takes seconds to import

        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=None,  # CLIP's own projection, of a pooled token, has no use here
            no_causal_mask=True,
        )
        self.projection = nn.Linear(width, dim)

    def forward(self, ids: Tensor) -> Tensor:
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding
        return self.projection(tower.ln_final(tower.transformer(x)))

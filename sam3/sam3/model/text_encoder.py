"""The text encoder of SAM3: a causal CLIP-style transformer whose tokens are all kept.

Letters: T phrases, L = 32 tokens of a phrase, W channels of the transformer, C channels of the detector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam3.model.attention import Attention
from sam3.model.tokenizer import PAD_ID, SimpleTokenizer


class VETextEncoder(nn.Module):
    """Phrases -> one vector per token, as wide as the detector (`resizer`)."""

    def __init__(
        self,
        tokenizer: SimpleTokenizer,
        dim: int,
        width: int,
        heads: int,
        layers: int,
        mlp_dim: int,
        projection_dim: int = 512,
        context_length: int = 32,
        vocab_size: int = 49408,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.encoder = TextTransformer(width, heads, layers, mlp_dim, projection_dim, context_length, vocab_size)
        self.resizer = nn.Linear(width, dim)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """T phrases -> padding mask (T, L) bool, True = padding; features (L, T, C); embeddings (L, T, W), without
        positions."""
        ids = self.tokenizer(texts, self.context_length).to(self.resizer.weight.device)
        tokens, embeds = self.encoder(ids)
        return ids == PAD_ID, self.resizer(tokens).transpose(0, 1), embeds.transpose(0, 1)


class TextTransformer(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        mlp_dim: int,
        projection_dim: int,
        context_length: int,
        vocab_size: int,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ResidualBlock(width, heads, mlp_dim) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        # In the file, and of no effect: SAM3 throws the pooled branch away.
        self.text_projection = nn.Parameter(torch.empty(width, projection_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (T, L) -> tokens (T, L, W) and their raw embeddings (T, L, W)."""
        embeds = self.token_embedding(ids)
        x = embeds + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x), embeds


class ResidualBlock(nn.Module):
    """Pre-norm block with causal attention; padding is not masked here."""

    def __init__(self, width: int, heads: int, mlp_dim: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(width, mlp_dim)
        self.mlp.c_proj = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, causal=True)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))

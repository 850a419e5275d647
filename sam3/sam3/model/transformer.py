"""The pair of fusion encoder and decoder, under the checkpoint's name for it."""

from __future__ import annotations

from torch import nn


class TransformerWrapper(nn.Module):
    """Holds `encoder` and `decoder`; `Sam3Image` calls each of them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

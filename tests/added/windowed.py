"""Attention to the last tokens alone (Beltagy et al. 2020, arXiv 2004.05150, section 3.1)."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

from sparse_lm import config as configs
from sparse_lm.models.attention import FullAttention
from sparse_lm.models.counting import Part, Setting


class WindowedAttention(FullAttention):
    """Each token sees itself and the window - 1 tokens before it.

    window: tokens.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, window: int = 4):
        super().__init__(model, rngs)
        self.window = window

    def sees(self, query, key):
        return super().sees(query, key) & (query - key < self.window)

    def flops(self, setting: Setting) -> Iterator[Part]:
        seen = min(1, self.window / (setting.length / 2))
        for part in super().flops(setting):
            yield dataclasses.replace(part, model=seen * part.model) if part.name == "attention scores" else part

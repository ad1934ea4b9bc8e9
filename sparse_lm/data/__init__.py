"""Text to batches: `prepare` makes a corpus ready once; its batches are a pure function of (seed, number)."""

from sparse_lm.data.corpus import Corpus, prepare
from sparse_lm.data.pipeline import Batches, Prefetch, device_batch
from sparse_lm.data.tokenizer import Tokenizer

__all__ = ["Batches", "Corpus", "Prefetch", "Tokenizer", "device_batch", "prepare"]

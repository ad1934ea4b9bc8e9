"""From text to batches: `prepare` tokenizes and packs a corpus once; batch i is a pure function of (seed, i)."""

from sparse_lm.data.corpus import Corpus, prepare
from sparse_lm.data.pipeline import Batches, Prefetch, device_batch
from sparse_lm.data.tokenizer import Tokenizer

__all__ = ["Batches", "Corpus", "Prefetch", "Tokenizer", "device_batch", "prepare"]

"""Flax modules: attention, feed-forward, layers, decoder."""

from sparse_lm.models.decoder import Functional as Functional
from sparse_lm.models.decoder import Output as Output
from sparse_lm.models.decoder import functional as functional
from sparse_lm.models.layer import Context as Context

"""Flax modules: attention, feed-forward, layers, decoder.

The letters of axes, everywhere: B rows of a batch, L tokens of a row, T places of a cache, G routing groups, S tokens
of a group, E experts, C places per expert (the capacity), K experts per token, D model width, F hidden width, H heads,
N heads with keys and values of their own, h width of a head, V vocabulary, R routed layers, n repeats of a period.
"""

from sparse_lm.models.context import Context as Context
from sparse_lm.models.decoder import Output as Output
from sparse_lm.models.functional import Functional as Functional
from sparse_lm.models.functional import functional as functional

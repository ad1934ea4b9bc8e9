"""Grouped and block-sparse matrix products, and attention and dense products whose gradients are fast on a CPU."""

from sparse_lm.kernels.grouped import choose_alignment as choose_alignment
from sparse_lm.kernels.grouped import grouped_matmul as grouped_matmul
from sparse_lm.kernels.grouped import grouped_outer as grouped_outer

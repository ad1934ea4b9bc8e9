"""Products and their gradients: those that one dense product does not do, and those that a CPU does slowly."""

from sparse_lm.kernels.grouped import choose_alignment as choose_alignment
from sparse_lm.kernels.grouped import grouped_matmul as grouped_matmul
from sparse_lm.kernels.grouped import grouped_outer as grouped_outer

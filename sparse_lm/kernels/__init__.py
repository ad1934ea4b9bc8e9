"""Products that one dense matrix multiplication does not do, each with a plain reference and its gradients."""

from sparse_lm.kernels.grouped import alignment as alignment
from sparse_lm.kernels.grouped import grouped_matmul as grouped_matmul
from sparse_lm.kernels.grouped import grouped_outer as grouped_outer

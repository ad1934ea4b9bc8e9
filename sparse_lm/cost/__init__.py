"""Counts parameters, FLOPs and bytes of a config from shapes alone; allocates nothing."""

from sparse_lm.cost.flops import count_flops as count_flops
from sparse_lm.cost.flops import optimizer_flops as optimizer_flops
from sparse_lm.cost.flops import step_flops as step_flops
from sparse_lm.cost.info import info_table as info_table
from sparse_lm.cost.memory import compute_memory as compute_memory
from sparse_lm.cost.parameters import count_parameters as count_parameters
from sparse_lm.cost.twin import dense_twin as dense_twin

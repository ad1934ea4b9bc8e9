"""What a config costs: parameters, FLOPs, bytes. Of shapes alone; nothing is allocated."""

from sparse_lm.cost.flops import flops as flops
from sparse_lm.cost.flops import optimizer_flops as optimizer_flops
from sparse_lm.cost.flops import step_flops as step_flops
from sparse_lm.cost.info import info_table as info_table
from sparse_lm.cost.memory import memory as memory
from sparse_lm.cost.parameters import parameters as parameters
from sparse_lm.cost.twin import twin as twin

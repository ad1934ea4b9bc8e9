"""Profiles training steps: `sparse-lm profile`."""

from sparse_lm.profile.measure import Profile as Profile
from sparse_lm.profile.measure import profile_steps as profile_steps
from sparse_lm.profile.table import profile_table as profile_table

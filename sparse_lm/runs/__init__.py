"""The life of a run: trained in a folder, continued, and opened again."""

from sparse_lm.runs.load import Loaded as Loaded
from sparse_lm.runs.load import evaluate as evaluate
from sparse_lm.runs.load import load as load
from sparse_lm.runs.train import train as train

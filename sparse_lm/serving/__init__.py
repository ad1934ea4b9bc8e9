"""Generates text with a trained model."""

from sparse_lm.serving.generate import Generator as Generator
from sparse_lm.serving.sampling import Sampling as Sampling
from sparse_lm.serving.text import generate_folder as generate_folder
from sparse_lm.serving.text import stream_text as stream_text
from sparse_lm.serving.text import warn_beyond_training as warn_beyond_training

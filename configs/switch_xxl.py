"""Switch-XXL as a decoder-only language model (Fedus et al. 2021, arXiv 2101.03961, table 9).

Shows:    a mixture of experts at the FLOPs per token of T5-XXL.
Command:  sparse-lm train --config=configs/switch_xxl.py --workdir=gs://BUCKET/switch_xxl
Hardware: TPU v5p 4x8x8 (256 chips), 4 experts of each layer on every 8 chips, which share their hidden units.
          Parameters, gradients and optimizer take 20 GB of a chip's 95 GB.
Expected: 393 B parameters (the paper prints 395 B), 9.5 B active; 83.5 GFLOP executed per token. Not trained yet; by
          arithmetic, at 40 % of peak, 500,000 steps take 11 days.

The paper's table prints 64 experts, with which its shape has 201 B parameters; the printed 395 B are those of 128
experts, which the released checkpoint has, and this config.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.

What is not set here is Switch-Base's; switch_base.py has to lie beside this file.
"""

from pathlib import Path

from sparse_lm.command_line import load_config
from sparse_lm.config import Config, Mesh


def get_config() -> Config:
    config = load_config(str(Path(__file__).with_name("switch_base.py")))
    config.name = "switch_xxl"
    model = config.model
    model.width, model.heads, model.ffn_width = 4096, 64, 10_240
    model.layers = 48
    model.remat = "full"
    config.mesh = Mesh(expert=32, tensor=8)
    config.training.steps = 500_000
    return config

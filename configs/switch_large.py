"""Switch-Large as a decoder-only language model (Fedus et al. 2021, arXiv 2101.03961, table 9).

Shows:    128 experts in every second layer, at the size of T5-Large.
Command:  sparse-lm train --config=configs/switch_large.py --workdir=gs://BUCKET/switch_large
Hardware: TPU v5p 4x4x4 (64 chips), 2 experts of each layer on a chip. Parameters, gradients and optimizer take 8.0 GB
          of a chip's 95 GB.
Expected: 27.1 B parameters (the paper prints 26 B, which its own shape does not give), 686 M active; 6.2 GFLOP
          executed per token. Not trained yet; by arithmetic, at 40 % of peak, 500,000 steps take 3.2 days.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.

What is not set here is Switch-Base's; switch_base.py has to lie beside this file.
"""

from pathlib import Path

from sparse_lm.command_line import load_config
from sparse_lm.config import Config


def get_config() -> Config:
    config = load_config(str(Path(__file__).with_name("switch_base.py")))
    config.name = "switch_large"
    model = config.model
    model.width, model.heads, model.ffn_width = 1024, 16, 2816
    model.layers = 48
    model.remat = "full"
    config.mesh.expert = 64
    config.training.steps = 500_000
    return config

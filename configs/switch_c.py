"""Switch-C, 1.6 trillion parameters, as a decoder-only language model (Fedus et al. 2021, arXiv 2101.03961, table 9).

Shows:    2,048 experts in every layer: as many parameters as experts alone can add to a model of few FLOPs.
Command:  sparse-lm train --config=configs/switch_c.py --workdir=gs://BUCKET/switch_c
Hardware: TPU v5p 8x8x8 (512 chips), 8 experts of each layer on every 2 chips, which share their hidden units.
          Parameters, gradients and optimizer take 29 GB of a chip's 95 GB.
Expected: 1,571 B parameters (the paper prints 1571 B), 1.5 B active; 20 GFLOP executed per token. Not trained yet; by
          arithmetic, at 40 % of peak, 500,000 steps take 1.3 days.

An even share of a row's 512 tokens is a quarter of a token per expert, and a place can't be divided: groups are of
4,096 tokens, an even share is 2, and a capacity factor of 1.25 gives 3 places. The feed-forward layers are not gated.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.

What is not set here is Switch-Base's; switch_base.py has to lie beside this file.
"""

from pathlib import Path

from sparse_lm.command_line import load_config
from sparse_lm.config import Config, Mesh, Training


def get_config() -> Config:
    config = load_config(str(Path(__file__).with_name("switch_base.py")))
    config.name = "switch_c"
    model = config.model
    model.width, model.heads, model.ffn_width = 2080, 32, 6144
    model.layers = 30
    model.activation = "gelu"
    model.remat = "full"
    model.experts, model.expert_every, model.group_size = 2048, 1, 4096
    config.mesh = Mesh(expert=256, tensor=2)
    config.training = Training(steps=500_000, batch=2048)
    return config

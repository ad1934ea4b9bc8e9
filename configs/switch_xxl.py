"""Switch-XXL as a decoder-only language model (Fedus et al. 2021, arXiv 2101.03961, table 9).

Shows:    a mixture of experts at the FLOPs per token of T5-XXL.
Command:  sparse-lm train --config=configs/switch_xxl.py --workdir=gs://BUCKET/switch_xxl
Hardware: TPU v5p 4x8x8 (256 chips), 4 experts of each layer on every 8 chips, which share their hidden units.
          Parameters, gradients and optimizer take 20 GB of a chip's 95 GB.
Expected: 393 B parameters (the paper prints 395 B), 9.5 B active; 84 GFLOP executed per token. Not trained yet; by
          arithmetic, at 40 % of peak, 500,000 steps take 11 days.

The paper's table prints 64 experts, with which its shape has 201 B parameters; the printed 395 B are those of 128
experts, which the released checkpoint has, and this config.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.
"""

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="switch_xxl",
        model=Model(
            vocabulary=32_128,
            width=4096,
            layers=48,
            heads=64,
            head_width=64,
            ffn_width=10_240,
            activation="geglu",
            tied_embeddings=False,
            init_scale=0.1,
            dtype="bfloat16",
            remat="full",
            experts=128,
            expert_every=2,
            router=choice("switch", jitter=0.01, balance_loss=0.01, z_loss=0.0),
            executor="einsum",
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
        ),
        data=Data(sources=("tfds:c4/en",), length=512),
        mesh=Mesh(expert=32, tensor=8),
        # T5's, with a warm-up: relative updates, 1 / sqrt(step) from 10,000 on; updates are clipped, not gradients.
        optimizer=Optimizer(
            algorithm=choice("adafactor"),
            learning_rate=0.01,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule=choice("rsqrt"),
            warmup_steps=10_000,
        ),
        training=Training(steps=500_000, batch=2048, accumulation=4),
        evaluation=Evaluation(every=2_000, rows=2048),
        checkpoints=Checkpoints(every=1_000),
    )

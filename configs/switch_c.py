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
"""

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="switch_c",
        model=Model(
            vocabulary=32_128,
            width=2080,
            layers=30,
            heads=32,
            head_width=64,
            ffn_width=6144,
            activation="gelu",
            tied_embeddings=False,
            init_scale=0.1,
            dtype="bfloat16",
            remat="full",
            experts=2048,
            expert_every=1,
            router=choice("switch", jitter=0.01, balance_loss=0.01, z_loss=0.0),
            executor="einsum",
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
            group_size=4096,
        ),
        data=Data(sources=("tfds:c4/en",), length=512),
        mesh=Mesh(expert=256, tensor=2),
        # T5's, with a warm-up: relative updates, 1 / sqrt(step) from 10,000 on; updates are clipped, not gradients.
        optimizer=Optimizer(
            algorithm=choice("adafactor"),
            learning_rate=0.01,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule=choice("rsqrt"),
            warmup_steps=10_000,
        ),
        training=Training(steps=500_000, batch=2048),
        evaluation=Evaluation(every=2_000, rows=2048),
        checkpoints=Checkpoints(every=1_000),
    )

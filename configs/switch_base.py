"""Switch-Base as a decoder-only language model (Fedus et al. 2021, arXiv 2101.03961, table 9).

Shows:    128 experts in every second layer against a dense model of equal FLOPs per token: the paper's main
          comparison.
Command:  sparse-lm compare --config=configs/switch_base.py --workdir=gs://BUCKET/switch_base
Hardware: TPU v5p 2x2x4 (16 chips), 8 experts of each layer on a chip. Parameters, gradients and optimizer take 5.2 GB
          of a chip's 95 GB.
Expected: 7.41 B parameters (the paper prints 7 B), 220 M of them active; 1.44 GFLOP executed per token. Not trained
          yet; by arithmetic, at 40 % of peak, 100,000 steps take 14 hours.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.

switch_large.py, switch_xxl.py and switch_c.py begin from this config and change what is theirs.
"""

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="switch_base",
        model=Model(
            vocabulary=32_128,
            width=768,
            layers=24,
            heads=12,
            head_width=64,
            ffn_width=2048,
            activation="geglu",
            tied_embeddings=False,
            init_scale=0.1,
            dtype="bfloat16",
            experts=128,
            expert_every=2,
            router=choice("switch", jitter=0.01, balance_loss=0.01, z_loss=0.0),
            executor="einsum",
            capacity_factor=1.25,
            eval_capacity_factor=2.0,
        ),
        data=Data(sources=("tfds:c4/en",), length=512),
        mesh=Mesh(expert=16),
        # T5's, with a warm-up: relative updates, 1 / sqrt(step) from 10,000 on; updates are clipped, not gradients.
        optimizer=Optimizer(
            algorithm=choice("adafactor"),
            learning_rate=0.01,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule=choice("rsqrt"),
            warmup_steps=10_000,
        ),
        training=Training(steps=100_000, batch=2048, accumulation=4),
        evaluation=Evaluation(every=2_000, rows=2048),
        checkpoints=Checkpoints(every=1_000),
    )

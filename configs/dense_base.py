"""T5-Base as a decoder-only language model: the dense twin's shape of switch_base (Fedus et al. 2021, table 9).

Shows:    what switch_base has to beat. `compare` derives it by itself; this file trains it alone, at T5's own initial
          scale of 1.0 (the twin that `compare` derives has Switch's 0.1).
Command:  sparse-lm train --config=configs/dense_base.py --workdir=gs://BUCKET/dense_base
Hardware: TPU v5p 2x2x4 (16 chips). Parameters, gradients and optimizer take 2.0 GB of a chip's 95 GB.
Expected: 219 M parameters; 1.29 GFLOP executed per token. Not trained yet; by arithmetic, at 40 % of peak, 100,000
          steps take 13 hours.

The published shape is an encoder-decoder's; here both stacks' layers stand in one decoder, without cross-attention
and with an embedding and an output layer of its own (untied, as in T5 v1.1). The published qualities are of span
corruption and say nothing about the loss of a language model.
"""

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="dense_base",
        model=Model(
            vocabulary=32_128,
            width=768,
            layers=24,
            heads=12,
            head_width=64,
            ffn_width=2048,
            activation="geglu",
            tied_embeddings=False,
            dtype="bfloat16",
        ),
        data=Data(sources=("tfds:c4/en",), length=512),
        mesh=Mesh(),
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

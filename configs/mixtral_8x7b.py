"""Mixtral 8x7B's shape (Jiang et al. 2024, arXiv 2401.04088).

Shows:    8 experts in every layer, 2 of them for each token, with grouped-query attention.
Command:  sparse-lm info --config=configs/mixtral_8x7b.py
Hardware: TPU v5p 4x4x4 (64 chips). Parameters, gradients and optimizer take 14 GB of a chip's 95 GB.
Expected: 46.7 B parameters, 12.9 B of them active (the paper says 47 B and 13 B); 110 GFLOP executed per token.

The shape is published; batch, schedule and data are not, and are choices of this file. It drops no token.
"""

import math

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="mixtral_8x7b",
        model=Model(
            vocabulary=32_000,
            width=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            ffn_width=14_336,
            activation="swiglu",
            tied_embeddings=False,
            rope_base=1e6,
            dtype="bfloat16",
            remat="full",
            experts=8,
            expert_every=1,
            top_k=2,
            router=choice("topk"),
            capacity_factor=math.inf,
            executor="grouped",
        ),
        data=Data(sources=("tfds:c4/en",), length=4096),
        mesh=Mesh(fsdp=8, expert=8),
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2_000),
        training=Training(steps=250_000, batch=1024, accumulation=4),
        evaluation=Evaluation(every=2_000, rows=512),
        checkpoints=Checkpoints(every=1_000),
    )

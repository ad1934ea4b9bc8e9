"""OLMoE-1B-7B's shape (Muennighoff et al. 2024, arXiv 2409.02060, table 1 and appendix B).

Shows:    64 small experts in every layer, 8 of them for each token, nothing dropped.
Command:  sparse-lm info --config=configs/olmoe_1b_7b.py
Hardware: TPU v5p 4x4x4 (64 chips).
Expected: 6.92 B parameters, 1.28 B of them active (the paper says 6.9 B and 1.3 B).

The released model also normalises queries and keys, which this decoder does not: 65,536 parameters fewer.

The paper's coefficients, 0.01 for balance and 0.001 for the router z-loss (section 3.1), are of means over the 16
layers (`batched_load_balancing_loss` of MegaBlocks, with which it was trained; the z-loss as in OLMo-core); here every
layer's loss is added with its own coefficient, so they are a 16th of that. The reference balances over the rows that
one device has in a microbatch; so does this, 4 rows on 64 chips.
"""

import math

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="olmoe_1b_7b",
        model=Model(
            vocabulary=50_304,
            width=2048,
            layers=16,
            heads=16,
            ffn_width=1024,
            activation="swiglu",
            tied_embeddings=False,
            dtype="bfloat16",
            remat="full",
            experts=64,
            expert_every=1,
            top_k=8,
            router=choice("topk", normalize=False, balance_loss=0.01 / 16, z_loss=0.001 / 16),
            balance_over="device",
            capacity_factor=math.inf,
            executor="grouped",
        ),
        data=Data(sources=("tfds:c4/en",), length=4096),
        mesh=Mesh(fsdp=8, expert=8),
        optimizer=Optimizer(learning_rate=4e-4, warmup_steps=2_500),
        training=Training(steps=1_200_000, batch=1024, accumulation=4),
        evaluation=Evaluation(every=2_000, rows=512),
        checkpoints=Checkpoints(every=1_000),
    )

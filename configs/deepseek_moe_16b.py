"""DeepSeekMoE 16B's shape (Dai et al. 2024, arXiv 2401.06066, section 5.1.2), balanced as in DeepSeek-V3.

Shows:    fine-grained experts, two shared ones, a dense first layer, and a bias for each expert instead of a loss.
Command:  sparse-lm info --config=configs/deepseek_moe_16b.py
Hardware: TPU v5p 4x4x4 (64 chips).
Expected: 16.4 B parameters, 2.8 B of them active, as in the paper.

The paper balances with losses; the router here is its successor's (DeepSeek-V3, arXiv 2412.19437), at the same cost.
"""

import math

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Mesh, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="deepseek_moe_16b",
        model=Model(
            vocabulary=102_400,
            width=2048,
            layers=28,
            heads=16,
            ffn_width=10_944,
            activation="swiglu",
            tied_embeddings=False,
            dtype="bfloat16",
            remat="full",
            experts=64,
            expert_width=1408,
            shared_experts=2,
            expert_every=1,
            dense_first=1,
            top_k=6,
            router=choice("deepseek", bias_rate=0.001, sequence_loss=0.0001),
            capacity_factor=math.inf,
            executor="grouped",
        ),
        data=Data(sources=("tfds:c4/en",), length=4096),
        mesh=Mesh(fsdp=8, expert=8),
        optimizer=Optimizer(learning_rate=4.2e-4, warmup_steps=2_000),
        training=Training(steps=106_000, batch=4096, accumulation=16),
        evaluation=Evaluation(every=2_000, rows=512),
        checkpoints=Checkpoints(every=1_000),
    )

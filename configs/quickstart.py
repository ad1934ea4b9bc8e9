"""A Switch mixture of experts beside its dense twin, on a laptop.

Shows:    whether 8 experts in every second layer pay at a width of 128, on Python's own library as text.
Command:  sparse-lm compare --config=configs/quickstart.py --seeds=3
Hardware: two CPU cores, no accelerator; about four minutes.
Expected: see the README; the numbers differ a little between Python versions, whose libraries are the text.
"""

from sparse_lm.config import Checkpoints, Config, Data, Evaluation, Logging, Model, Optimizer, Training, choice


def get_config() -> Config:
    return Config(
        name="quickstart",
        model=Model(
            vocabulary=2048,
            width=128,
            layers=4,
            heads=4,
            ffn_width=512,
            experts=8,
            expert_every=2,
            scan=False,  # four layers compile in seconds and run a quarter faster without the loop
            capacity_factor=1.25,
            router=choice("switch"),
        ),
        data=Data(sources=("stdlib",), length=128),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=30),
        training=Training(steps=250, batch=8),
        evaluation=Evaluation(every=50, rows=64),
        checkpoints=Checkpoints(every=100),
        logging=Logging(every=10),
    )

"""One row for each router: a config that it fits, and what should hold of it."""

from typing import NamedTuple

from sparse_lm import config as configs
from tests import tiny

E = 8


class Row(NamedTuple):
    router: configs.Choice
    fields: dict = {}  # of the model, beside the router
    one_expert: bool = True  # with one expert it is the dense model: its weight is then 1


TABLE = {
    "switch": Row(tiny.switch()),
    "topk": Row(configs.choice("topk", z_loss=0.0), {"top_k": 2}),
    "noisy_topk": Row(configs.choice("noisy_topk"), {"top_k": 2}),
    "gshard": Row(configs.choice("gshard"), {"top_k": 2}, one_expert=False),
    "deepseek": Row(configs.choice("deepseek", groups=4, groups_kept=2), {"top_k": 3}, one_expert=False),
    "quantile": Row(configs.choice("quantile", bins=100), {"top_k": 2}),
    "remoe": Row(configs.choice("remoe"), {"top_k": 2}, one_expert=False),
    "hash": Row(configs.choice("hash", gate=True), {"top_k": 2}, one_expert=False),
    "sinkhorn": Row(configs.choice("sinkhorn"), {"top_k": 2}, one_expert=False),
    "base": Row(configs.choice("base"), one_expert=False),
    "expert_choice": Row(configs.choice("expert_choice"), {"top_k": 2, "capacity_factor": 1.0}, one_expert=False),
    "soft": Row(configs.choice("soft"), {"capacity_factor": 1.0}, one_expert=False),
    "random": Row(configs.choice("random"), {"top_k": 2}),
    "mixture_of_depths": Row(
        configs.choice("mixture_of_depths"), {"experts": 1, "capacity_factor": 0.25}, one_expert=False
    ),
}


def config(name: str, **fields) -> configs.Config:
    """A tiny config with the router; `fields` are of the model."""
    row = TABLE[name]
    of_model = {"experts": E, "router": row.router} | row.fields | fields
    return tiny.config(**{f"model__{field}": value for field, value in of_model.items()})

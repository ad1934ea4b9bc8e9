"""One row for each router: a config that it fits, and what should hold of it."""

from typing import NamedTuple

from sparse_lm import config as configs
from tests import tiny

E = 8


class Row(NamedTuple):
    router: configs.Choice
    fields: dict = {}  # of the model, beside the router
    one_expert: dict | None = {}  # fields of the model with which one expert is the dense model; None: there are none


TABLE = {
    "switch": Row(tiny.switch()),
    "topk": Row(configs.choice("topk", z_loss=0.0), {"top_k": 2}),
    "noisy_topk": Row(configs.choice("noisy_topk"), {"top_k": 2}),
    "gshard": Row(configs.choice("gshard"), {"top_k": 2}, one_expert=None),  # has two experts
    "deepseek": Row(
        configs.choice("deepseek", groups=4, groups_kept=2), {"top_k": 3}, {"router": configs.choice("deepseek")}
    ),
    "quantile": Row(configs.choice("quantile", bins=100), {"top_k": 2}),
    "remoe": Row(configs.choice("remoe"), {"top_k": 2}, one_expert=None),  # weighs by the score
    "hash": Row(configs.choice("hash", gate=True), {"top_k": 2}, {"router": configs.choice("hash")}),
    "sinkhorn": Row(configs.choice("sinkhorn"), {"top_k": 2}, one_expert=None),  # weighs by the score
    "base": Row(configs.choice("base"), one_expert=None),  # weighs by the score
    "expert_choice": Row(
        configs.choice("expert_choice"), {"top_k": 2, "capacity_factor": 1.0}, {"capacity_factor": 1.0}
    ),
    "soft": Row(configs.choice("soft"), {"capacity_factor": 1.0}, one_expert=None),  # mixes tokens
    "random": Row(configs.choice("random"), {"top_k": 2}),
    "mixture_of_depths": Row(
        configs.choice("mixture_of_depths"),
        {"experts": 1, "capacity_factor": 0.25},
        one_expert=None,  # weighs by the score
    ),
}


# Of these every expert gets the same number of tokens in training, where all are valid and before capacity.
EVEN = ["base", "expert_choice", "soft", "mixture_of_depths"]


def config(name: str, **fields) -> configs.Config:
    """A tiny config with the router; `fields` are of the model."""
    row = TABLE[name]
    of_model = {"experts": E, "router": row.router} | row.fields | fields
    return tiny.config(**{f"model__{field}": value for field, value in of_model.items()})

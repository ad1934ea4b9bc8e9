"""The table of routers: the names that a config may use."""

from sparse_lm.config import Model
from sparse_lm.registry import lookup
from sparse_lm.routing.base import Base
from sparse_lm.routing.deepseek import DeepSeek
from sparse_lm.routing.expert_choice import ExpertChoiceRouter
from sparse_lm.routing.gshard import GShard
from sparse_lm.routing.hash import Hash
from sparse_lm.routing.mixture_of_depths import MixtureOfDepths
from sparse_lm.routing.noisy_topk import NoisyTopK
from sparse_lm.routing.quantile import Quantile
from sparse_lm.routing.random_choice import Random
from sparse_lm.routing.remoe import ReMoE
from sparse_lm.routing.router import Router
from sparse_lm.routing.sinkhorn import Sinkhorn
from sparse_lm.routing.soft import Soft
from sparse_lm.routing.switch import Switch
from sparse_lm.routing.topk import TopK

ROUTERS: dict[str, type[Router]] = {
    "switch": Switch,
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "gshard": GShard,
    "deepseek": DeepSeek,
    "quantile": Quantile,
    "remoe": ReMoE,
    "hash": Hash,
    "sinkhorn": Sinkhorn,
    "base": Base,
    "expert_choice": ExpertChoiceRouter,
    "soft": Soft,
    "mixture_of_depths": MixtureOfDepths,
    "random": Random,
}


def router_of(model: Model) -> type[Router]:
    """The class of the model's router. Raises `UserError` for a name that is not known."""
    return lookup("model.router.name", ROUTERS, model.router.name)

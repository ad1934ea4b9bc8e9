"""Makes the fixtures of tests/routing/test_transformers.py: expert blocks of Hugging Face transformers at work.

    python tests/oracles/transformers_blocks.py [folder]

Needs torch and transformers, and nothing of sparse_lm. Made with torch 2.13.0 and transformers 5.24.0. A slow test
makes them again and compares.

A fixture holds, all in the layout of sparse_lm: x [G, S, D]; `weights/…`, of which `weights/router` is [D, E]; the
router's logits [G, S, E], its choice `expert` and `weight` [G, S, K] and which of it found a place, `kept`; the output
y; dy, a random direction, and `gradients/…` of sum(y · dy) by x and each weight; `losses/…`, means over the tokens, and
`loss_gradients/…` of each by the router's weight. A sequence is a group. What is drawn at random is exact in float16
and stored as such; the blocks compute in float64.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral import modeling_mixtral as mixtral_blocks
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.switch_transformers import modeling_switch_transformers as switch_blocks

G, S, D, F, E = 3, 12, 16, 24, 8
NEAR = 1e-3  # scores that decide a choice are further apart
FOLDER = pathlib.Path(__file__).with_name("fixtures")


class Block(NamedTuple):
    module: torch.nn.Module
    shapes: dict[str, tuple[int, ...]]  # of the weights
    place: Callable[[dict], dict]  # weights -> parameters of the module by name
    scores: Callable[[np.ndarray, dict], list]  # (logits [N, E], weights) -> (scores, how many are taken), …
    route: Callable[[torch.nn.Module, torch.Tensor], tuple]  # -> logits, expert, weight, kept
    losses: Callable[[torch.Tensor], dict]  # logits [G, S, E] -> losses


def experts(count: int, width: int, gated: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"router": (D, count), "into": (count, D, width), "out": (count, width, D)}
    return shapes | {"gate": (count, D, width)} if gated else shapes


def place_gated(weights: dict) -> dict:
    both = torch.cat([weights["gate"], weights["into"]], dim=-1)
    down = weights["out"].transpose(-1, -2)
    return {
        "gate.weight": weights["router"].T,
        "experts.gate_up_proj": both.transpose(-1, -2),
        "experts.down_proj": down,
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def route_gated(module: torch.nn.Module, x: torch.Tensor) -> tuple:
    logits, weight, expert = module.gate(x)
    return logits, expert, weight, torch.ones_like(expert, dtype=torch.bool)


def mixtral(k: int = 2) -> Block:
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k)
    balance = lambda logits: mixtral_blocks.load_balancing_loss_func((logits.flatten(0, 1),), E, k)
    return Block(
        mixtral_blocks.MixtralSparseMoeBlock(config),
        experts(E, F, gated=True),
        place_gated,
        lambda logits, _: [(softmax(logits), k)],
        route_gated,
        lambda logits: {"balance_loss": balance(logits)},
    )


def olmoe(k: int = 3) -> Block:
    config = OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=k, norm_topk_prob=False)
    return mixtral(k)._replace(module=OlmoeSparseMoeBlock(config), losses=lambda _: {})


def deepseek_v3(count: int = 12, width: int = 16, k: int = 3, groups: int = 4, kept: int = 2, shared: int = 2) -> Block:
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=width,
        n_routed_experts=count,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=kept,
        n_shared_experts=shared,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    names = {"gate": "gate_proj", "into": "up_proj", "out": "down_proj"}
    shapes = {
        "bias": (count,),
        "shared_gate": (D, shared * width),
        "shared_into": (D, shared * width),
        "shared_out": (shared * width, D),
    }

    def place(weights: dict) -> dict:
        dense = {f"shared_experts.{theirs}.weight": weights[f"shared_{ours}"].T for ours, theirs in names.items()}
        return place_gated(weights) | dense | {"gate.e_score_correction_bias": weights["bias"]}

    def scores(logits: np.ndarray, weights: dict) -> list:
        biased = (1 / (1 + np.exp(-logits)) + weights["bias"].astype(np.float64)).reshape(-1, groups, count // groups)
        of_groups = np.sort(biased, axis=-1)[..., -2:].sum(axis=-1)
        left_out = of_groups < np.sort(of_groups, axis=-1)[:, -kept, None]
        inside = np.where(left_out[..., None], -np.inf, biased).reshape(-1, count)
        return [(of_groups, kept), (inside, k)]

    return Block(
        DeepseekV3MoE(config),
        experts(count, width, gated=True) | shapes,
        place,
        scores,
        route_gated,
        lambda _: {},
    )


def switch(capacity: int = 2) -> Block:
    config = SwitchTransformersConfig(
        d_model=D,
        d_ff=F,
        num_experts=E,
        expert_capacity=capacity,
        dense_act_fn="gelu_new",
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )

    module = switch_blocks.SwitchTransformersSparseMLP(config)
    module.router.dtype = torch.float64  # the config takes narrower ones only

    def place(weights: dict) -> dict:
        named = {"router.classifier.weight": weights["router"].T}
        for e in range(E):
            named[f"experts.expert_{e}.wi.weight"] = weights["into"][e].T
            named[f"experts.expert_{e}.wo.weight"] = weights["out"][e].T
        return named

    def route(module: torch.nn.Module, x: torch.Tensor) -> tuple:
        kept, weight, logits = module.router(x)
        return logits, logits.argmax(dim=-1), weight, kept.any(dim=-1)

    def losses(logits: torch.Tensor) -> dict:
        balance = switch_blocks.load_balancing_loss_func(logits.softmax(dim=-1), logits.argmax(dim=-1))
        return {"balance_loss": balance, "z_loss": switch_blocks.router_z_loss_func(logits)}

    return Block(
        module,
        experts(E, F, gated=False),
        place,
        lambda logits, _: [(softmax(logits), 1)],
        route,
        losses,
    )


BLOCKS = {"mixtral": mixtral, "olmoe": olmoe, "deepseek_v3": deepseek_v3, "switch": switch}


def near(scores: np.ndarray, taken: int) -> np.ndarray:
    """Which rows have scores among those taken and the next one that are nearly equal."""
    ordered = -np.sort(-scores, axis=-1)[:, : taken + 1]
    return (np.diff(ordered, axis=-1) > -NEAR).any(axis=-1)


def draw(block: Block, random: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Weights, and inputs of which those near a tie are drawn again."""
    weights = {}
    for name, shape in block.shapes.items():
        scale = 0.2 if name == "bias" else 0.4 if name == "router" else shape[-2] ** -0.5
        weights[name] = (scale * random.standard_normal(shape)).astype(np.float16)
    x = np.zeros((G * S, D), np.float16)
    again = np.ones(len(x), bool)
    while again.any():
        x[again] = random.standard_normal((again.sum(), D)).astype(np.float16)
        logits = x.astype(np.float64) @ weights["router"].astype(np.float64)
        again = np.any([near(*scores) for scores in block.scores(logits, weights)], axis=0)
    return weights, x.reshape(G, S, D)


def make(name: str) -> dict[str, np.ndarray]:
    """The fixture of a block, flat."""
    random = np.random.default_rng(sorted(BLOCKS).index(name))
    block = BLOCKS[name]()
    drawn, x = draw(block, random)
    dy = random.standard_normal(x.shape).astype(np.float16)
    leaf = lambda a: torch.tensor(a.astype(np.float64), requires_grad=True)
    inputs, weights = leaf(x), {n: leaf(w) for n, w in drawn.items()}

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block.module

        def forward(self, x):
            return self.block(x), *block.route(self.block, x)

    parameters = {f"block.{n}": p for n, p in block.place(weights).items()}
    y, *routing = functional_call(Routed(), parameters, (inputs,), strict=False)
    logits, expert, weight, kept = (t.reshape(G, S, -1) for t in routing)
    moved = {"x": inputs} | {n: w for n, w in weights.items() if n != "bias"}
    gradients = torch.autograd.grad((y * torch.tensor(dy.astype(np.float64))).sum(), moved.values(), retain_graph=True)
    losses = block.losses(logits)
    of_loss = lambda loss: torch.autograd.grad(loss, weights["router"], retain_graph=True)[0]

    single = lambda t: t.detach().numpy().astype(np.float32)
    fixture = {"x": x, "dy": dy, "y": single(y), "logits": single(logits), "weight": single(weight)}
    fixture |= {"expert": expert.numpy().astype(np.int32), "kept": kept.numpy()}
    fixture |= {f"weights/{n}": w for n, w in drawn.items()}
    fixture |= {f"gradients/{n}": single(g) for n, g in zip(moved, gradients)}
    fixture |= {f"losses/{n}": single(loss) for n, loss in losses.items()}
    return fixture | {f"loss_gradients/{n}": single(of_loss(loss)) for n, loss in losses.items()}


def main(folder: pathlib.Path) -> None:
    torch.set_default_dtype(torch.float64)
    folder.mkdir(exist_ok=True)
    for name in BLOCKS:
        np.savez_compressed(folder / f"{name}.npz", **make(name))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

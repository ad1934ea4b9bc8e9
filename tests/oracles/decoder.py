"""Attention and the whole decoder as slow float64 loops, one token at a time."""

import math

import numpy as np

from tests.oracles import moe


def turned(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Rotary positions as in Su et al. 2021, with features i and i + h/2 as a pair: a rotation of the complex plane."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    pairs = pairs * np.array([np.exp(1j * position * base ** (-i / half)) for i in range(half)])
    return np.concatenate([pairs.real, pairs.imag])


def attention(weights, x, positions, mask, base):
    """Attention head by head, query by query, key by key."""
    heads, kv_heads, width = weights["query"].shape[1], weights["key"].shape[1], weights["query"].shape[2]
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for head in range(heads):
            shared = head // (heads // kv_heads)  # consecutive query heads share a head of keys and values
            for i in range(x.shape[1]):
                query = turned(x[b, i] @ weights["query"][:, head], positions[b, i], base)
                seen = [j for j in range(x.shape[1]) if mask[b, i, j]]
                keys = [turned(x[b, j] @ weights["key"][:, shared], positions[b, j], base) for j in seen]
                scores = np.array([math.exp(query @ key / math.sqrt(width)) for key in keys])
                for j, share in zip(seen, scores / scores.sum()):
                    y[b, i] += share * (x[b, j] @ weights["value"][:, shared]) @ weights["out"][head]
    return y


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def decoder(parameters: dict, model, batch: dict, factor: float):
    """Logits, and the experts chosen in each expert layer [n, G, S, 1]; capacity by `factor`.

    parameters: as of `Functional.init`, in float64; layers are taken off their stack one by one.
    """
    segments = batch["segments"]
    rows, length = segments.shape
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(length, dtype=bool)
    layers = [parameters["prefix"][i] for i in range(model.dense_first)]
    for repeat in range((model.layers - model.dense_first) // model.expert_every):
        layers += [_pick(parameters["period"][place], repeat) for place in range(model.expert_every)]
    x = parameters["embedding"][batch["inputs"]] * math.sqrt(model.width)
    chosen = []
    for layer in layers:
        normed = norm(x, layer["attention_norm"]["scale"])
        x = x + attention(layer["attention"], normed, batch["positions"], mask, model.rope_base)
        normed = norm(x, layer["feed_forward_norm"]["scale"])
        feed_forward = layer["feed_forward"]
        if "router" in feed_forward:
            group = lambda a: a.reshape(-1, model.group_size, *a.shape[2:])
            places = moe.capacity(model.group_size, model.experts, model.top_k, factor)
            tokens, valid = group(normed), group(segments > 0)
            kernel, experts = feed_forward["router"]["kernel"], feed_forward["experts"]
            y, _, expert, *_ = moe.switch(
                tokens, valid, kernel, experts, model.activation, places, 0, 0, np.zeros_like(tokens)
            )
            chosen.append(expert)
            x = x + y.reshape(x.shape)
        else:
            run = moe.Expert(feed_forward, model.activation).forward
            x = x + np.array([[run(token) for token in row] for row in normed])
    table = parameters["embedding"] if model.tied_embeddings else parameters["output"]
    return norm(x, parameters["norm"]["scale"]) @ table.T, np.array(chosen)


def _pick(tree: dict, index: int) -> dict:
    return {k: _pick(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}

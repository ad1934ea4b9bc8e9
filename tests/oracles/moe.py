"""A mixture of experts as slow float64 loops, with its gradient by hand. Written from the text of Fedus, Zoph and
Shazeer 2021 (arXiv 2101.03961), section 2, and Zoph et al. 2022 (arXiv 2202.08906), equation 5; not from their
pseudocode.
"""

import math

import numpy as np


def capacity(tokens: int, experts: int, choices: int, factor: float) -> int:
    """Equation 3: an even share of the choices, times the factor; no more than there are tokens."""
    if factor == math.inf:
        return tokens
    return min(tokens, math.ceil(factor * tokens * choices / experts))


def place(expert: np.ndarray, places: int, priority: np.ndarray | None = None) -> np.ndarray:
    """Which choices [S, K] of one group find a place: all first choices in token order, then all second ones.

    With a priority [S], in the order of Riquelme et al. 2021 (arXiv 2106.05974), section 4.1: the highest goes first.
    """
    queue = list(range(expert.shape[0]))
    if priority is not None:
        queue.sort(key=lambda token: (-priority[token], token))
    taken: dict[int, int] = {}
    kept = np.zeros(expert.shape, bool)
    for rank in range(expert.shape[1]):
        for token in queue:
            e = int(expert[token, rank])
            if e >= 0 and taken.get(e, 0) < places:
                taken[e] = taken.get(e, 0) + 1
                kept[token, rank] = True
    return kept


def gelu(x: float) -> tuple[float, float]:
    """The tanh form of Hendrycks and Gimpel 2016, and its derivative."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = math.tanh(inner)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope


def silu(x: float) -> tuple[float, float]:
    s = 1 / (1 + math.exp(-x))
    return x * s, s * (1 + x * (1 - s))


ACTIVATIONS = {"gelu": gelu, "geglu": gelu, "swiglu": silu}


class Expert:
    """One token through one expert, and back. weights: into [D, F], out [F, D] and, if gated, gate [D, F]."""

    def __init__(self, weights: dict, activation: str):
        self.weights, self.activate = weights, ACTIVATIONS[activation]

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        self.into = x @ self.weights["into"]
        acted = x @ self.weights["gate"] if "gate" in self.weights else self.into
        self.acted, self.slope = (np.array(v) for v in zip(*(self.activate(float(a)) for a in acted)))
        self.hidden = self.acted * self.into if "gate" in self.weights else self.acted
        return self.hidden @ self.weights["out"]

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, dict]:
        """Gradients of x and of the weights from that of the output; after `forward` of the same token."""
        dhidden = self.weights["out"] @ dy
        gradients = {"out": np.outer(self.hidden, dy)}
        if "gate" in self.weights:
            dgate, dinto = dhidden * self.into * self.slope, dhidden * self.acted
            gradients |= {"gate": np.outer(self.x, dgate), "into": np.outer(self.x, dinto)}
            return self.weights["gate"] @ dgate + self.weights["into"] @ dinto, gradients
        dinto = dhidden * self.slope
        return self.weights["into"] @ dinto, gradients | {"into": np.outer(self.x, dinto)}


def experts(x, expert, weight, weights, activation, places, dy):
    """Output of the experts on groups x [G, S, D] with choices expert and weight [G, S, K], and what flows back of dy.

    Returns y, the number of choices without a place, and the gradients of x, of weight and of the experts' weights.
    """
    y, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weight)
    gradients = {name: np.zeros_like(w) for name, w in weights.items()}
    lost = 0
    for g in range(x.shape[0]):
        kept = place(expert[g], places)
        lost += int((expert[g] >= 0).sum() - kept.sum())
        for s, k in zip(*np.nonzero(kept)):
            e = expert[g, s, k]
            one = Expert({name: w[e] for name, w in weights.items()}, activation)
            out = one.forward(x[g, s])
            y[g, s] += weight[g, s, k] * out
            dweight[g, s, k] = dy[g, s] @ out
            back, parts = one.backward(weight[g, s, k] * dy[g, s])
            dx[g, s] += back
            for name, part in parts.items():
                gradients[name][e] += part
    return y, lost, dx, dweight, gradients


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def switch(x, valid, kernel, weights, activation, places, balance, z, dy):
    """A Switch layer on groups x [G, S, D]: route by kernel [D, E], place, compute, scale by the probability.

    Returns y, the losses summed over tokens (coefficients `balance` and `z`), the experts chosen [G, S, 1], the
    number of tokens without a place, and the gradients of sum(y · dy) + losses by x, kernel and the experts' weights.
    """
    groups, size, _ = x.shape
    count = kernel.shape[1]
    logits = np.einsum("gsd,de->gse", x, kernel)
    p = np.array([[softmax(row) for row in group] for group in logits])
    expert = np.full((groups, size, 1), -1)
    weight = np.zeros((groups, size, 1))
    for g in range(groups):
        for s in range(size):
            if valid[g, s]:
                expert[g, s, 0] = np.argmax(p[g, s])
                weight[g, s, 0] = p[g, s].max()  # equation 2: the gate value
    y, lost, dx, dweight, gradients = experts(x, expert, weight, weights, activation, places, dy)

    balance_loss = z_loss = 0.0
    dlogits = np.zeros_like(logits)
    for g in range(groups):
        tokens = int(valid[g].sum())
        if not tokens:
            continue
        f = [sum(expert[g, s, 0] == e for s in range(size)) / tokens for e in range(count)]  # equation 5
        P = [sum(p[g, s, e] for s in range(size) if valid[g, s]) / tokens for e in range(count)]  # equation 6
        balance_loss += tokens * balance * count * sum(a * b for a, b in zip(f, P))  # equation 4, for each token
        for s in range(size):
            if not valid[g, s]:
                continue
            dp = np.array([balance * count * f[e] for e in range(count)])
            dp[expert[g, s, 0]] += dweight[g, s, 0]
            dlogits[g, s] += p[g, s] * (dp - dp @ p[g, s])
            logsumexp = math.log(sum(math.exp(v) for v in logits[g, s]))
            z_loss += z * logsumexp**2
            dlogits[g, s] += 2 * z * logsumexp * p[g, s]
    dx += np.einsum("gse,de->gsd", dlogits, kernel)
    dkernel = np.einsum("gsd,gse->de", x, dlogits)
    losses = {"balance_loss": balance_loss, "z_loss": z_loss}
    return y, losses, expert, lost, {"x": dx, "router": dkernel, "experts": gradients}

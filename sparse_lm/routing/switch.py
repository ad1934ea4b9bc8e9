"""Switch: each token goes to its most probable expert (Fedus, Zoph and Shazeer 2021, arXiv 2101.03961, section 2)."""

from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.ranges import NotNegative, Share
from sparse_lm.routing.topk import TopK


class Switch(TopK):
    """Top-1 routing.

    With router probabilities p = softmax(x W), a token goes to argmax p and its output is scaled by that probability
    (equation 2). The text is followed where the paper's pseudocode differs: jitter multiplies the router's input (the
    pseudocode adds it to the logits), and an expert takes as many tokens as its capacity (the pseudocode, one fewer).

    jitter: the input is multiplied by noise uniform in [1 - jitter, 1 + jitter] while training.
    balance_loss: α of equations 4 to 6, the loss α E Σ_e f_e P_e with f_e the share of tokens that chose e and P_e the
        mean probability of e. It is α when both are even. Each routed layer adds its own, as all losses of routers do:
        where others take the mean over layers, α here is theirs over the number of these layers.
    z_loss: coefficient of the mean squared logsumexp of the logits (Zoph et al. 2022, arXiv 2202.08906, equation 5).
    """

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        jitter: Share = 0.01,
        balance_loss: NotNegative = 0.01,
        z_loss: NotNegative = 0.001,
    ):
        if model.top_k != 1:
            raise UserError(f"model.top_k is {model.top_k}; the router 'switch' sends each token to 1 expert")
        super().__init__(model, rngs, normalize=False, jitter=jitter, balance_loss=balance_loss, z_loss=z_loss)

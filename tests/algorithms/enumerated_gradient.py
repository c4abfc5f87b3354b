"""The exact expected gradient of any estimator over all episodes of a small MDP."""

import torch

from etpo.algorithms.losses import action_weights
from etpo.algorithms.returns import discounted_returns

from ..token_mdp_oracle import TokenMDP

EXACT = 1e-9  # float64, values of about 1
WRONG = 1e-3
SEEDS = range(5)


class EnumeratedGradient:
    """All episodes of an MDP under a policy, and the exact gradient of its return J."""

    def __init__(self, seed, length=1, num_states=3, gamma=0.9, beta=0.0):
        self.mdp = mdp = TokenMDP.random(seed, 2, length, num_states, gamma=gamma, acyclic=True)
        mdp.rewards.add_(1.0)
        mdp.start[0] += 1.0
        mdp.start.div_(2.0)
        mdp.termination[:-1] = 0.1
        mdp.termination[:-1, 0] = 0.9  # the policy decides when its episode ends
        self.beta, self.log_ref = beta, mdp.random_policy(seed + 2)
        self.logits = mdp.random_policy(seed + 1).requires_grad_()
        self.log_pi = self.logits.log_softmax(-1)
        self.log_old = self.log_pi.detach()
        e = self.e = mdp.enumerate_episodes(horizon=num_states)
        self.at, self.taken = (e.state, e.prefix), (e.state, e.prefix, e.token)
        self.probability = e.probabilities(self.log_old)
        self.weight = e.valid * action_weights(gamma, e.step.double())
        self.returns = discounted_returns(e.rewards, e.discounts, e.continues)
        self.exact = self.gradient(-mdp.regularized_return(self.log_pi, self.log_ref, beta))

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0].flatten()

    def mean_gradient(self, losses, weight=None):
        """Return the expected gradient of the weighted sum of losses [E, K] over an episode."""
        weight = self.weight if weight is None else weight
        return self.gradient((self.probability[:, None] * weight * losses).sum())

    def credited(self, credit, weight=None):
        """Return the expected gradient of the policy gradient with `credit` [E, K] per token."""
        return self.mean_gradient(-credit.detach() * self.log_pi[self.taken], weight)

    def expectation(self, of_pairs):
        """Average over the other episode of a batch of two: [E, E, ...] -> [E, ...]."""
        return torch.einsum("j,ij...->i...", self.probability, of_pairs)

    def error(self, gradient):
        """Return the relative error of a gradient."""
        return ((gradient - self.exact).norm() / self.exact.norm()).item()

    def misdirection(self, gradient):
        """Return the relative error of the best multiple of a gradient: a scale is no mistake."""
        scale = gradient @ self.exact / gradient.square().sum()
        return self.error(scale * gradient)

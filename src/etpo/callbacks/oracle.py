"""How far a run on a token MDP is from the exact optimum."""

from dataclasses import replace

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.algorithms.returns import kl_divergence
from etpo.environments.token_mdp import TokenMDP
from etpo.environments.token_mdp_env import TokenMDPEnv


class OracleDistance(Callback):
    """Logs KL(pi || pi*) of whole actions and |V - V*| after each iteration's update.

    pi* and V* solve the environment's MDP exactly, with the run's gamma and beta and the
    probabilities of its own frozen reference. V is the soft value of the updated policy by the
    target critic that the iteration's returns were made of: it moves after the validation.

    `oracle/kl`: nats, mean over states weighted by the discounted visits of pi, the weights with
    which beta KL sums to what pi falls short of in return. `oracle/kl_max`: the worst state's.
    `oracle/value_error`: reward, the worst state's. `oracle/value`: V* of the start, reward.
    """

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        environment: TokenMDPEnv = trainer.datamodule.environment
        mdp = replace(environment.mdp, gamma=pl_module.gamma)
        log_pi, log_ref, value = tables(environment, pl_module)
        log_optimum, optimum = mdp.solve_tokens(log_ref, pl_module.beta)
        kl = kl_divergence(mdp.action_log_probs(log_pi), mdp.action_log_probs(log_optimum))
        visits = mdp.visitation(log_pi)[:, 0]
        numbers = {
            "kl": (visits / visits.sum()) @ kl,
            "kl_max": kl.max(),
            "value_error": (value - optimum).abs().max(),
            "value": mdp.start @ optimum,
        }
        for name, number in numbers.items():
            pl_module.log(f"oracle/{name}", number.float())


def tables(environment: TokenMDPEnv, module: LightningModule) -> tuple[Tensor, Tensor, Tensor]:
    """log pi and log pi_ref [S, P, V] at every prefix, V [S] at every state; float64."""
    policy, mdp = module.policy, environment.mdp
    written = prefix_tokens(mdp)
    states, prefixes = len(mdp.start), len(written)
    # row (s, p): the tokens of p and one more, which is not read
    actions = torch.zeros(prefixes, mdp.length, dtype=torch.long)
    for prefix, tokens in enumerate(written):
        actions[prefix, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    last = torch.tensor([len(tokens) for tokens in written]).repeat(states)
    prompts = policy.encode(environment.observations)
    inputs = [
        prompts.ids.repeat_interleave(prefixes, 0).to(module.device),
        prompts.mask.repeat_interleave(prefixes, 0).to(module.device),
        actions.repeat(states, 1).to(module.device),
    ]
    value = module.evaluate_prefixes(*inputs).value
    current = policy(*inputs).log_probs
    reference = policy(*inputs, reference=True).log_probs
    rows = torch.arange(len(last))
    log_pi, log_ref = (
        log_probs[rows, last].double().log_softmax(-1).view(states, prefixes, -1).cpu()
        for log_probs in (current, reference)
    )
    return log_pi, log_ref, value.view(states, prefixes, -1)[:, 0, 0].double().cpu()


def prefix_tokens(mdp: TokenMDP) -> list[list[int]]:
    """The tokens of each of the MDP's P prefixes."""
    written: list[list[int]] = [[]]
    for prefix, row in enumerate(mdp.tree.child.tolist()):
        # children come in the order of their numbers
        written += [[*written[prefix], token] for token, child in enumerate(row) if child >= 0]
    return written

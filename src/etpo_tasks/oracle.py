"""Distance of a run on a token MDP to the exact optimum."""

from dataclasses import replace

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.algorithms.evaluation import prefix_states
from etpo.algorithms.returns import kl_divergence
from etpo.models.prefix_tree import prefix_tree
from etpo.models.token_columns import ALL_TOKENS
from etpo_tasks.token_mdp import TokenMDP
from etpo_tasks.token_mdp_env import TokenMDPEnv


class OracleDistance(Callback):
    """Log KL(pi || pi*) of whole actions and |V - V*| after each iteration's update.

    pi* and V* are the exact solution of the environment's MDP for the run's gamma, beta and frozen
    reference. V is the soft value of the updated policy under the target critic that computed the
    iteration's returns; the target critic is updated after the validation.

    - `oracle/kl`: nats, mean over states, weighted by the discounted visits of pi. The weighted sum
      times beta is the regret of pi.
    - `oracle/kl_max`: nats, maximum over states.
    - `oracle/value_error`: reward, maximum over states.
    - `oracle/value`: reward, V* of the start distribution.
    """

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        environment: TokenMDPEnv = trainer.datamodule.environment
        mdp = replace(environment.mdp, gamma=pl_module.settings.gamma)
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
    """Return log pi and log pi_ref [S, P, V] at every prefix and V [S] at every state; float64."""
    mdp, prefixes = environment.mdp, prefix_tokens(environment.mdp)
    states = len(mdp.start)
    # row (s, p): the tokens of p, padded
    actions = torch.tensor([[*p, *[0] * (mdp.length - len(p))] for p in prefixes])
    prompts = module.policy.encode(environment.observations)
    inputs = [
        prompts.ids.repeat_interleave(len(prefixes), 0).to(module.device),
        prompts.mask.repeat_interleave(len(prefixes), 0).to(module.device),
        actions.repeat(states, 1).to(module.device),
    ]
    policy, tree = module.policy, prefix_tree(*inputs, torch.ones_like(inputs[2]).bool())
    all_tokens = torch.zeros(len(tree.node), 0, dtype=torch.int32, device=module.device)
    hidden = prefix_states(policy, tree, all_tokens, len(tree.node))
    log_pi, _ = policy.log_probs(hidden.old, taken=tree.taken)
    log_ref, _ = policy.log_probs(hidden.ref, reference=True)
    value = module.loss_values(tree, hidden, ALL_TOKENS, log_pi, log_ref).value
    rows = torch.arange(len(inputs[0]))
    last = torch.tensor([len(p) for p in prefixes]).repeat(states)
    at = tree.prefix[rows, last].view(states, len(prefixes))
    log_pi, log_ref = (x[at].double().log_softmax(-1).cpu() for x in (log_pi, log_ref))
    return log_pi, log_ref, value[at[:, 0]].double().cpu()


def prefix_tokens(mdp: TokenMDP) -> list[list[int]]:
    """Return the tokens of each of the MDP's P prefixes."""
    prefixes: list[list[int]] = [[]]
    for prefix, row in enumerate(mdp.tree.child.tolist()):
        # children are numbered in this order
        prefixes += [[*prefixes[prefix], token] for token, child in enumerate(row) if child >= 0]
    return prefixes

"""Distance of a run on a token MDP to the exact optimum."""

from dataclasses import replace

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from etpo.algorithms.evaluation import prefix_states
from etpo.algorithms.returns import kl_divergence
from etpo.environments.text_env import TextObservation
from etpo.models.prefix_tree import prefix_tree
from etpo.models.token_columns import TokenColumns, pack
from etpo_tasks.token_mdp import TokenMDP
from etpo_tasks.token_mdp_env import TokenMDPEnv, action_texts

NEVER = -1e4  # log-probability of an inadmissible token; its probability is 0 in float64


class OracleDistance(Callback):
    """Log KL(pi || pi*) of whole actions and |V - V*| after each iteration's update.

    pi* and V* are the exact solution of the environment's MDP for the run's gamma, beta and frozen
    reference. V is the soft value of the updated policy under the target critic that computed the
    iteration's returns; the target critic is updated after the validation.

    - `oracle/kl`: nats, mean over states, weighted by the discounted visits of pi. The weighted sum
      times beta is the regret of pi.
    - `oracle/kl_max`: nats, maximum over states.
    - `oracle/value_error`: reward, maximum over states; of one head of a cross-fitted critic.
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
    rows = torch.arange(len(inputs[0]))
    last = torch.tensor([len(p) for p in prefixes]).repeat(states)
    at = tree.prefix[rows, last].view(states, len(prefixes)).cpu()  # each of the N prefixes once
    admissible = torch.stack([admissible_tokens(mdp, o) for o in environment.observations])
    by_prefix = torch.empty_like(admissible.flatten(0, 1))
    by_prefix[at.flatten()] = admissible.flatten(0, 1)
    mask = by_prefix.to(module.device)
    allowed = pack(mask, None, policy.vocabulary_size)
    columns, hidden = TokenColumns(None, mask), prefix_states(policy, tree, len(mask), allowed)
    log_pi, _ = policy.log_probs(hidden.old, columns, taken=tree.taken)
    log_ref, _ = policy.log_probs(hidden.ref, columns, reference=True)
    value = module.loss_values(tree, hidden, columns, log_pi, log_ref).value.double().cpu()
    log_pi, log_ref = (
        x.double().cpu()[at].where(admissible, NEVER).log_softmax(-1) for x in (log_pi, log_ref)
    )
    first = [first_step(mdp, tokens) for tokens in admissible]
    return log_pi, log_ref, value[at[range(states), first]]


def first_step(mdp: TokenMDP, admissible: Tensor) -> int:
    """Return the first prefix at which several tokens of bool [P, V] are admissible, else 0."""
    prefix = 0
    while admissible[prefix].sum() == 1:
        prefix = int(mdp.tree.child[prefix, admissible[prefix]])
        if prefix < 0:
            return 0
    return prefix


def admissible_tokens(mdp: TokenMDP, observation: TextObservation) -> Tensor:
    """Return which tokens start or continue a choice: bool [P, V], all tokens without choices."""
    choices = observation.get("choices")
    admissible = torch.full(mdp.tree.child.shape, choices is None)
    for text, path in zip(action_texts(mdp), mdp.tree.paths, strict=True):
        if choices is not None and text in choices:
            for prefix, token in path:
                admissible[prefix, token] = True
    admissible[~admissible.any(1)] = True  # prefixes that are never reached
    return admissible


def prefix_tokens(mdp: TokenMDP) -> list[list[int]]:
    """Return the tokens of each of the MDP's P prefixes."""
    prefixes: list[list[int]] = [[]]
    for prefix, row in enumerate(mdp.tree.child.tolist()):
        # children are numbered in this order
        prefixes += [[*prefixes[prefix], token] for token, child in enumerate(row) if child >= 0]
    return prefixes

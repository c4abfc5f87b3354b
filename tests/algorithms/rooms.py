"""An environment with and without choices, and its distributions by plain forwards."""

import numpy as np
import torch

from etpo.environments.text_env import TextVectorEnv

from ..restricted import next_tokens

# any text; a first step; one action; forced tokens before, between and after the steps
SPACES = (None, ("up", "down", ""), ("stay",), ("go north", "go now", "go on up"))


class Rooms(TextVectorEnv):
    """Observations with `spaces[n]` as choices start with n; episodes last three actions."""

    task_name = "rooms"

    def __init__(self, num_envs, spaces=SPACES):
        self.num_envs, self.spaces = num_envs, spaces
        self.last = [None] * num_envs  # observations after the last step

    def reset(self, *, seed=None, options=None):
        self.attempts = np.zeros(self.num_envs, dtype=int)
        return [self.observation(env, "") for env in range(self.num_envs)], {}

    def observation(self, env, text):
        number = (env + self.attempts[env]) % len(self.spaces)
        made, choices = {"instruction": "", "prefix": f"{number}{text}", "suffix": ""}, {}
        if self.spaces[number] is not None:
            choices = {"choices": self.spaces[number]}
        return made | choices

    def step_part(self, actions, envs):
        rewards = np.array([sum(map(ord, action)) % 7 / 7 for action in actions])
        self.attempts[envs] += 1
        done = self.attempts[envs] % 3 == 0
        pairs = list(zip(envs, actions, strict=True))
        final = [self.observation(env, action[:2]) for env, action in pairs]
        infos = {
            "final_obs": np.array([f if d else None for f, d in zip(final, done, strict=True)]),
            "error": [None] * len(envs),
            "attempt": (self.attempts[envs] - 1) % 3 + 1,
            "cached": [False] * len(envs),
        }
        following = [
            self.observation(env, "") if over else each
            for (env, _), over, each in zip(pairs, done, final, strict=True)
        ]
        for env, each in zip(envs, final, strict=True):
            self.last[env] = each
        return following, rewards, done, np.zeros(len(envs), dtype=bool), infos


def allowed_of(policy, batch, spaces=SPACES):
    """Return the allowed tokens at the steps of actions or a batch: bool [B, L, V], else all."""
    allowed = torch.ones(*batch.action_ids.shape, policy.vocabulary_size, dtype=torch.bool)
    for row, place in batch.step_mask.nonzero().tolist():
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        choices = spaces[int(policy.tokenizer.decode(prompt)[0])]
        if choices is not None:
            options = next_tokens(policy, choices, batch.action_ids[row, :place].tolist())
            allowed[row, place] = False
            allowed[row, place, sorted(options)] = True
    return allowed

"""NTPO: naive PPO over tokens, discounted at every token (arXiv 2405.15821, section 4)."""

from etpo.algorithms.poad import POAD


class NTPO(POAD):
    """`POAD` but for the discount inside an action, which is gamma: another optimum."""

    @property
    def token_discount(self) -> float:
        return self.gamma

"""Token-level reinforcement learning for language agents (ETPO, arXiv 2402.06700)."""

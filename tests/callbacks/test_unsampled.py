import torch

from etpo.callbacks.unsampled import unsampled_tokens


def test_tokens_that_no_row_takes_at_an_equal_prefix():
    """Rows 0 and 1 share their first prefix and, both taking 2, their second; row 2 shares none."""
    prompts = torch.tensor([[7, 8], [7, 8], [7, 9]])
    actions = torch.tensor([[2, 0], [2, 1], [1, 1]])
    log_pi = torch.zeros(3, 2, 4)
    log_pi[..., 3] = float("-inf")  # has no probability
    unsampled = unsampled_tokens(prompts, actions, log_pi)
    assert [[row.nonzero().flatten().tolist() for row in part] for part in unsampled] == [
        [[0, 1], [2]],
        [[0, 1], [2]],
        [[0, 2], [0, 2]],
    ]

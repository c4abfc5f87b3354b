"""Sample the weights under a checkpoint, which does not hold them, to recognise other ones."""

import torch
from torch import Tensor, nn

BASE_SAMPLE = "base_sample"  # buffer of a policy
PER_PARAMETER = 16
# relative; bfloat16 changes weights by 0.002, four bits by 0.05
TOLERANCE = 0.01


def weight_sample(model: nn.Module) -> Tensor:
    """Return evenly spaced elements of every parameter, float32 [parameters, PER_PARAMETER]."""
    rows = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, PER_PARAMETER, dtype=torch.float64).long()
        rows.append(flat[places.to(flat.device)].float())
    return torch.stack(rows)


def same_weights(one: Tensor, other: Tensor) -> bool:
    """Return whether two samples are equal up to the rounding of their types."""
    if one.shape != other.shape:
        return False
    one, other = one.cpu(), other.cpu()
    return bool(((one - other).norm(dim=1) <= TOLERANCE * one.norm(dim=1)).all())

"""Print device, sizes and expected memory before the first iteration."""

import sys

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich.markup import escape
from torch import nn

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.callbacks.summary import peak_memory_mib, print_rows
from etpo.checkpoints import saved_state
from etpo.config import algorithm_name

MIB, GIB = 2**20, 2**30
# Floats per token that a training step holds in addition to the stored actions: per entry of the
# vocabulary, and in each layer per hidden and intermediate unit. Fitted to docs/benchmarks.md.
STEP_VOCABULARY, STEP_HIDDEN, STEP_INTERMEDIATE = 18, 16, 6


class StartReport(Callback):
    """Print the block on rank zero, when the models are on their device."""

    def __init__(self, folder: str, environment: str, model: str) -> None:
        self.folder, self.environment, self.model = folder, environment, model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on all ranks: reading sharded weights is a collective
        rows = run_rows(trainer, pl_module) | {"folder": self.folder}
        if not trainer.is_global_zero:
            return
        task = getattr(trainer.datamodule.environment, "task_name", self.environment)
        if self.model == "tiny" and task != "data_science":
            print(
                f"warning: the embedded model (model=tiny) writes scikit-learn programs, not {task}"
                "; model=causal_lm model.name_or_path=<id or folder> takes another model",
                file=sys.stderr,
            )
        names = escape(f"{self.environment}, {self.model}")
        title = f"[bold]{algorithm_name(type(pl_module).__name__)}[/bold] on {names}"
        print_rows(title, [(label, text) for label, text in rows.items() if text])


def run_rows(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """Return the rows of the block by label; the parameters include critics and reference."""
    data, device = trainer.datamodule, [str(module.device), str(trainer.precision)]
    if module.device.type == "cuda":
        device[0] += f" ({torch.cuda.get_device_name(module.device)})"
    if module.device.type == "cpu":
        device.append(f"threads: {torch.get_num_threads()}")
    if trainer.world_size > 1:
        device.append(f"processes: {trainer.world_size}")
    trained, total = (
        get_human_readable_count(sum(p.numel() for p in parameters))
        for parameters in (trained_parameters(module), module.parameters())
    )
    actions, tokens = data.actions_per_iteration, data.max_new_tokens
    return {
        "device": ", ".join(device),
        "parameters": f"{trained} trained of {total} in all",
        "iterations": f"{trainer.max_epochs} x {actions} actions of at most {tokens} tokens "
        f"(up to {actions * tokens:,} tokens each), passes: {data.update_epochs}",
        "memory": memory_line(trainer, module),
        "checkpoints": checkpoint_line(trainer, module),
    }


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with gradients."""
    return [p for p in module.parameters() if p.requires_grad]


def size(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def checkpoint_line(trainer: Trainer, module: LightningModule) -> str:
    """Return the expected sizes of the checkpoints: weights, and AdamW's two moments."""
    sizes = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not trainer.fast_dev_run:
            optimizer = not callback.save_weights_only
            state = saved_state(module, optimizer=optimizer).values()
            weights = {id(tensor): tensor.nbytes for tensor in state}  # tied: once
            moments = 2 * optimizer * sum(p.nbytes for p in trained_parameters(module))
            sizes.append(f"{callback.filename} about {size(sum(weights.values()) + moments)}")
    return ", ".join(sizes)


def memory_line(trainer: Trainer, module: LightningModule) -> str:
    """Return the expected peak memory of a process; equal prompts count as none.

    Sum of the memory so far, gradients, optimizer moments, stored actions and a training step.
    """
    peak = peak_memory_mib(module.device) * MIB
    if not isinstance(module, OnPolicyAlgorithm):
        return f"{size(peak)} so far"
    data, policy, critic = trainer.datamodule, module.policy, module.critic
    config, hidden = policy.model.config.get_text_config(), policy.hidden_size
    layers, inner = (
        getattr(config, name, None) for name in ("num_hidden_layers", "intermediate_size")
    )
    inner = inner if isinstance(inner, int) else 4 * hidden
    # language models with gradients: the policy, and a critic that is more than a head
    critic_parameters = critic.named_parameters() if critic is not None else ()
    trunks = 1 + any(p.requires_grad and not n.startswith("head") for n, p in critic_parameters)
    layer = STEP_HIDDEN * hidden + STEP_INTERMEDIATE * inner
    trunk_floats = trunks * (layers or 1)
    stored = trunk_floats * hidden + layer if policy.checkpointed else trunk_floats * layer
    step = data.minibatch_size * data.max_new_tokens  # tokens of a training step
    chunk = min(step, module.settings.logits_chunk_size)
    # hidden states of policy, reference and critic per token
    floats = data.actions_per_rank * data.max_new_tokens * 3 * hidden
    floats += step * stored + STEP_VOCABULARY * policy.vocabulary_size * chunk
    peak += 3 * sum(p.nbytes for p in trained_parameters(module)) + 4 * floats
    return (
        f"about {size(peak)} if actions have the greatest length, "
        f"{size(100 * data.minibatch_size * stored * 4)} more per 100 tokens of prompts that differ"
    )

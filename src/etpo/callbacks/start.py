"""The block that is printed before the first iteration: device, sizes, expected memory."""

import sys

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from torch import nn

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.callbacks.summary import peak_memory_mib
from etpo.checkpoints import saved_state
from etpo.config import algorithm_name

MIB = 2**20
# Floats per token that a training step holds in addition to the stored actions: per entry of the
# vocabulary, and in each layer per hidden and intermediate unit. Fitted to docs/benchmarks.md.
STEP_VOCABULARY, STEP_HIDDEN, STEP_INTERMEDIATE = 18, 16, 6


class StartReport(Callback):
    """Print the block on rank zero, when the models are on their device.

    folder: of the run. environment, model: their names.
    """

    def __init__(self, folder: str, environment: str, model: str) -> None:
        self.folder, self.environment, self.model = folder, environment, model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on all ranks: reading sharded weights is a collective
        rows = {
            "device": device_line(trainer, pl_module),
            "parameters": parameters_line(pl_module),
            "iterations": iterations_line(trainer),
            "memory": memory_line(trainer, pl_module),
            "checkpoints": checkpoint_line(trainer, pl_module),
            "folder": self.folder,
        }
        if not trainer.is_global_zero:
            return
        task = getattr(trainer.datamodule.environment, "task_name", self.environment)
        if self.model == "tiny" and task != "data_science":
            print(
                f"warning: the embedded model (model=tiny) writes scikit-learn programs, not {task}"
                "; model=causal_lm model.name_or_path=<id or folder> takes another model",
                file=sys.stderr,
            )
        console = Console(soft_wrap=True, highlight=False)
        names = escape(f"{self.environment}, {self.model}")
        console.print(f"[bold]{algorithm_name(type(pl_module).__name__)}[/bold] on {names}")
        for label, text in rows.items():
            if text:
                console.print(f"  {label:<18}{text}", markup=False)


def device_line(trainer: Trainer, module: LightningModule) -> str:
    """Return kind of device, precision, processes; threads on a CPU."""
    parts = [str(module.device), str(trainer.precision)]
    if module.device.type == "cuda":
        parts[0] += f" ({torch.cuda.get_device_name(module.device)})"
    if module.device.type == "cpu":
        parts.append(f"threads: {torch.get_num_threads()}")
    if trainer.world_size > 1:
        parts.append(f"processes: {trainer.world_size}")
    return ", ".join(parts)


def parameters_line(module: nn.Module) -> str:
    """Return the number of trained and of all parameters, critics and reference included."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return (
        f"{short(trained)} trained of {short(sum(p.numel() for p in module.parameters()))} in all"
    )


def short(number: int) -> str:
    """Format a number of parameters: 1234567 -> 1.23M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def size(mib: float) -> str:
    """Format mebibytes."""
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def iterations_line(trainer: Trainer) -> str:
    """Return the number of iterations and the size of each."""
    data = trainer.datamodule
    actions, tokens = data.actions_per_iteration, data.max_new_tokens
    return (
        f"{trainer.max_epochs} x {actions} actions of at most {tokens} tokens "
        f"(up to {actions * tokens:,} tokens each), passes: {data.update_epochs}"
    )


def checkpoint_line(trainer: Trainer, module: LightningModule) -> str:
    """Return the expected sizes of the checkpoints: weights, and AdamW's two moments."""
    sizes = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and not trainer.fast_dev_run:
            optimizer = not callback.save_weights_only
            state = saved_state(module, optimizer=optimizer).values()
            weights = {id(tensor): tensor.nbytes for tensor in state}  # tied: once
            total = sum(weights.values()) + 2 * optimizer * trained_bytes(module)
            sizes.append(f"{callback.filename} about {size(total / MIB)}")
    return ", ".join(sizes)


def trained_bytes(module: nn.Module) -> int:
    """Return the size of the trained parameters."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def memory_line(trainer: Trainer, module: LightningModule) -> str:
    """Return the expected peak memory of a process."""
    if not isinstance(module, OnPolicyAlgorithm):
        return f"{size(peak_memory_mib(module.device))} so far"
    peak, prompts = memory(trainer, module)
    return (
        f"about {size(peak)} if actions have the greatest length, "
        f"{size(prompts)} more per 100 tokens of prompts that differ"
    )


def memory(trainer: Trainer, module: OnPolicyAlgorithm) -> tuple[float, float]:
    """Return the expected peak of a process in MiB without prompts, and of 100 prompt tokens.

    Sum of the memory so far, gradients, optimizer moments, stored actions and a training step.
    Equal prompts are computed once and count as none.
    """
    data, policy, critic = trainer.datamodule, module.policy, module.critic
    config = policy.model.config.get_text_config()
    hidden, layers = policy.hidden_size, getattr(config, "num_hidden_layers", 1)
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    # language models with gradients: the policy, and a critic that is more than a head
    trunks = 1 + any(
        p.requires_grad and not name.startswith("head")
        for name, p in (critic.named_parameters() if critic is not None else ())
    )
    layer = STEP_HIDDEN * hidden + STEP_INTERMEDIATE * inner
    stored = trunks * layers * hidden + layer if policy.checkpointed else trunks * layers * layer
    step = data.minibatch_size * data.max_new_tokens  # tokens of a training step
    chunk = min(step, module.settings.logits_chunk_size)
    # hidden states of policy, reference and critic per token
    floats = data.actions_per_rank * data.max_new_tokens * 3 * hidden
    floats += step * stored + STEP_VOCABULARY * policy.vocabulary_size * chunk
    peak = peak_memory_mib(module.device) + (3 * trained_bytes(module) + 4 * floats) / MIB
    return peak, 100 * data.minibatch_size * stored * 4 / MIB

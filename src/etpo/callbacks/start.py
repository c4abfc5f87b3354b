"""The block that is printed before the first iteration: device, sizes, expected memory."""

import resource
import sys
from pathlib import Path

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
        self.folder, self.environment, self.model = Path(folder), environment, model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on all ranks: reading sharded weights is a collective
        rows = [
            ("device", device_line(trainer, pl_module)),
            ("parameters", parameters_line(pl_module)),
            ("iterations", iterations_line(trainer)),
            ("memory", memory_line(trainer, pl_module)),
            *(("checkpoints", line) for line in checkpoint_lines(trainer, pl_module)),
            ("folder", str(self.folder)),
        ]
        if not trainer.is_global_zero:
            return
        task = getattr(trainer.datamodule.environment, "task_name", self.environment)
        if self.model == "tiny" and task != "data_science":
            print(embedded_model_warning(task), file=sys.stderr)
        console = Console(soft_wrap=True, highlight=False)
        algorithm = algorithm_name(type(pl_module).__name__)
        names = escape(f"{self.environment}, {self.model}")
        console.print(f"[bold]{algorithm}[/bold] on {names}")
        for label, text in rows:
            console.print(f"  {label:<18}{text}", markup=False)


def embedded_model_warning(task: str) -> str:
    """Return the warning about a run that is unlikely to learn."""
    return (
        f"warning: the embedded model (model=tiny) writes scikit-learn programs, not {task}; "
        "model=causal_lm model.name_or_path=<id or folder> takes another model"
    )


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


def checkpoint_lines(trainer: Trainer, module: LightningModule) -> list[str]:
    """Return the expected sizes of the checkpoints in one line; none without checkpoints."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    files = [
        f"{c.filename} about {size(checkpoint_mib(module, optimizer=not c.save_weights_only))}"
        for c in callbacks
    ]
    return [", ".join(files)] if files and not trainer.fast_dev_run else []


def checkpoint_mib(module: LightningModule, *, optimizer: bool) -> float:
    """Return the size of a checkpoint's weights and of AdamW's two moments of the trained ones."""
    state = saved_state(module, optimizer=optimizer)
    weights = {id(tensor): tensor.nbytes for tensor in state.values()}  # tied: once
    return (sum(weights.values()) + (2 * trained_bytes(module) if optimizer else 0)) / MIB


def trained_bytes(module: nn.Module) -> int:
    """Return the size of the trained parameters."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def memory_line(trainer: Trainer, module: LightningModule) -> str:
    """Return the expected peak memory of a process."""
    if not isinstance(module, OnPolicyAlgorithm):
        return f"{size(held_mib(module.device))} so far"
    peak, prompts = memory(trainer, module)
    return (
        f"about {size(peak)} if actions have the greatest length, "
        f"{size(prompts)} more per 100 tokens of prompts that differ"
    )


def memory(trainer: Trainer, module: OnPolicyAlgorithm) -> tuple[float, float]:
    """Return the expected peak of a process in MiB without prompts, and of 100 prompt tokens.

    Sum of present memory, gradients, the optimizer's moments, stored actions and a training step.
    Equal prompts are computed once and count as none.
    """
    now = held_mib(module.device)
    data, policy = trainer.datamodule, module.policy
    config = policy.model.config.get_text_config()
    hidden, layers = policy.hidden_size, getattr(config, "num_hidden_layers", 1)
    chunk = module.logits_chunk_size
    actions = data.actions_per_rank * data.max_new_tokens  # tokens of an iteration
    step = data.minibatch_size * data.max_new_tokens  # of a training step
    width = module.annotated_width()  # floats per stored token
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    layer = STEP_HIDDEN * hidden + STEP_INTERMEDIATE * inner
    trunks = trained_trunks(module)
    if policy.checkpointed:
        activations = trunks * layers * hidden + layer
    else:
        activations = trunks * layers * layer
    distributions = STEP_VOCABULARY * policy.vocabulary_size * min(step, chunk or step)
    floats = actions * width + step * activations + distributions
    peak = now + (3 * trained_bytes(module) + 4 * floats) / MIB
    return peak, 100 * data.minibatch_size * activations * 4 / MIB


def held_mib(device: torch.device) -> float:
    """Return the present memory: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = Path("/proc/self/statm")
    if not pages.exists():  # not Linux
        return peak_memory_mib(device)
    return int(pages.read_text().split()[1]) * resource.getpagesize() / MIB


def trained_trunks(module: OnPolicyAlgorithm) -> int:
    """Count the language models with gradients in a training step: policy, and perhaps critic."""
    critic = module.critic
    own = critic is not None and any(
        p.requires_grad for name, p in critic.named_parameters() if not name.startswith("head")
    )
    return 1 + own

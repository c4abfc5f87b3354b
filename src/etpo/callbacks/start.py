"""What is printed before the first iteration: what is trained, on what, and what it will take."""

import resource
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from torch import nn

from etpo.algorithms.base import OnPolicyAlgorithm
from etpo.callbacks.summary import peak_memory_mib

MIB = 2**20
# Floats per token that a training step holds beside the annotated actions: for every entry of the
# vocabulary, and in every layer by hidden and by intermediate size. Fitted to the measurements of
# docs/benchmarks.md.
STEP_VOCABULARY, STEP_HIDDEN, STEP_INTERMEDIATE = 18, 16, 6


class StartReport(Callback):
    """Prints on rank zero, when the models are on their device.

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
        console = Console(soft_wrap=True, highlight=False)
        algorithm = type(pl_module).__name__.lower()
        names = escape(f"{self.environment}, {self.model}")
        console.print(f"[bold]{algorithm}[/bold] on {names}")
        for label, text in rows:
            console.print(f"  {label:<18}{text}", markup=False)


def device_line(trainer: Trainer, module: LightningModule) -> str:
    """Kind of device, precision, processes; threads on a CPU."""
    parts = [str(module.device), str(trainer.precision)]
    if module.device.type == "cuda":
        parts[0] += f" ({torch.cuda.get_device_name(module.device)})"
    if module.device.type == "cpu":
        parts.append(f"threads: {torch.get_num_threads()}")
    if trainer.world_size > 1:
        parts.append(f"processes: {trainer.world_size}")
    return ", ".join(parts)


def parameters_line(module: nn.Module) -> str:
    """Trained parameters, and all with critics and reference; shared ones count once."""
    return f"{short(count(module, trained=True))} trained of {short(count(module))} in all"


def count(module: nn.Module, *, trained: bool = False) -> int:
    """Parameters of a module; with `trained` those that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def short(number: int) -> str:
    """1234567 -> 1.2M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def size(mib: float) -> str:
    """Mebibytes in a readable unit."""
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def iterations_line(trainer: Trainer) -> str:
    """How many there are, and what each costs."""
    data = trainer.datamodule
    actions, tokens = data.actions_per_iteration, data.max_new_tokens
    return (
        f"{trainer.max_epochs} x {actions} actions of at most {tokens} tokens "
        f"(up to {actions * tokens:,} tokens each), passes: {data.update_epochs}"
    )


def checkpoint_lines(trainer: Trainer, module: LightningModule) -> list[str]:
    """The sizes of the files that are written, one line; none without checkpoints."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    files = [
        f"{c.filename} about {size(checkpoint_mib(module, optimizer=not c.save_weights_only))}"
        for c in callbacks
    ]
    return [", ".join(files)] if files and not trainer.fast_dev_run else []


def checkpoint_mib(module: LightningModule, *, optimizer: bool) -> float:
    """A checkpoint's weights, and AdamW's two moments of what is trained."""
    content: dict[str, Any] = {"state_dict": module.state_dict(keep_vars=True)}
    if optimizer:  # the module may keep less beside none
        content["optimizer_states"] = []
    module.on_save_checkpoint(content)
    weights = {id(tensor): tensor.nbytes for tensor in content["state_dict"].values()}  # tied: once
    moments = 2 * trained_bytes(module) if optimizer else 0
    return (sum(weights.values()) + moments) / MIB


def trained_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def memory_line(trainer: Trainer, module: LightningModule) -> str:
    """The expected peak of a process, and what it is for."""
    if not isinstance(module, OnPolicyAlgorithm):
        return f"{size(held_mib(module.device))} so far"
    peak, prompts = memory(trainer, module)
    return (
        f"about {size(peak)} if actions have the greatest length, "
        f"{size(prompts)} more per 100 tokens of prompts that differ"
    )


def memory(trainer: Trainer, module: OnPolicyAlgorithm) -> tuple[float, float]:
    """Expected peak of a process in MiB, without prompts, and what 100 tokens of them add.

    It is what is held now, gradients, the optimizer's moments, annotated actions and a training
    step. Equal prompts are computed once and count as none.
    """
    now = held_mib(module.device)
    data, policy = trainer.datamodule, module.policy
    config = policy.model.config.get_text_config()
    hidden, layers = policy.hidden_size, getattr(config, "num_hidden_layers", 1)
    chunk = module.logits_chunk_size
    actions = data.actions_per_rank * data.max_new_tokens  # tokens of an iteration
    step = data.minibatch_size * data.max_new_tokens  # of a training step
    width = module.annotated_width()  # floats of an annotated token
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
    """What is held now: of this process on a CPU, of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    pages = Path("/proc/self/statm")
    if not pages.exists():  # not Linux
        return peak_memory_mib(device)
    return int(pages.read_text().split()[1]) * resource.getpagesize() / MIB


def trained_trunks(module: OnPolicyAlgorithm) -> int:
    """Language models that a training step goes back through: the policy, and a critic's own."""
    critic = module.critic
    own = critic is not None and any(
        p.requires_grad for name, p in critic.named_parameters() if not name.startswith("head")
    )
    return 1 + own

"""A small run: known rewards, no language model, the real Trainer."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import wandb
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from etpo.rollout.metrics import rollout_metrics
from etpo.rollout.types import Record, Rollout

from ..by_token import actions_of

# per iteration: rewards of two actions in each of two environments; a failure is -1
REWARDS = ((-1.0, 0.5, -1.0, 0.25), (0.5, 0.75, -1.0, 0.5), (0.25, 0.5, 0.75, 0.5), (1.0,) * 4)
GREEDY = (0.25, 0.75, 0.5, 0.625)


def records(iteration: int, rank: int = 0) -> list[Record]:
    """Action `a{iteration}.{rank}.{number}`; a rank adds 1/8 to what succeeded."""
    rows = []
    for number, reward in enumerate(REWARDS[iteration]):
        failed = reward < 0
        rows.append(
            Record(
                env=number % 2,
                attempt=number // 2 + 1,
                prompt="def f():\n",
                action=f"a{iteration}.{rank}.{number}",
                reward=reward if failed else reward + rank / 8,
                error="ValueError: no" if failed else None,
                cached=number == 3,
            )
        )
    return rows


def rollout(iteration: int, rank: int = 0) -> Rollout:
    """Every action is of 5 tokens; generation took 2 s."""
    rows = records(iteration, rank)
    mask = torch.ones(4, 5, dtype=torch.bool)
    ids = torch.zeros(4, 5, dtype=torch.long)
    flags = torch.zeros(4, dtype=torch.bool)
    reward = torch.tensor([row.reward for row in rows])
    step = torch.tensor([row.attempt - 1 for row in rows])
    outcome = {"rewards": reward, "terminated": flags, "truncated": ~flags, "step": step}
    actions = actions_of(ids, mask, ids, mask, **outcome)
    return Rollout(actions, None, rows, 2, 0, generate_seconds=2.0, score_seconds=0.5)


class Environment:
    """What callbacks may use of an environment without a script writer."""

    on_score = None


class ScriptEnvironment(Environment):
    """One that writes its best action itself."""

    def write_best_action(self, folder: Path, action: str) -> None:
        (folder / "best_action.py").write_text(f"# script\n{action}")


class Batches(IterableDataset):
    """Collects when it is iterated, as the on-policy buffer does."""

    def __init__(self, datamodule: "DataModule") -> None:
        self.datamodule = datamodule

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[torch.Tensor]:
        data = self.datamodule
        data.rollout = rollout(data.trainer.current_epoch, data.trainer.global_rank)
        if data.on_progress is not None:
            data.on_progress("rollout", 2, 2)
        if data.environment.on_score is not None:
            data.environment.on_score(1, 4)
        data.trainer.lightning_module.iteration_metrics = rollout_metrics(data.rollout) | {
            "rollout/kl_to_reference": 0.125
        }
        yield from torch.ones(2, 1)


class DataModule(LightningDataModule):
    actions_per_iteration = 4
    max_new_tokens = 5
    update_epochs = 1

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        self.environment = environment
        self.on_progress = None
        self.rollout = None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(self), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(1, 1), batch_size=None)


class Module(LightningModule):
    """Logs where the algorithms do; raises `failure` in the first step of iteration `fails_at`."""

    def __init__(self, fails_at: int | None = None, failure: BaseException | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.ones_(self.layer.bias)
        self.fails_at, self.failure = fails_at, failure
        self.iteration_metrics: dict[str, float] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == self.fails_at and self.failure is not None:
            raise self.failure
        if batch_idx == 0:
            self.log_dict(
                self.iteration_metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
            )
        loss = self.layer(batch).pow(2).mean()
        self.log("train/critic_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/reward", GREEDY[self.current_epoch], batch_size=1)


def run(
    callbacks: list[Callback],
    max_epochs: int,
    *,
    loggers: list = (),
    ckpt_path: Path | None = None,
    environment: Environment | None = None,
    module: Module | None = None,
    **options: object,
) -> Trainer:
    """Fits, as `etpo-train` does; an interruption leaves `trainer.interrupted` true."""
    options = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | options
    trainer = Trainer(
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=list(loggers),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            module or Module(), DataModule(environment or Environment()), ckpt_path=ckpt_path
        )
    except SystemExit:
        if not trainer.interrupted:
            raise
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after an interruption
    return trainer


def last_checkpoint(folder: Path) -> ModelCheckpoint:
    """Writes `folder/checkpoints/last.ckpt` after every iteration."""
    return ModelCheckpoint(
        folder / "checkpoints",
        "last",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


@pytest.fixture
def fit() -> Callable[..., Trainer]:
    return run


@pytest.fixture
def interrupted() -> Callable[[int], Module]:
    """A module that is interrupted from the keyboard in the iteration given."""
    return lambda iteration: Module(iteration, KeyboardInterrupt())


@pytest.fixture
def crashing() -> Callable[[int], Module]:
    """A module that fails in the iteration given."""
    return lambda iteration: Module(iteration, RuntimeError("broken"))


@pytest.fixture
def script_environment() -> ScriptEnvironment:
    return ScriptEnvironment()


@pytest.fixture
def sampled() -> Callable[..., list[Record]]:
    """The records of (iteration, rank=0)."""
    return records


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[], ModelCheckpoint]:
    """Builds the callback that writes `tmp_path/checkpoints/last.ckpt` after every iteration."""
    return lambda: last_checkpoint(tmp_path)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B offline, without key or saved login."""
    for variable in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # restored at the end: the logger sets it
    wandb.teardown()  # it has read the variables once

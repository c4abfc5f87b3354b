"""`etpo-sft data.source=...`: fit a policy to examples, and write it as a Hugging Face folder."""

import math
import random
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from etpo.config import check_missing
from etpo.console import console_script
from etpo.errors import MAX_SEED, ConfigError, check_integer, check_range
from etpo.export import new_folder, write_folder
from etpo.overrides import override
from etpo.resume import resume_arguments
from etpo.run_folder import held, save_config
from etpo.runtime import INTERRUPTED, TERMINATED, silence_libraries
from etpo.sft_data import read_examples
from etpo.train import fit

if TYPE_CHECKING:  # imported late, so that bad input is refused before PyTorch is loaded
    from lightning import Trainer

SCHEDULES = ("linear", "cosine", "constant_with_warmup")


def check_fit(cfg: DictConfig) -> None:
    """Raise ConfigError for a value of `data` or `fit` that is out of range."""
    data, fit = cfg.data, cfg.fit
    check_integer("data.batch_size", data.batch_size, 1)
    check_integer("data.max_answer_tokens", data.max_answer_tokens, 1)
    check_integer("data.num_programs", data.num_programs, 1)
    check_range("data.val_share", data.val_share, 0, 0.9)
    check_range("data.top_share", data.top_share, 0, 1, above=True)
    check_range("data.mistake_rate", data.mistake_rate, 0, 1)
    if data.min_return is not None:
        check_range("data.min_return", data.min_return, -float("inf"), float("inf"))
    check_range("fit.lr", fit.lr, 0, float("inf"), above=True)
    check_range("fit.warmup_share", fit.warmup_share, 0, 1)
    check_range("fit.weight_decay", fit.weight_decay, 0, float("inf"))
    check_integer("fit.logits_chunk_size", fit.logits_chunk_size, 1)
    if fit.schedule not in SCHEDULES:
        raise ConfigError(f"fit.schedule={fit.schedule}: allowed are {', '.join(SCHEDULES)}")


def build(cfg: DictConfig) -> tuple["Trainer", dict[str, Any]]:
    """Return the trainer and the arguments of its `fit`; load the model last."""
    from lightning import seed_everything

    from etpo.checkpoints import check_fits, load_resumable
    from etpo.models.chat_template import ChatTemplate
    from etpo.sft_callbacks import callbacks_of
    from etpo.sft_module import ExampleData, SupervisedFit, encode

    silence_libraries()  # again: Lightning sets its log level when it is imported
    path, data = cfg.ckpt_path, dict(cfg.data)
    content = None if path is None else load_resumable(path, cfg.trainer.max_epochs)
    max_answer_tokens = data.pop("max_answer_tokens")
    batches = {key: data.pop(key) for key in ("batch_size", "val_share")}
    chat = isinstance(instantiate(cfg.model.prompt), ChatTemplate)
    conversations = read_examples(**data, chat=chat, seed=cfg.seed)
    seed_everything(cfg.seed, workers=True, verbose=False)
    # plain lists: peft writes model.lora as JSON
    policy = instantiate(cfg.model, _convert_="all")()
    policy.reference_model = None
    answers, left_out = encode(policy, conversations, max_answer_tokens)
    datamodule = ExampleData(answers, **batches, pad_id=policy.pad_id, seed=cfg.seed)
    options = {} if datamodule.held_out else {"limit_val_batches": 0}
    callbacks = callbacks_of(cfg, bool(datamodule.held_out))
    trainer = instantiate(cfg.trainer, logger=False, callbacks=callbacks, **options)
    if trainer.world_size > 1:
        raise ConfigError(f"trainer.devices={cfg.trainer.devices}: allowed is 1, one process")
    per_epoch = math.ceil(len(datamodule.batches) / trainer.accumulate_grad_batches)
    module = SupervisedFit(policy, steps=per_epoch * trainer.max_epochs, **cfg.fit)
    if content is not None:
        check_fits(module, content, path)
    print(
        f"{len(datamodule.fitted)} examples, {len(datamodule.held_out)} for validation, "
        f"{sum(len(answer.action_ids) for answer in answers):,} tokens of answers"
        + (f"; {left_out} longer ones are left out" if left_out else ""),
        flush=True,
    )
    return trainer, {"model": module, "datamodule": datamodule, "ckpt_path": path}


def best_weights(trainer: "Trainer", module: Any) -> None:
    """Load the weights of the epoch with the lowest validation loss, if there is validation."""
    from etpo.checkpoints import load_checkpoint, load_weights

    for callback in trainer.checkpoint_callbacks:
        if callback.monitor is not None and callback.best_model_path:
            path = callback.best_model_path
            load_weights(module, load_checkpoint(path)["state_dict"], path)


def next_command(cfg: DictConfig, folder: Path) -> str:
    """Return the command that trains the fitted model, with the model's options of this run."""
    hydra = HydraConfig.get()
    own = [o for o in hydra.overrides.task if o.startswith(("model.", "model/"))]
    own = [o for o in own if not o.startswith("model.name_or_path=")]
    words = [f"model={hydra.runtime.choices['model']}"]
    words += [override("model.name_or_path", str(folder.absolute())), *own]
    return shlex.join(["etpo-train", *words])


def sft(cfg: DictConfig) -> Path:
    """Fit with the configuration `cfg`; return the folder of the fitted model."""
    check_missing(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # raises for an interpolation of an unknown key
    check_integer("seed", cfg.seed, 0, MAX_SEED)
    check_integer("trainer.max_epochs", cfg.trainer.max_epochs, 1)
    check_fit(cfg)
    out = new_folder(str(cfg.out))
    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    trainer, arguments = build(cfg)
    save_config(Path(cfg.paths.output_dir), cfg)
    status = fit(trainer, arguments)
    if status == "interrupted":
        sys.exit(TERMINATED if trainer.received_sigterm else INTERRUPTED)
    best_weights(trainer, arguments["model"])
    write_folder(arguments["model"].policy, out, merge=True)
    return out


@console_script("sft", resume_arguments)
def main(cfg: DictConfig) -> None:
    """Console script: `etpo-sft data.source=... [key=value ...]`."""
    with held(cfg):
        folder = sft(cfg)
    print(f"written: {folder}\nnext: {next_command(cfg, folder)}")


if __name__ == "__main__":
    main()

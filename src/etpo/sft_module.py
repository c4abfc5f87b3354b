"""Fit a policy to answers: encoded examples, batches, the loss and its Lightning module."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import get_scheduler

from etpo.algorithms.optimization import trained_state
from etpo.environments.validation import error_prefix, shown
from etpo.errors import ConfigError
from etpo.models.chunked_logits import reduce_in_chunks
from etpo.models.distribution import token_distribution
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prefix_tree import prefix_tree
from etpo.models.prompting import Turn
from etpo.models.token_text import continued_ids
from etpo.sft_data import Conversation, Example


class Answer(NamedTuple):
    """Tokens of a prompt, and of the action that answers it, with the token that ends it."""

    prompt_ids: tuple[int, ...]
    action_ids: tuple[int, ...]


class AnswerBatch(NamedTuple):
    """Arguments of `prefix_tree`: prompts padded on the left, actions on the right."""

    prompt_ids: Tensor  # int64 [B, P]
    prompt_mask: Tensor  # bool [B, P]
    action_ids: Tensor  # int64 [B, L]
    action_mask: Tensor  # bool [B, L]


def encode(
    policy: LanguageModelPolicy, conversations: Sequence[Conversation], max_answer_tokens: int
) -> tuple[list[Answer], int]:
    """Encode examples as the sampler would have sampled them.

    Returns:
        The answers of at most `max_answer_tokens` tokens that fit to the model's context, and the
        number of the others.

    Raises:
        ConfigError: the tokenizer cannot spell an answer, or an answer would end before its end.
    """
    answers, left_out = [], 0
    for conversation in conversations:
        turn = None
        for example in conversation:
            turn = encode_turn(policy, example, turn)
            tokens = len(turn.prompt_ids) + len(turn.action_ids)
            if len(turn.action_ids) > max_answer_tokens or tokens > policy.context_size:
                left_out += 1
            else:
                answers.append(Answer(tuple(turn.prompt_ids), tuple(turn.action_ids)))
    if not answers:
        raise ConfigError(
            f"data.max_answer_tokens={max_answer_tokens}: all {left_out} answers are longer; "
            "allowed is a larger number, up to the model's context"
        )
    return answers, left_out


def encode_turn(policy: LanguageModelPolicy, example: Example, turn: Turn | None) -> Turn:
    """Encode an example that follows `turn`, with the token that ends its action."""
    with error_prefix(example.place):
        prompts = policy.encode([example.observation], [turn])
    rest = prompts.rests[0]
    ids = [*continued_ids(policy.tokenizer, rest + example.answer), policy.end_token]
    end = next((place for place, token in enumerate(ids) if token in policy.stop_ids), len(ids))
    text = policy.decode(ids[: end + 1], rest)
    if text != example.answer:
        raise ConfigError(
            f"{example.place}: the answer {shown(example.answer)} reads {shown(text)} as an action "
            f"of {policy.key}; allowed are texts that the tokenizer can spell, without stop tokens "
            f"and without the model.stop_strings {policy.stop_strings}"
        )
    prompt_ids = prompts.ids[0].tolist()
    return Turn(example.observation, prompt_ids, rest, ids, example.answer)


def collate(answers: Sequence[Answer], pad_id: int) -> AnswerBatch:
    """Pad answers to a batch."""
    tensors = []
    for side, rows in zip(("left", "right"), zip(*answers, strict=True), strict=True):
        ids = pad_sequence(
            [torch.tensor(row) for row in rows],
            batch_first=True,
            padding_value=-1,
            padding_side=side,
        )
        tensors += [ids.where(ids >= 0, pad_id), ids >= 0]
    return AnswerBatch(*tensors)


class ExampleBatches:
    """Batches of row numbers in a new order in each epoch, equal prompts one after the other.

    A prompt that occurs several times in a batch is computed once.
    """

    def __init__(self, answers: Sequence[Answer], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.groups = list(by_prompt(answers).values())
        self.size = len(answers)

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # a generator: Lightning sets the epoch of a resumed run after it calls `iter`
        rng = random.Random(f"{self.seed} {self.epoch}")
        groups = [rng.sample(group, len(group)) for group in self.groups]
        rng.shuffle(groups)
        rows = [row for group in groups for row in group]
        for start in range(0, self.size, self.batch_size):
            yield rows[start : start + self.batch_size]


def by_prompt(answers: Sequence[Answer]) -> dict[tuple[int, ...], list[int]]:
    """Return the row numbers of each distinct prompt."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, answer in enumerate(answers):
        groups[answer.prompt_ids].append(row)
    return groups


def held_out(answers: Sequence[Answer], share: float, seed: int) -> set[int]:
    """Draw the validation rows: whole prompts, or rows if there is only one prompt."""
    groups = list(by_prompt(answers).values())
    if len(groups) == 1:
        groups = [[row] for row in groups[0]]
    random.Random(seed).shuffle(groups)
    rows: set[int] = set()
    for group in groups[:-1]:  # some prompt is left to train on
        if len(rows) + len(group) / 2 <= share * len(answers):
            rows.update(group)
    return rows


class ExampleData(LightningDataModule):
    """Encoded answers, split by `seed` into training and validation rows.

    Args:
        batch_size: answers per step.
        val_share: share of the answers in the validation set, of whole prompts.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        *,
        batch_size: int,
        val_share: float,
        pad_id: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        rows = held_out(answers, val_share, seed)
        self.fitted = [answer for row, answer in enumerate(answers) if row not in rows]
        self.held_out = [answers[row] for row in sorted(rows)]
        self.batches = ExampleBatches(self.fitted, batch_size, seed)
        self.val_batches = ExampleBatches(self.held_out, batch_size, seed)

    def train_dataloader(self) -> DataLoader[AnswerBatch]:
        return self._loader(self.fitted, self.batches)

    def val_dataloader(self) -> DataLoader[AnswerBatch]:
        return self._loader(self.held_out, self.val_batches)

    def _loader(self, answers: list[Answer], batches: ExampleBatches) -> DataLoader[AnswerBatch]:
        return DataLoader(
            answers,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=lambda rows: collate(rows, self.pad_id),
        )


def negative_log_likelihood(
    policy: LanguageModelPolicy, batch: AnswerBatch, chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute the mean of -log pi over the actions' tokens, and log pi of each token.

    pi is softmax(logits / temperature) over the whole vocabulary, without truncation by `min_p`.

    Returns:
        [] with gradient, and [B, L] without, 0 on padding.
    """
    tree = prefix_tree(*batch)
    counts = tree.sum_to_taken(batch.action_mask.float())

    def log_probs(hidden: Tensor, taken: Tensor) -> tuple[Tensor]:
        logits = policy.logits(hidden)
        return (token_distribution(logits, policy.temperature).log_probs.gather(-1, taken),)

    def reduce(values: Tensor) -> Tensor:
        return -(counts * values).sum() / counts.sum()

    inputs = policy.hidden_states(tree), tree.taken
    parameters = policy.lm_head_parameters()
    loss, (values,) = reduce_in_chunks(log_probs, reduce, chunk, *inputs, parameters=parameters)
    return loss, tree.of_taken(values)


class SupervisedFit(LightningModule):
    """Minimise the mean -log pi of answers' tokens with AdamW.

    Args:
        policy: its reference is not used.
        steps: number of optimizer steps of the schedule.
        lr: learning rate after the warm-up.
        schedule: name of a scheduler of transformers, by optimizer step.
        warmup_share: share of the steps in which the learning rate rises from 0.
        weight_decay: of AdamW.
        logits_chunk_size: number of prefixes whose logits are in memory at once.
    """

    def __init__(
        self,
        policy: LanguageModelPolicy,
        *,
        steps: int,
        lr: float = 5e-4,
        schedule: str = "cosine",
        warmup_share: float = 0.05,
        weight_decay: float = 0.0,
        logits_chunk_size: int = 1024,
    ) -> None:
        super().__init__()
        self.policy, self.steps, self.lr, self.schedule = policy, steps, lr, schedule
        self.warmup_share, self.weight_decay = warmup_share, weight_decay
        self.logits_chunk_size = logits_chunk_size
        self.strict_loading = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.policy.trainable_parameters(), lr=self.lr, weight_decay=self.weight_decay
        )
        warmup = round(self.warmup_share * self.steps)
        scheduler = get_scheduler(self.schedule, optimizer, warmup, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        self.trainer.datamodule.batches.epoch = self.current_epoch

    def training_step(self, batch: AnswerBatch, batch_idx: int) -> Tensor:
        loss, _ = negative_log_likelihood(self.policy, batch, self.logits_chunk_size)
        if not torch.isfinite(loss):
            raise ConfigError(
                f"fit.lr={self.lr}: the loss is {float(loss)} in step {self.global_step + 1}; "
                "allowed are finite losses. A smaller learning rate may help"
            )
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._log({"train/loss": loss, "train/lr": rate}, batch)
        return loss

    def validation_step(self, batch: AnswerBatch, batch_idx: int) -> None:
        loss, _ = negative_log_likelihood(self.policy, batch, self.logits_chunk_size)
        self._log({"val/loss": loss}, batch)

    def _log(self, metrics: dict[str, Any], batch: AnswerBatch) -> None:
        """Log means over the epoch, weighted by the number of tokens."""
        count = int(batch.action_mask.sum())
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self, checkpoint)

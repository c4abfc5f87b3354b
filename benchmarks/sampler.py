"""Compare the sampler with transformers' `generate` on the same prompts, in one run.

    python benchmarks/sampler.py [--models 0.9M 25M] [--rounds 3]

Both sample 64 actions of 100 tokens from a random float32 Llama, on 1, 16 or 64 prompts of 165
tokens. The sampler also records log-probabilities. Both alternate in each round; the table has
medians. The script writes `sampler.csv` and `sampler.png`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from common import MODELS, RESULTS, endless, observation, prompt_of, save_model, write
from matplotlib.figure import Figure
from transformers import GenerationConfig

from etpo.generation import sampler
from etpo.models.policy import LanguageModelPolicy
from etpo.models.prompting import PromptBatch

ACTIONS, PROMPT_TOKENS, NEW_TOKENS = 64, 165, 100
PROMPTS = {"1 prompt": 1, "16 prompts": 16, "64 prompts": 64}


def variants(
    policy: LanguageModelPolicy, prompts: PromptBatch
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return both samplers as functions that return token ids [64, 100]."""
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=policy.pad_id
    )  # without an EOS token
    policy.model.generation_config = settings

    def generate() -> torch.Tensor:
        output = policy.model.generate(input_ids=prompts.ids, attention_mask=prompts.mask.long())
        return output[:, prompts.ids.shape[1] :]

    def sample() -> torch.Tensor:
        return sampler.generate(policy, prompts, NEW_TOKENS, torch.Generator().manual_seed(0)).ids

    return {"generate": generate, "sampler": sample}


@torch.no_grad()
def measure(models: Sequence[str], rounds: int) -> pd.DataFrame:
    """Measure every call; columns model, prompts, variant, seconds."""
    rows = []
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            policy = endless(save_model(Path(folder) / "model", name))
        for label, count in PROMPTS.items():
            texts = [prompt_of(PROMPT_TOKENS, f"# {number:02d}\n") for number in range(count)]
            prompts = policy.encode([observation(t) for t in texts] * (ACTIONS // count))
            both = variants(policy, prompts)
            for number in range(rounds + 1):
                for variant, run in both.items():
                    start = time.perf_counter()
                    ids = run()
                    seconds = time.perf_counter() - start
                    assert ids.shape == (ACTIONS, NEW_TOKENS)
                    if number > 0:  # the first warms up
                        rows.append((name, label, variant, seconds))
                        print(f"{name}, {label}, {variant}: {seconds:.2f} s", flush=True)
    return pd.DataFrame(rows, columns=["model", "prompts", "variant", "seconds"])


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return median seconds of both and their ratio."""
    medians = rows.pivot_table(
        index=["model", "prompts"],
        columns="variant",
        values="seconds",
        aggfunc="median",
        sort=False,
    )
    medians["ratio"] = medians["generate"] / medians["sampler"]
    return medians.reset_index()


def figure(medians: pd.DataFrame) -> Figure:
    """Plot sampled tokens per second of both."""
    drawing = Figure(figsize=(7, 3.5), layout="constrained")
    axes = drawing.subplots()
    names = medians["model"] + ", " + medians["prompts"]
    for offset, variant in ((-0.2, "generate"), (0.2, "sampler")):
        places = [position + offset for position in range(len(medians))]
        axes.barh(places, ACTIONS * NEW_TOKENS / medians[variant], height=0.4, label=variant)
    axes.set_yticks(range(len(medians)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")
    axes.legend(frameon=False)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = measure(given.models, given.rounds)
    medians = table(rows)
    write(given.out, "sampler", rows, medians, figure(medians))


if __name__ == "__main__":
    main()

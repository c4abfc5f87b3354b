"""Operators over the vocabulary in chunks of tokens against all tokens at once: memory and time.

    python benchmarks/vocabulary.py [--vocabularies 1024 32016 151665] [--tokens 1024] [--size 128]
        [--chunk 48] [--rounds 3] [--steps 1] [--device cpu] [--out benchmarks/results]

Each goes from hidden states [tokens, size] and heads [vocabulary, size], float32, to a loss and
back to the gradients of both; the forms alternate, each turn in a process of its own. Memory is
what a turn adds to its inputs at the peak: resident memory on the CPU, that of tensors on a GPU.
Beside other programs the processor's seconds say more than the clock's. Writes `vocabulary.csv` and
`vocabulary.png`; the table has medians over rounds and steps.
"""

import argparse
import ctypes
import multiprocessing
import re
import time
from pathlib import Path

import pandas as pd
import torch
from common import RESULTS, write
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etpo.algorithms import losses, returns
from etpo.models.chunked_logits import in_chunks, project_to_vocabulary, reduce_in_chunks

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h
BETA, ETA, CLIP = 0.02, 0.05, 0.3


class Heads:
    """Output layers [V, D] of policy, critic and reference; `trained` of them have gradients."""

    def __init__(self, vocabulary: int, size: int, trained: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("policy", "critic", "ref"):
            weight = torch.randn(vocabulary, size, generator=generator).mul_(size**-0.5).to(device)
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=name in trained)
            setattr(self, name, layer)
        self.trained = [x.weight for x in (self.policy, self.critic) if x.weight.requires_grad]


def log_probs(x: Tensor, head: nn.Module) -> Tensor:
    return project_to_vocabulary(head, x).log_softmax(-1)


def gather_tokens(values: Tensor, taken: Tensor) -> Tensor:
    return values.gather(-1, taken[:, None])[:, 0]


def expected_q(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    return returns.expectation(log_probs(x, heads.policy), project_to_vocabulary(heads.critic, x))


def kl_divergence(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    log_ref = log_probs(x.detach(), heads.ref)
    return returns.kl_divergence(log_probs(x, heads.policy), log_ref)


def log_pi_taken(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    return gather_tokens(log_probs(x, heads.policy), taken)


def q_taken(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    return gather_tokens(project_to_vocabulary(heads.critic, x), taken)


def entropy(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    log_pi = log_probs(x, heads.policy)
    return returns.expectation(log_pi, -log_pi)


def policy_objective(heads: Heads, x: Tensor, taken: Tensor) -> Tensor:
    """ETPO's: doubly robust and pessimistic, against a pi_old that is not pi."""
    with torch.no_grad():
        log_old, log_ref = log_probs(x.roll(1, -1), heads.policy), log_probs(x, heads.ref)
        scores = project_to_vocabulary(heads.critic, x)
        value = torch.zeros_like(scores[..., 0])
        q = losses.dueling_q(value, scores, log_old)
        q = losses.pessimistic_q(q, value, log_old, 1.0)
    log_pi = log_probs(x, heads.policy)
    objective = losses.policy_objective(log_pi, log_ref, log_old, q, BETA, ETA)
    sampled = (gather_tokens(field, taken) for field in (log_pi, log_old, q))
    return objective + losses.clipped_surrogate(*sampled, CLIP)


# what it computes, the heads that it trains, whether any loss may follow
OPERATORS = {
    "E_pi[Q]": (expected_q, ("policy", "critic"), False),
    "KL(pi || pi_ref)": (kl_divergence, ("policy",), False),
    "log pi(a)": (log_pi_taken, ("policy",), False),
    "log pi(a), any loss": (log_pi_taken, ("policy",), True),
    "Q(a)": (q_taken, ("critic",), False),
    "entropy": (entropy, ("policy",), False),
    "policy objective": (policy_objective, ("policy",), False),
}


def resident(field: str) -> int:
    """Bytes of VmRSS or, at its peak, VmHWM."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def turn(
    name: str, vocabulary: int, chunk: int, given: argparse.Namespace
) -> tuple[float, list[tuple[float, float]]]:
    """MiB that the operator adds at its peak; seconds and processor's seconds of each step."""
    operator, trained, any_loss = OPERATORS[name]
    cuda = given.device.startswith("cuda")
    heads = Heads(vocabulary, given.size, trained, given.device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(given.tokens, given.size, generator=generator).to(given.device)
    x.requires_grad_()
    taken = torch.randint(vocabulary, (given.tokens,), generator=generator).to(given.device)

    def function(*read: Tensor) -> tuple[Tensor]:
        return (operator(heads, *read),)

    def step() -> None:
        if any_loss:
            loss = in_chunks(function, chunk, x, taken)[0].mean()
        else:
            loss, _ = reduce_in_chunks(
                function, torch.mean, chunk, x, taken, parameters=heads.trained
            )
        torch.autograd.grad(loss, [x, *heads.trained])
        if cuda:
            torch.cuda.synchronize()

    if not cuda:  # freed blocks of a MiB leave the resident memory at once
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    ones = torch.ones(64, 64, requires_grad=True)  # loads libraries
    checkpoint(torch.mm, ones, ones, use_reentrant=False).sum().backward()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    seconds = []
    for _ in range(given.steps):
        start = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return (peak - before) / MIB, seconds


def measure(given: argparse.Namespace) -> pd.DataFrame:
    """Columns vocabulary, operator, form, round, mib, seconds, cpu_seconds: a row per step."""
    rows = []
    # a fork has the libraries loaded; it is new to the memory that is measured
    context = multiprocessing.get_context("fork")
    for vocabulary in given.vocabularies:
        for number in range(given.rounds):
            for name in given.operators:
                for form, chunk in (("plain", given.tokens), ("chunks", given.chunk)):
                    with context.Pool(1) as pool:
                        mib, seconds = pool.apply(turn, (name, vocabulary, chunk, given))
                    rows += [(vocabulary, name, form, number, mib, *each) for each in seconds]
                    shown = (
                        f"{vocabulary:7} {name:20} {form:7} {mib:9.1f} MiB {seconds[-1][0]:.2f} s"
                    )
                    print(shown, flush=True)
    columns = ["vocabulary", "operator", "form", "round", "mib", "seconds", "cpu_seconds"]
    return pd.DataFrame(rows, columns=columns)


def ratios(measured: pd.DataFrame) -> pd.DataFrame:
    """Medians of both forms and chunks / plain of memory, of time and of the processor's time."""
    fields = ["mib", "seconds", "cpu_seconds"]
    grouped = measured.groupby(["vocabulary", "operator", "form"], sort=False)[fields]
    medians = grouped.median().unstack()
    table = pd.DataFrame(
        {
            f"{field}, {form}": medians[field, form]
            for field in fields
            for form in ("plain", "chunks")
        }
    )
    for field in fields:
        table[f"{field} ratio"] = table[f"{field}, chunks"] / table[f"{field}, plain"]
    return table.reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Memory and time of both forms over the vocabulary, an operator a colour."""
    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    axes = drawing.subplots(1, 2)
    for axis, field, label in zip(axes, ("mib", "seconds"), ("peak, MiB", "step, s"), strict=True):
        for colour, (name, rows) in enumerate(table.groupby("operator", sort=False)):
            for form, line in (("plain", "--"), ("chunks", "-")):
                axis.plot(
                    rows["vocabulary"],
                    rows[f"{field}, {form}"],
                    line,
                    marker=".",
                    color=f"C{colour}",
                    label=name if form == "chunks" else None,
                )
        axis.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel=label)
    axes[0].set_title("dashed: all tokens at once; solid: in chunks", fontsize="small")
    axes[0].legend(fontsize="x-small")
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[1024, 32016, 151665])
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    measured = measure(given)
    table = ratios(measured)
    write(given.out, "vocabulary", measured, table, figure(table))


if __name__ == "__main__":
    main()

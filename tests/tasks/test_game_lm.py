"""The language model for a text game: its tokens, and random play."""

import numpy as np
import pytest
import torch

from etpo.environments.text_env import TextVectorEnv
from etpo.errors import ConfigError
from etpo.models.prompting import CompletionTemplate
from etpo_tasks.game_lm import build_game_lm, line_tokenizer, random_play

from .. import by_token

MOVES = ("<left>", "<right>")
RULES = "Walk along the line.\nThe goal is at its right end.\n"


class Line(TextVectorEnv):
    """A walk on a line of five cells; the prefix shows it."""

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cells = self.np_random.integers(0, 5, self.num_envs)
        return self.observe(), {}

    def step(self, actions):
        self.cells = np.clip(self.cells + [1 if a == MOVES[1] else -1 for a in actions], 0, 4)
        nothing = np.zeros(self.num_envs, dtype=bool)
        return self.observe(), self.cells / 4, nothing, nothing, {}

    def observe(self):
        boards = ("." * c + "P" + "." * (4 - c) for c in self.cells)
        prefixes = (f"{RULES}|{board}|\nMoves: <left> <right>\n" for board in boards)
        return [{"instruction": "", "prefix": p, "suffix": ""} for p in prefixes]


def player(folder, **changes):
    settings = {"moves": MOVES, "init_seed": 0} | changes
    return build_game_lm(str(folder), CompletionTemplate(), environment=Line(8), **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return player(tmp_path_factory.mktemp("player") / "model")


def test_random_play_sees_what_moves_lead_to():
    seen = random_play(Line(8), MOVES, 30, seed=0)
    assert len(seen) == 8 * 31
    assert len({text.splitlines()[2] for text in seen}) == 5
    assert seen == random_play(Line(8), MOVES, 30, seed=0)


def test_a_line_that_is_always_the_same_is_one_token_and_so_is_a_move():
    tokenizer = line_tokenizer(random_play(Line(8), MOVES, 30, seed=0), MOVES)
    text = f"{RULES}|..P..|\nMoves: <left> <right>\n"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    assert pieces[:2] == RULES.splitlines(keepends=True)
    assert [p for p in pieces if p in MOVES] == list(MOVES)
    assert tokenizer.decode(tokenizer("Übermut\tnever seen")["input_ids"]) == "Übermut\tnever seen"
    assert len(tokenizer) <= 1024


def test_it_plays_every_move_alike_and_ends_after_one(made):
    observations, _ = Line(4).reset(seed=1)
    prompts = made.encode(observations)
    for number, move in enumerate(MOVES):
        ids = torch.tensor([[made.tokenizer.convert_tokens_to_ids(move), made.stop_ids[0]]] * 4)
        log_probs = by_token.log_probs(made, prompts.ids, prompts.mask, ids).detach()
        taken = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).exp()
        assert taken[:, 0] == pytest.approx(0.5, abs=0.15), number
        assert (taken[:, 1] > 0.9).all()


def test_it_is_made_once(made, monkeypatch):
    folder = made.model.name_or_path
    monkeypatch.setattr("etpo_tasks.game_lm.random_play", None)
    again = player(folder)
    for ours, theirs in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_its_seed_decides_it(tmp_path, made):
    same, other = (player(tmp_path / str(seed), init_seed=seed) for seed in (0, 1))
    weights = [next(b.model.parameters()) for b in (made, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].shape != weights[2].shape or not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moves": ["<left>"]}, "model.moves=.*: allowed are two different texts or more"),
        ({"moves": ["a", ""]}, "model.moves="),
        ({"init_seed": -1}, "model.init_seed=-1: allowed is from 0"),
    ],
)
def test_bad_input_is_one_line_that_names_its_key(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        player(tmp_path / "model", **changes)

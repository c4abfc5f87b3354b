import json

import pytest

from etpo.callbacks.episodes import EpisodeLog, truncate_lines


def read(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_every_action_is_a_line(tmp_path, fit, sampled):
    fit([EpisodeLog(tmp_path)], 2)
    lines = read(tmp_path)
    expected = [{"iteration": i, **r._asdict()} for i in range(2) for r in sampled(i)]
    assert lines == expected
    keys = ["iteration", "env", "attempt", "prompt", "action", "reward", "error", "cached"]
    assert list(lines[0]) == [*keys, "length_limited", "observation"]
    assert (lines[0]["reward"], lines[0]["error"]) == (-1.0, "ValueError: no")


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(
    tmp_path, fit, interrupted, checkpoint
):
    fit([EpisodeLog(tmp_path), checkpoint()], 4, module=interrupted(2))
    file = tmp_path / "episodes.jsonl"
    kept = file.read_text()
    with file.open("a") as lines:
        lines.write('{"iteration": 2, "env": 0}\n{"iteration": 2, "en')
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit([EpisodeLog(tmp_path), checkpoint()], 4, ckpt_path=last)
    assert file.read_text().startswith(kept)
    assert [line["iteration"] for line in read(tmp_path)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_a_fresh_run_in_a_used_folder_starts_over(tmp_path, fit):
    fit([EpisodeLog(tmp_path)], 2)
    fit([EpisodeLog(tmp_path)], 1)
    assert len(read(tmp_path)) == 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ('{"iteration": 1}\n', '{"iteration": 1}\n'),
        ('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n', '{"iteration": 1}\n'),
        ('{"iteration": 1}\n{"iteration": 1', '{"iteration": 1}\n'),
        ('{"iteration": 1}', ""),
    ],
)
def test_truncate_lines(tmp_path, text, kept):
    file = tmp_path / "lines"
    file.write_text(text)
    truncate_lines(file, 2)
    assert file.read_text() == kept

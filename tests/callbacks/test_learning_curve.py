from etpo.callbacks.learning_curve import LearningCurve, learning_curve

PNG = b"\x89PNG\r\n"


def callback(folder):
    return LearningCurve(folder, "iris", "tiny", 3)


def test_lines_hold_the_metrics_against_actions():
    rows = [
        {"iteration": 0, "rollout/reward": -0.5, "rollout/valid_rate": 0.25},
        {"iteration": 1, "rollout/reward": 0.5, "rollout/valid_rate": 0.75, "val/reward": 1.0},
    ]
    reward, valid = learning_curve(rows, 64, "title").axes
    mean, greedy = (line.get_xydata().tolist() for line in reward.lines)
    assert mean == [[64, -0.5], [128, 0.5]]
    assert greedy == [[128, 1.0]]
    assert valid.lines[0].get_xydata().tolist() == [[64, 0.25], [128, 0.75]]
    assert reward.get_title() == "title"
    assert all((reward.get_ylabel(), valid.get_ylabel(), valid.get_xlabel()))


def test_the_title_names_the_run(tmp_path):
    assert callback(tmp_path).title == "iris, tiny, seed 3"


def test_a_finished_run_leaves_a_figure(tmp_path, fit):
    fit([callback(tmp_path)], 2)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(PNG)


def test_an_interrupted_run_draws_its_completed_iterations(tmp_path, fit, interrupted, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "etpo.callbacks.learning_curve.learning_curve",
        lambda rows, *args: drawn.append(rows) or learning_curve(rows, *args),
    )
    callbacks = [callback(tmp_path)]
    assert fit(callbacks, 4, module=interrupted(2)).interrupted
    assert [row["iteration"] for row in drawn[0]] == [0, 1]
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(PNG)


def test_no_completed_iteration_no_figure(tmp_path, fit, interrupted):
    fit([callback(tmp_path)], 2, module=interrupted(0))
    assert not (tmp_path / "learning_curve.png").exists()

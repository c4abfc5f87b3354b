from etpo.callbacks.best_action import BestAction


def test_the_first_of_the_best_is_kept_as_text(tmp_path, fit):
    callback = BestAction(tmp_path)
    fit([callback], 3)
    # 0.75 is paid in iteration 1 and again in iteration 2
    assert callback.best["action"] == "a1.0.1"
    assert callback.best["iteration"] == 1
    assert (tmp_path / "best_action.txt").read_text() == "a1.0.1"
    assert not (tmp_path / "best_action.py").exists()


def test_the_environment_writes_a_script_where_it_can(tmp_path, fit, script_environment):
    fit([BestAction(tmp_path)], 4, environment=script_environment)
    assert (tmp_path / "best_action.py").read_text() == "# script\na3.0.0"
    assert not (tmp_path / "best_action.txt").exists()


def test_a_failed_action_is_no_script(tmp_path, script_environment):
    callback = BestAction(tmp_path)
    callback.load_state_dict({"best": {"action": "x =", "error": "SyntaxError", "reward": -1.0}})
    callback.write(script_environment)
    assert (tmp_path / "best_action.txt").read_text() == "x ="
    assert not (tmp_path / "best_action.py").exists()


def test_a_resumed_run_goes_on_from_the_best_of_its_checkpoint(
    tmp_path, fit, interrupted, checkpoint
):
    fit([BestAction(tmp_path), checkpoint()], 3, module=interrupted(2))
    (tmp_path / "best_action.txt").write_text("of a later iteration")
    callback = BestAction(tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    # iteration 2 pays 0.75 at most: no improvement
    fit([callback, checkpoint()], 3, ckpt_path=last)
    assert callback.best["iteration"] == 1
    assert (tmp_path / "best_action.txt").read_text() == "a1.0.1"


def test_a_fresh_run_removes_the_files_of_another(tmp_path, fit, interrupted):
    (tmp_path / "best_action.py").write_text("old")
    fit([BestAction(tmp_path)], 1, module=interrupted(0))
    assert not (tmp_path / "best_action.py").exists()

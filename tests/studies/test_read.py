"""Reading studies from their folders, and the labels of methods and data sets."""

import pytest

from etpo.errors import ConfigError
from etpo.studies.read import (
    FILES,
    dataset_label,
    method_labels,
    parse_overrides,
    read_studies,
)


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        (["etpo seed=0", "etpo seed=1", "ppo_kl seed=0"], ["etpo", "etpo", "ppo_kl"]),
        (["etpo algorithm.eta=0.3", "etpo"], ["etpo eta=0.3", "etpo"]),
        (["etpo algorithm.eta=0.3 seed=0", "etpo algorithm.eta=0.3 seed=1"], ["etpo", "etpo"]),
        # all runs of an algorithm share what only it has
        (["etpo", "ppo_kl algorithm.policy_lr=1e-3"], ["etpo", "ppo_kl"]),
        (
            ["etpo model.min_p=0 algorithm.eta=1", "etpo +algorithm.eta=2 environment.dataset=x"],
            ["etpo eta=1 min_p=0", "etpo eta=2"],
        ),
        # two keys that end alike
        (
            ["etpo algorithm.temperature=1", "etpo model.temperature=1"],
            ["etpo algorithm.temperature=1", "etpo model.temperature=1"],
        ),
        (
            ["etpo environment.score_cache=a study=b environment.target=c ckpt_path=d", "etpo"],
            ["etpo", "etpo"],
        ),
    ],
)
def test_the_label_of_a_method(runs, labels):
    choices = [(run.split()[0], parse_overrides(run.split()[1:])) for run in runs]
    assert method_labels(choices) == labels


def test_a_label_stays_as_further_runs_finish(tmp_path, write_run):
    study = tmp_path / "s"
    write_run(study / "a", ["experiment=plain", "seed=0"], [0.1])
    other = write_run(study / "b", ["experiment=other", "seed=0"], [0.1])
    both = read_studies([study]).summary["method"].tolist()
    (other / "summary.json").unlink()
    (first,) = read_studies([study]).summary["method"]
    assert [*both] == ["etpo experiment=other", "etpo experiment=plain"]
    assert first == "etpo experiment=plain"


@pytest.mark.parametrize(
    ("dataset", "path", "label"),
    [
        ("cmc", None, "cmc"),
        ("csv", "data/my_table.csv", "my_table"),
        (None, None, "letters"),
    ],
)
def test_the_label_of_a_data_set(dataset, path, label):
    overrides = {} if path is None else {"environment.path": path}
    assert dataset_label({"dataset": dataset, "environment": "letters"}, overrides) == label


def test_finished_runs_are_read_and_the_others_named(study):
    runs, summary, excluded = read_studies([study])
    assert list(runs) == FILES["runs.csv"]
    assert list(summary) == FILES["summary.csv"]
    assert len(summary) == 10
    assert len(runs) == 40
    run = runs[(runs.method == "ppo_kl") & (runs.seed == 2) & (runs.dataset == "tic_tac_toe")]
    assert run["env_steps"].tolist() == [10, 20, 30, 40]
    assert run["rollout/reward"].tolist() == [0.0, 0.245, 0.49, 0.49]
    assert run["val/reward"].tolist() == [0.01, 0.255, 0.5, 0.5]
    assert run["rollout/kl_to_reference"].tolist() == [0.0, 0.333333, 0.666667, 1.0]
    assert dict(excluded.itertuples(index=False)) == {
        "small/broken seed=9": "failed: seed=9: it broke",
        "small/open seed=8": "unfinished",
        "small/stopped seed=7": "interrupted",
    }


def test_a_run_that_comes_twice_counts_once(study, tmp_path, write_run):
    other = tmp_path / "other"
    overrides = ["algorithm=etpo", "environment.dataset=tic_tac_toe", "seed=1"]
    write_run(other / "again", overrides, [0.0, 0.0])
    runs, summary, excluded = read_studies([study, other])
    assert len(summary) == 10
    assert excluded["reason"].iloc[-1] == f"the same run as {run_name(study, 'etpotic_tac_toe1')}"
    assert runs[runs.seed == 1]["rollout/reward"].max() == 0.99


def run_name(study, name):
    return f"{study.name}/{name} algorithm=etpo environment.dataset=tic_tac_toe seed=1"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("summary.json", "{", "summary.json"),
        ("summary.json", '{"status": "finished"}', "iterations"),
        ("metrics.csv", "iteration\n0\n", "rollout/reward"),
        ("metrics.csv", "iteration,rollout/reward\n0,\n", "rollout/reward"),
        ("metrics.csv", "iteration,rollout/reward\n0,0.5\n", "1 iterations, summary.json 4"),
        (".hydra/hydra.yaml", "hydra: {}", "unreadable"),
    ],
)
def test_an_unreadable_run_is_excluded(study, file, text, words):
    (study / "etpotic_tac_toe1" / file).write_text(text)
    _, summary, excluded = read_studies([study])
    assert len(summary) == 9
    (reason,) = excluded[excluded["run"].str.contains("etpotic")]["reason"]
    assert reason.startswith("unreadable")
    assert words in reason


def test_columns_that_a_run_lacks_stay_empty(tmp_path, write_run):
    folder = write_run(tmp_path / "s" / "c", ["seed=0"], [0.1, 0.2], held_out_auc=None)
    (folder / "metrics.csv").write_text("iteration,rollout/reward\n0,0.1\n1,0.2\n")
    runs, summary, _ = read_studies([tmp_path / "s"])
    assert runs["val/reward"].isna().all()
    assert summary["held_out_auc"].isna().all()


def test_a_study_without_a_finished_run(tmp_path, write_run):
    write_run(tmp_path / "s" / "c", ["seed=0"], [0.1], status="interrupted")
    with pytest.raises(
        ConfigError, match=r"study=s: .*1 are not finished; s/c seed=0: interrupted"
    ):
        read_studies([tmp_path / "s"])

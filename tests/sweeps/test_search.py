"""What Optuna suggests, how that is kept on disk, and what survives an interrupted process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from btu.errors import UserError
from orchestrator.run.study import StudySearch, Suggestion
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sweep import Sweep

TEXT = """
seed: 0
grid: {seed: [0, 1]}
optuna:
  trials: 6
  space:
    defense.alpha: {low: 1.0e-5, high: 1.0e-2, log: true}
    attack.poison_rate: {low: 0.1, high: 0.5, step: 0.1}
    train.epochs: {low: 1, high: 5}
    attack.trigger: [[cf], [cf, mn]]
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    """A function from overrides to a sweep that Optuna searches."""

    def build(*overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(TEXT)
        return load_sweep(path, overrides)

    return build


def measured(suggestion: Suggestion) -> list[dict[str, float]]:
    """Metrics as if few epochs kept ASR low and many made CACC high: no value is best in both."""
    epochs, alpha = suggestion.values["train.epochs"], suggestion.values["defense.alpha"]
    return [{"asr": epochs / 10 + alpha, "cacc": 0.5 + epochs / 20}] * len(suggestion.cells)


def run(search: StudySearch, rounds: int) -> list[Mapping[str, Any]]:
    """Ask and tell; return what was suggested."""
    values = []
    for _ in range(rounds):
        suggestion = search.ask()
        assert suggestion is not None
        values.append(suggestion.values)
        search.tell(suggestion.number, measured(suggestion))
    return values


def test_a_suggestion_is_in_the_space_and_has_its_cells(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = load("optuna.trials=25")
    search = StudySearch(sweep, tmp_path)
    first = search.ask()
    assert first is not None
    assert first.number == 0
    assert list(first.values) == list(sweep.optuna.space)  # type: ignore[union-attr]
    assert first.cells == sweep.expand(first.values)
    assert [cell.varied["seed"] for cell in first.cells] == [0, 1]
    found = [first.values, *run(search, 24)]
    assert all(1e-5 <= values["defense.alpha"] <= 1e-2 for values in found)
    # Steps are free of rounding: 0.1 + 2 x 0.1 is 0.3.
    assert {values["attack.poison_rate"] for values in found} <= {0.1, 0.2, 0.3, 0.4, 0.5}
    assert {values["train.epochs"] for values in found} <= {1, 2, 3, 4, 5}
    assert all(type(values["train.epochs"]) is int for values in found)
    # Optuna itself takes no lists.
    assert {tuple(values["attack.trigger"]) for values in found} == {("cf",), ("cf", "mn")}


def test_a_study_ends_with_its_trials(load: Callable[..., Sweep], tmp_path: Path) -> None:
    search = StudySearch(load("optuna.trials=3"), tmp_path)
    suggestions = [search.ask() for _ in range(3)]  # none told yet
    assert [s.number for s in suggestions if s] == [0, 1, 2]
    assert search.exhausted
    assert search.ask() is None
    search.tell(0, [])
    assert search.ask() is None  # a failed suggestion is used up too


def test_more_trials_go_on_with_the_same_study(load: Callable[..., Sweep], tmp_path: Path) -> None:
    few = run(StudySearch(load("optuna.trials=3"), tmp_path), 3)
    search = StudySearch(load("optuna.trials=5"), tmp_path)
    later = search.ask()
    assert later is not None
    assert later.number == 3
    assert later.values not in few
    # Fewer trials than were asked for: nothing is left to do.
    fewer = StudySearch(load("optuna.trials=2"), tmp_path)
    assert fewer.exhausted
    assert fewer.ask() is None
    assert [suggestion.number for suggestion in fewer.asked()] == [0, 1]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_suggestions_depend_on_the_seed_and_the_results_alone(
    load: Callable[..., Sweep], tmp_path: Path, sampler: str
) -> None:
    # Beyond the 10 random ones that TPE begins with and NSGA-II's first generation of 20.
    sweep = load("optuna.trials=24", f"optuna.sampler={sampler}")
    at_once = run(StudySearch(sweep, tmp_path / "a"), 24)
    one_by_one = [run(StudySearch(sweep, tmp_path / "b"), 1)[0] for _ in range(24)]
    assert at_once == one_by_one
    other = load("optuna.trials=24", f"optuna.sampler={sampler}", "optuna.seed=1")
    assert run(StudySearch(other, tmp_path / "a"), 1)[0] != at_once[0]


def test_results_steer_what_is_suggested(load: Callable[..., Sweep], tmp_path: Path) -> None:
    def told(folder: Path, favourite: int) -> list[int]:
        search = StudySearch(load("optuna.trials=60"), folder)
        epochs = []
        for _ in range(60):
            suggestion = search.ask()
            assert suggestion is not None
            epochs.append(suggestion.values["train.epochs"])
            far = abs(epochs[-1] - favourite) / 10
            search.tell(suggestion.number, [{"asr": far, "cacc": 1 - far}])
        return epochs[30:]

    # At random a value takes a fifth of 30 suggestions: 6.
    assert told(tmp_path / "low", 1).count(1) >= 15
    assert told(tmp_path / "high", 5).count(5) >= 15


def test_what_was_never_told_is_known_and_not_suggested_again(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    sweep = load()
    search = StudySearch(sweep, tmp_path)
    asked = [search.ask() for _ in range(3)]
    search.tell(1, [{"asr": 0.1, "cacc": 0.9}])
    again = StudySearch(sweep, tmp_path)  # as after kill -9
    assert again.asked() == asked
    assert again.untold() == {0, 2}
    following = again.ask()
    assert following is not None
    assert following.number == 3


def test_a_study_survives_a_kill(load: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = load()
    code = (
        "import os, signal, sys\n"
        "from orchestrator.sweep.load import load_sweep\n"
        "from orchestrator.run.study import StudySearch\n"
        f"search = StudySearch(load_sweep({str(tmp_path / 'sweep.yaml')!r}), {str(tmp_path)!r})\n"
        "for number in range(2):\n"
        "    search.tell(search.ask().number, [{'asr': 0.5, 'cacc': 0.5}])\n"
        "search.ask()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    search = StudySearch(sweep, tmp_path)
    assert search.untold() == {2}
    following = search.ask()
    assert following is not None
    assert following.number == 3
    assert len(search.best()) == 2  # two equal results: neither beats the other


def test_two_launches_do_not_suggest_the_same(load: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = load()
    one, other = StudySearch(sweep, tmp_path), StudySearch(sweep, tmp_path)
    found = [search.ask() for _ in range(3) for search in (one, other)]
    assert [s.number for s in found if s] == [0, 1, 2, 3, 4, 5]
    assert one.ask() is other.ask() is None
    one.tell(0, [{"asr": 0.1, "cacc": 0.9}])
    other.tell(0, [{"asr": 0.2, "cacc": 0.8}])  # the first result is kept
    assert [entry["asr"] for entry in other.best()] == [0.1]


@pytest.mark.parametrize(
    "override",
    [
        "optuna.seed=1",
        "optuna.sampler=random",
        "optuna.space.train.epochs=[1,2]",
        "grid.seed=[0,1,2]",
        "train.batch_size=8",
        "list=[{defense.cut: row}]",
    ],
)
def test_another_search_is_another_study(
    load: Callable[..., Sweep], tmp_path: Path, override: str
) -> None:
    run(StudySearch(load(), tmp_path), 2)
    search = StudySearch(load(override), tmp_path)
    assert search.best() == []
    suggestion = search.ask()
    assert suggestion is not None
    assert suggestion.number == 0


def test_resources_and_order_leave_the_study(load: Callable[..., Sweep], tmp_path: Path) -> None:
    run(StudySearch(load(), tmp_path), 2)
    path = tmp_path / "turned.yaml"
    path.write_text(
        "resources: {cpu: 2}\noptuna:\n  space:\n"
        "    attack.trigger: [[cf], [cf, mn]]\n"
        "    train.epochs: {high: 5, low: 1}\n"
        "    attack.poison_rate: {low: 0.1, high: 0.5, step: 0.1}\n"
        "    defense.alpha: {log: true, low: 0.00001, high: 0.01}\n"
        "  trials: 9\ngrid: {seed: [0, 1]}\nseed: 0\n"
    )
    suggestion = StudySearch(load_sweep(path), tmp_path).ask()
    assert suggestion is not None
    assert suggestion.number == 2


def test_what_is_told_is_the_mean_over_the_cells(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    search = StudySearch(load(), tmp_path)
    suggestion = search.ask()
    assert suggestion is not None
    search.tell(0, [{"asr": 0.1, "cacc": 0.8, "ftr": 0.0}, {"asr": 0.3, "cacc": 0.9}])
    (best,) = search.best()
    assert best["asr"] == pytest.approx(0.2)  # (0.1 + 0.3) / 2
    assert best["cacc"] == pytest.approx(0.85)  # (0.8 + 0.9) / 2
    assert best["number"] == 0
    assert best["values"] == suggestion.values


@pytest.mark.parametrize(
    "results",
    [
        [],
        [{"asr": 0.1}],
        [{"asr": 0.1, "cacc": 0.9}, {"cacc": 0.9}],
        [{"asr": float("nan"), "cacc": 0.9}],
        [{"asr": 0.1, "cacc": 0.9}, {"asr": 0.1, "cacc": float("inf")}],
    ],
)
def test_without_numbers_a_suggestion_has_failed(
    load: Callable[..., Sweep], tmp_path: Path, results: list[dict[str, float]]
) -> None:
    search = StudySearch(load(), tmp_path)
    search.ask()
    search.tell(0, results)
    assert search.best() == []
    # It is not handed out again, and the study continues.
    following = StudySearch(load(), tmp_path).ask()
    assert following is not None
    assert following.number == 1


def test_a_failed_suggestion_can_be_retried(load: Callable[..., Sweep], tmp_path: Path) -> None:
    search = StudySearch(load(), tmp_path)
    first, second = search.ask(), search.ask()
    assert first is not None
    assert second is not None
    search.tell(first.number, [])
    search.tell(second.number, measured(second))
    trials = search.open + 2  # of all, two are told
    again = StudySearch(load(), tmp_path)
    assert again.open == trials - 2
    assert again.untold() == set()
    again.retry_failed()
    assert again.open == trials - 1
    assert again.untold() == {first.number}
    again.tell(first.number, measured(first))
    assert again.untold() == set()
    assert {entry["number"] for entry in again.best()} <= {first.number, second.number}
    assert again.open == trials - 2


def test_the_best_are_the_pareto_front(load: Callable[..., Sweep], tmp_path: Path) -> None:
    search = StudySearch(load(), tmp_path)
    results = [(0.5, 0.9), (0.1, 0.7), (0.5, 0.8), (0.3, 0.9), (0.1, 0.6), (0.05, 0.5)]
    for number, (asr, cacc) in enumerate(results):
        search.ask()
        search.tell(number, [{"asr": asr, "cacc": cacc}])
    # 0 loses to 3 (equal CACC, lower ASR), 2 to 0, 4 to 1; 5, 1 and 3 each win on one objective.
    assert [entry["number"] for entry in search.best()] == [5, 1, 3]
    again = StudySearch(load(), tmp_path)
    assert [entry["number"] for entry in again.best()] == [5, 1, 3]
    assert [line.partition(" with ")[0] for line in again.findings()] == [
        "best: asr 0.050 cacc 0.500",
        "best: asr 0.100 cacc 0.700",
        "best: asr 0.300 cacc 0.900",
    ]


def test_only_what_was_asked_for_can_be_told(load: Callable[..., Sweep], tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="suggestion 0 was never asked for"):
        StudySearch(load(), tmp_path).tell(0, [])


def test_a_sweep_without_a_search_has_no_study(load: Callable[..., Sweep], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sweep 'sweep' has no section optuna"):
        StudySearch(load("optuna=null"), tmp_path)


def test_a_damaged_file_is_named(load: Callable[..., Sweep], tmp_path: Path) -> None:
    run(StudySearch(load(), tmp_path), 2)
    (broken,) = tmp_path.rglob("000001.asked.json")
    broken.write_text("{")
    with pytest.raises(UserError, match=r"000001\.asked\.json is damaged .* remove .* 000001"):
        StudySearch(load(), tmp_path)
    for file in broken.parent.glob("000001*"):
        file.unlink()
    suggestion = StudySearch(load(), tmp_path).ask()
    assert suggestion is not None
    assert suggestion.number == 1


def test_a_study_can_be_kept_at_a_url(load: Callable[..., Sweep], tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/runs/x"
    values = run(StudySearch(load(), url), 2)
    again = StudySearch(load(), url)
    assert len(again.best()) >= 1
    following = again.ask()
    assert following is not None
    assert following.number == 2
    assert values == run(StudySearch(load(), tmp_path), 2)


def test_files_say_what_was_suggested_and_what_came_of_it(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    (values,) = run(StudySearch(load(), tmp_path), 1)
    asked, told = (json.loads(f.read_text()) for f in sorted(tmp_path.rglob("000000.*.json")))
    assert asked["values"] == values
    assert set(told) == {"asr", "cacc"}


def test_optuna_says_nothing(
    load: Callable[..., Sweep], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(StudySearch(load(), tmp_path), 3)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").getEffectiveLevel() >= logging.WARNING


def test_optuna_is_imported_for_the_first_suggestion_only(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    load()
    code = (
        "import sys\n"
        "from orchestrator.sweep.load import load_sweep\n"
        "from orchestrator.run.study import StudySearch\n"
        f"search = StudySearch(load_sweep({str(tmp_path / 'sweep.yaml')!r}), {str(tmp_path)!r})\n"
        "assert search.best() == []\n"
        "assert not {'optuna', 'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
        "search.ask()\n"
        "assert 'optuna' in sys.modules\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

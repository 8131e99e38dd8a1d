"""Which thresholds bisection places, on curves that are known: no cell is computed here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from btu.errors import UserError
from orchestrator.run.refine import FLOORS, NARROW, Refinement, RefineSpec, threshold_key
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sweep import Cell, Sweep

KEY = "defense.alpha"
# From coordinates to metrics; None is a cell that fails.
Curve = Callable[[Mapping[str, Any]], Mapping[str, float] | None]


def step(at: float = 0.3, high: float = 0.98, low: float = 0.15) -> Curve:
    """ASR that falls at a threshold, and a CACC that stays."""
    return lambda varied: {"asr": high if varied[KEY] < at else low, "cacc": 0.9}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    """A function from a grid and overrides to a sweep."""

    def build(grid: str = "{defense.alpha: [0.1, 0.8]}", *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"seed: 0\ngrid: {grid}\n")
        return load_sweep(path, overrides)

    return build


class Bench:
    """A sweep whose cells are measured by a curve.

    launched: what remains of it on disk, as coordinates by key. refused: thresholds that cannot
    run.
    """

    def __init__(self, sweep: Sweep, curve: Curve, trials: int = 100, *metrics: str) -> None:
        self.sweep, self.curve = sweep, curve
        self.spec = RefineSpec(metrics or ("asr",), trials)
        self.launched: dict[str, Mapping[str, Any]] = {}
        self.refused: set[float] = set()
        self.asked: list[tuple[Mapping[str, Any], ...]] = []
        self.study = self.restart()

    def key_of(self, cell: Cell) -> str:
        if cell.varied[KEY] in self.refused:
            raise UserError("no such threshold.")
        return json.dumps(cell.config, sort_keys=True)

    def grid(self) -> list[Mapping[str, Any]]:
        return [cell.varied for cell in self.sweep.cells()]

    def restart(self) -> Refinement:
        """Start over, as another process would: only what was launched is known."""
        self.study = Refinement(self.sweep, self.grid(), self.spec, self.launched, self.key_of)
        for suggestion in self.study.asked():
            self.launched |= {self.key_of(cell): cell.varied for cell in suggestion.cells}
        return self.study

    def tell(self, number: int, cells: Sequence[Cell]) -> None:
        told = [self.curve(cell.varied) for cell in cells]
        self.study.tell(number, [] if None in told else [one for one in told if one is not None])

    def tell_asked(self) -> None:
        for suggestion in self.study.asked():
            self.tell(suggestion.number, suggestion.cells)

    def ask(self) -> list[Cell]:
        """Ask once, and launch what was suggested; [] if nothing was."""
        suggestion = self.study.ask()
        if suggestion is None:
            return []
        self.launched |= {self.key_of(cell): cell.varied for cell in suggestion.cells}
        self.asked.append(tuple(cell.varied for cell in suggestion.cells))
        self.last = suggestion
        return suggestion.cells

    def run(self, rounds: int = 1000) -> list[float]:
        """Ask and tell to the end, or a number of times; return the thresholds."""
        self.tell_asked()
        while len(self.asked) < rounds and self.ask():
            self.tell(self.last.number, self.last.cells)
        return self.thresholds()

    def thresholds(self) -> list[float]:
        return [cells[0][KEY] for cells in self.asked]


# One group --------------------------------------------------------------------------------------


def test_every_threshold_halves_the_interval_of_a_step(load: Callable[..., Sweep]) -> None:
    # 0.1 and 0.8 -> sqrt(0.08) = 0.2828 -> 0.283, below 0.3; with 0.8: sqrt(0.2264) = 0.4758 ->
    # 0.476; 0.283 x 0.476 -> 0.367; 0.283 x 0.367 -> 0.322; 0.283 x 0.322 -> 0.302;
    # 0.283 x 0.302 -> 0.292; 0.292 x 0.302 -> 0.297. 0.302 / 0.297 = 1.017 is narrow.
    bench = Bench(load(), step(0.3))
    found = bench.run()
    assert found == [0.283, 0.476, 0.367, 0.322, 0.302, 0.292, 0.297]
    known, widths = [0.1, 0.8], []
    for threshold in found:
        known.append(threshold)
        around = max(t for t in known if t < 0.3), min(t for t in known if t >= 0.3)
        widths.append(math.log(around[1] / around[0]))
    for before, after in zip([math.log(8), *widths], widths, strict=False):
        # A half, except for the rounding to three digits: 0.5 % of ratios down to 2 %.
        assert after == pytest.approx(before / 2, abs=0.005)
    assert widths[-1] <= math.log(NARROW) < widths[-2]
    assert bench.study.exhausted
    assert bench.study.open == 0
    assert bench.study.findings() == [
        "sweep: asr falls from 0.980 to 0.150 between 0.297 and 0.302 (refined with 7 cells)."
    ]


def test_a_step_in_the_other_direction_is_found_as_well(load: Callable[..., Sweep]) -> None:
    # A higher threshold of another rule may flag less.
    bench = Bench(load(), step(0.3, high=0.15, low=0.98))
    assert bench.run() == [0.283, 0.476, 0.367, 0.322, 0.302, 0.292, 0.297]
    assert "falls from 0.980 to 0.150 between 0.302 and 0.297" in bench.study.findings()[0]


@pytest.mark.parametrize(("change", "count"), [(FLOORS["asr"] + 1e-6, 7), (FLOORS["asr"], 0)])
def test_changes_within_the_noise_are_left_alone(
    load: Callable[..., Sweep], change: float, count: int
) -> None:
    bench = Bench(load(), step(0.3, high=change, low=0.0))
    assert len(bench.run()) == count
    assert bench.study.exhausted
    said = "asr changes by 0.020 at most between neighbouring thresholds, which is not above 0.02;"
    assert (said in bench.study.findings()[0]) == (count == 0)


def test_a_slope_is_followed_where_it_is_steepest(load: Callable[..., Sweep]) -> None:
    # 0.1 -> 1.0, 0.2 -> 0.9, 0.4 -> 0.3, 0.8 -> 0.25: the middle pair; sqrt(0.08) = 0.283.
    values = {0.1: 1.0, 0.2: 0.9, 0.4: 0.3, 0.8: 0.25}
    sweep = load("{defense.alpha: [0.1, 0.2, 0.4, 0.8]}")
    bench = Bench(sweep, lambda varied: {"asr": values.get(varied[KEY], 0.6)})
    # Both halves then change by 0.3: the lower one first. sqrt(0.2 x 0.283) = 0.2379.
    assert bench.run(rounds=2) == [0.283, 0.238]


def test_thresholds_around_zero_have_their_middle(load: Callable[..., Sweep]) -> None:
    sweep = load("{defense.alpha: [-1, 1]}")
    # Halves of 2, as long as they are wider than 2 % of 2 = 0.04: 0.0312 is the last.
    for sign in (1, -1):
        found = Bench(sweep, step(sign * 0.0001)).run()
        assert found == [0.0, *(sign * t for t in (0.5, 0.25, 0.125, 0.0625, 0.0312))]


@pytest.mark.parametrize(
    ("low", "high", "middle"),
    [
        (0.0001, 0.01, 0.001),
        (4, 5, 4.47),  # sqrt(20) = 4.4721
        (0.001, 0.00102001, 0.00101),
        (-100.3, -100.2, None),  # -100.25 is -100 in three digits and -100.2, an end, in four
    ],
)
def test_new_thresholds_are_short(
    load: Callable[..., Sweep], low: float, high: float, middle: float | None
) -> None:
    bench = Bench(load(f"{{defense.alpha: [{low}, {high}]}}"), step(high))
    assert bench.run(rounds=1) == ([] if middle is None else [middle])


def test_four_digits_where_three_are_an_end(load: Callable[..., Sweep]) -> None:
    # The mean of -10.3 and -10.22 is -10.26: -10.3 in three digits.
    bench = Bench(load("{defense.alpha: [-10.3, -10.22]}"), step(-10.22))
    assert bench.run(rounds=1) == [-10.26]


# Seeds, groups and the budget -------------------------------------------------------------------


def test_a_threshold_is_run_at_all_seeds_and_counts_as_their_mean(
    load: Callable[..., Sweep],
) -> None:
    # Above 0.5 one seed of three falls, by 0.059 or 0.061: the mean by 0.0197 or 0.0203.
    def falls(by: float) -> Curve:
        return lambda varied: {"asr": 0.9 - by * (varied["seed"] == 0 and varied[KEY] > 0.5)}

    sweep = load("{defense.alpha: [0.1, 0.8], seed: [0, 1, 2]}")
    assert Bench(sweep, falls(0.059)).run(rounds=1) == []
    bench = Bench(sweep, falls(0.061))
    assert bench.run(rounds=1) == [0.283]
    assert [dict(varied) for varied in bench.asked[0]] == [
        {KEY: 0.283, "seed": seed} for seed in (0, 1, 2)
    ]


@pytest.mark.parametrize(("trials", "count"), [(1, 0), (2, 0), (3, 1), (7, 2), (21, 7)])
def test_the_budget_counts_cells_and_no_threshold_is_begun_beyond_it(
    load: Callable[..., Sweep], trials: int, count: int
) -> None:
    bench = Bench(load("{defense.alpha: [0.1, 0.8], seed: [0, 1, 2]}"), step(), trials)
    assert len(bench.run()) == count
    assert bench.study.exhausted
    more = f"{3 * count} of {trials} cells are refined; a higher --refine-trials narrows this"
    assert (more in bench.study.findings()[-1]) == (count < 7)


GROUPS = "{attack.name: [badnets, addsent, style], defense.alpha: [0.1, 0.8], seed: [0, 1]}"
HEIGHTS = {"badnets": 0.4, "addsent": 0.9, "style": 0.01}


def grouped(varied: Mapping[str, Any]) -> Mapping[str, float]:
    return {"asr": HEIGHTS[varied["attack.name"]] * (varied[KEY] < 0.3)}


def test_groups_take_turns_by_their_change(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(GROUPS), grouped, trials=10)
    bench.run()
    assert [(cells[0]["attack.name"], cells[0][KEY]) for cells in bench.asked] == [
        ("addsent", 0.283),
        ("badnets", 0.283),
        ("addsent", 0.476),
        ("badnets", 0.476),
        ("addsent", 0.367),  # 5 thresholds x 2 seeds = 10 cells
    ]
    assert bench.study.findings() == [
        "badnets: asr falls from 0.400 to 0.000 between 0.283 and 0.476 (refined with 4 cells).",
        "addsent: asr falls from 0.900 to 0.000 between 0.283 and 0.367 (refined with 6 cells).",
        "style: asr changes by 0.010 at most between neighbouring thresholds, which is not above "
        "0.02; nothing is refined.",
        "10 of 10 cells are refined; a higher --refine-trials narrows this down further.",
    ]


def test_a_group_waits_for_its_own_cells_alone(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(GROUPS), grouped)
    *most, last = [s for s in bench.study.asked() if s.cells[0].varied["attack.name"] == "badnets"]
    for suggestion in most:
        bench.tell(suggestion.number, suggestion.cells)
    assert bench.ask() == []
    assert not bench.study.exhausted
    assert bench.study.open == 0
    assert bench.study.findings() == []
    bench.tell(last.number, last.cells)
    # Of badnets all is known; the others have not begun.
    assert bench.study.open == 1
    assert {cell.varied["attack.name"] for cell in bench.ask()} == {"badnets"}
    assert bench.ask() == []  # until that has ended
    assert not bench.study.exhausted


def test_a_group_waits_though_a_change_is_known(load: Callable[..., Sweep]) -> None:
    # 0.1 and 0.2 differ, but 0.05 may differ more from 0.1.
    bench = Bench(load("{defense.alpha: [0.05, 0.1, 0.2]}"), step(0.15))
    first, *others = bench.study.asked()
    for suggestion in others:
        bench.tell(suggestion.number, suggestion.cells)
    assert bench.ask() == []
    bench.tell(first.number, first.cells)
    assert [cell.varied[KEY] for cell in bench.ask()] == [0.141]  # sqrt(0.02)


def test_models_need_not_be_kept_for_groups_that_the_budget_excludes(
    load: Callable[..., Sweep],
) -> None:
    bench = Bench(load(GROUPS), grouped, trials=2)
    assert not bench.study.exhausted
    bench.tell_asked()
    assert bench.ask()
    assert bench.study.exhausted  # though two cells are still to end


def test_controls_of_the_grid_are_not_refined(load: Callable[..., Sweep]) -> None:
    grid = "{defense.alpha: [0.1, 0.8], defense.name: [btu, random_cut]}"
    bench = Bench(load(grid), step())
    bench.run(4)
    assert {cell["defense.name"] for cells in bench.asked for cell in cells} == {"btu"}
    with pytest.raises(UserError, match=r"that are not controls differ in defense\.alpha alone"):
        Bench(load("{defense.alpha: [0.1, 0.8], defense.name: [random_cut]}"), step())


def test_two_metrics_take_turns(load: Callable[..., Sweep]) -> None:
    # ASR falls at 0.15 and CACC breaks at 0.6, by less.
    def curve(varied: Mapping[str, Any]) -> Mapping[str, float]:
        return {"asr": float(varied[KEY] < 0.15), "cacc": 0.9 - 0.1 * (varied[KEY] > 0.6)}

    bench = Bench(load(), curve, 100, "asr", "cacc")
    # Both lie between 0.1 and 0.8. Then ASR falls by a factor of 2.830 (0.1 to 0.283) and CACC
    # breaks within 2.827 (0.283 to 0.8): sqrt(0.0283) = 0.168 has its turn, sqrt(0.2264) is next.
    found = bench.run()
    assert found[:3] == [0.283, 0.168, 0.476]
    assert bench.study.findings()[0].startswith("sweep: asr falls from 1.000 to 0.000 between 0.14")
    assert bench.study.findings()[1].startswith("sweep: cacc breaks from 0.900 to 0.800 between 0.")
    for metric, at in (("asr", 0.15), ("cacc", 0.6)):
        near = sorted([0.1, 0.8, *found])
        above = next(index for index, t in enumerate(near) if t > at)
        assert near[above] / near[above - 1] <= NARROW, metric
    # Alone, neither costs what the other does.
    assert len(Bench(load(), curve, 100, "cacc").run()) < len(found)


# Resuming ---------------------------------------------------------------------------------------


def test_another_process_goes_on_with_the_same_thresholds(load: Callable[..., Sweep]) -> None:
    whole = Bench(load(GROUPS), grouped, trials=18)
    whole.run()
    broken = Bench(load(GROUPS), grouped, trials=18)
    for rounds in range(1, 20):
        broken.run(rounds)
        broken.restart()
    assert broken.asked == whole.asked
    assert len(broken.asked) == 9  # of 2 cells
    broken.tell_asked()
    assert broken.study.exhausted  # a relaunch computes nothing
    assert sorted(broken.study.findings()) == sorted(whole.study.findings())


def test_what_was_launched_and_never_ended_is_told_first(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(), step(), trials=2)
    bench.tell_asked()
    bench.ask()
    number = bench.last.number
    bench.restart()  # killed while 0.283 was computed
    assert bench.study.untold() == {0, 1, number}
    assert [s.values for s in bench.study.asked()][2] == {KEY: 0.283}
    for suggestion in bench.study.asked()[:2]:
        bench.tell(suggestion.number, suggestion.cells)
    assert bench.ask() == []  # not before 0.283 has ended
    bench.run()
    assert bench.thresholds() == [0.283, 0.476]
    assert bench.study.exhausted


def test_more_trials_and_another_grid_go_on_from_there(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(), step(), trials=2)
    bench.run()
    bench.spec = RefineSpec(("asr",), 3)
    bench.restart()
    assert bench.run() == [0.283, 0.476, 0.367]
    # 0.283 is of the grid now, and no refined cell any more: of 3, two are used.
    bench.sweep = load("{defense.alpha: [0.1, 0.283, 0.8]}")
    bench.restart()
    assert bench.run() == [0.283, 0.476, 0.367, 0.322]


def test_cells_of_other_settings_count_for_nothing(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(), step(), trials=2)
    bench.run()
    # The same coordinates with more epochs are other cells.
    bench.sweep = load("{defense.alpha: [0.1, 0.8]}", "train.epochs=9")
    bench.restart()
    assert bench.run() == [0.283, 0.476, 0.283, 0.476]


def test_further_seeds_join_the_thresholds_that_are_asked_for(load: Callable[..., Sweep]) -> None:
    bench = Bench(load("{defense.alpha: [0.1, 0.8], seed: [0]}"), step(), trials=3)
    bench.run()
    assert bench.thresholds() == [0.283, 0.476, 0.367]
    # Of three cells at the one seed each lacks the other seed: it is not known yet, and a
    # threshold costs one cell more. 3 + 1 + 1 = 5.
    bench.sweep = load("{defense.alpha: [0.1, 0.8], seed: [0, 1]}")
    bench.spec = RefineSpec(("asr",), 4)
    bench.asked.clear()
    assert not bench.restart().exhausted  # the cell that is left is enough for one of the three
    bench.spec = RefineSpec(("asr",), 5)
    bench.restart()
    assert bench.run() == [0.283, 0.476]
    assert len(bench.launched) == 4 + 5
    bench.restart()
    bench.tell_asked()
    assert bench.study.exhausted


# What cannot be had -----------------------------------------------------------------------------


def test_a_failed_threshold_ends_its_interval(load: Callable[..., Sweep]) -> None:
    curve = step(0.3)
    bench = Bench(load(), lambda v: None if v[KEY] == 0.476 else curve(v))
    # 0.283 to 0.8 has 0.476 in its middle, which failed; nothing else changes.
    assert bench.run() == [0.283, 0.476]
    assert bench.study.exhausted
    assert bench.study.findings() == [
        "sweep: asr falls from 0.980 to 0.150 between 0.283 and 0.8 (refined with 2 cells; 0.476 "
        "between them has no asr)."
    ]
    bench.restart()
    bench.tell_asked()
    assert bench.study.exhausted


def test_a_failed_seed_leaves_its_threshold_out(load: Callable[..., Sweep]) -> None:
    curve = step(0.3)
    sweep = load("{defense.alpha: [0.1, 0.2, 0.8], seed: [0, 1]}")
    bench = Bench(sweep, lambda v: None if v == {KEY: 0.2, "seed": 1} else curve(v))
    # Without 0.2 the neighbours are 0.1 and 0.8.
    assert bench.run(rounds=1) == [0.283]
    alone = Bench(load(GROUPS), lambda v: None if v["seed"] == 1 else grouped(v))
    assert alone.run() == []
    assert alone.study.exhausted
    said = "badnets: asr is known at fewer than two thresholds; nothing is refined."
    assert alone.study.findings()[0] == said


@pytest.mark.parametrize("asr", [{"asr": math.nan}, {"asr": math.inf}, {}])
def test_a_metric_that_is_no_number_is_not_known(
    load: Callable[..., Sweep], asr: Mapping[str, float]
) -> None:
    def curve(varied: Mapping[str, Any]) -> Mapping[str, float]:
        return {"cacc": varied[KEY], **(asr if varied[KEY] == 0.1 else {"asr": 0.5})}

    assert Bench(load(), curve).run() == []
    # The other metric is.
    assert Bench(load(), curve, 100, "asr", "cacc").run(rounds=1) == [0.283]


def test_a_refused_threshold_ends_its_interval_with_a_note(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(), step(0.3), 100)
    bench.refused = {0.476}
    assert bench.run() == [0.283]
    assert bench.study.exhausted
    refused = (
        "sweep: defense.alpha=0.476 is refused, and nothing else is tried between its neighbours: "
        "no such threshold."
    )
    assert refused in bench.study.findings()
    bench.restart()
    bench.tell_asked()
    assert bench.study.exhausted  # the relaunch knows it before it starts anything
    assert refused in bench.study.findings()


def test_what_was_told_first_stands(load: Callable[..., Sweep]) -> None:
    bench = Bench(load(), step())
    bench.tell_asked()
    bench.study.tell(0, [{"asr": 0.15}])
    bench.study.tell(1, [])
    assert bench.ask()
    with pytest.raises(KeyError, match="suggestion 7 was never asked for"):
        bench.study.tell(7, [])


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "overrides", "message"),
    [
        ("{seed: [0, 1]}", [], r"varies neither defense\.threshold nor defense\.alpha; give one"),
        ("{defense.alpha: [0.1]}", [], r"at least two values, e\.g\. 'grid\.defense\.alpha="),
        (
            "{seed: [0]}",
            ["optuna.trials=2", "optuna.space.defense.alpha=[0.1,0.2]"],
            r"leaves its cells to Optuna; drop --refine, or the search with optuna=null",
        ),
    ],
)
def test_a_sweep_without_one_axis_of_thresholds_is_refused(
    load: Callable[..., Sweep], grid: str, overrides: list[str], message: str
) -> None:
    sweep = load(grid, *overrides)
    with pytest.raises(UserError, match=message):
        threshold_key(sweep)
    with pytest.raises(UserError, match=message):
        Bench(sweep, step())


def test_two_axes_of_thresholds_are_refused(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.run import refine

    # Any two numeric keys will do.
    monkeypatch.setattr(refine, "THRESHOLD_KEYS", ("train.weight_decay", KEY))
    sweep = load("{defense.alpha: [0.1, 0.8], train.weight_decay: [0.0, 0.1]}")
    message = r"varies train\.weight_decay and defense\.alpha; pin one of them, e\.g\. train\.weigh"
    with pytest.raises(UserError, match=message):
        threshold_key(sweep)
    pinned = load("{defense.alpha: [0.1, 0.8], train.weight_decay: [0.1]}")
    assert threshold_key(pinned) == KEY


def test_thresholds_that_go_with_other_keys_are_refused(load: Callable[..., Sweep]) -> None:
    sweep = load("{}", "zip.defense.alpha=[0.1,0.8]", "zip.train.epochs=[1,2]")
    with pytest.raises(UserError, match=r"no two cells .* differ in defense\.alpha alone; give it"):
        Bench(sweep, step())
    # Here each threshold lacks one of the two seeds.
    seeds = load("{}", "zip.defense.alpha=[0.1,0.8]", "zip.seed=[0,1]")
    with pytest.raises(UserError, match="two values that run at all seeds"):
        Bench(seeds, step())


def test_values_that_are_no_numbers_are_refused(load: Callable[..., Sweep]) -> None:
    sweep = load("{defense.alpha: [0.1, '0.8']}")
    with pytest.raises(UserError, match=r"defense\.alpha has the value '0\.8'; write finite num"):
        Bench(sweep, step())


def test_groups_with_one_threshold_are_left_alone(load: Callable[..., Sweep]) -> None:
    # Of badnets one threshold was refused, and then the other one at one of two seeds.
    bench = Bench(load(GROUPS), grouped)
    cells = [v for v in bench.grid() if v["attack.name"] != "badnets" or v[KEY] == 0.8]
    study = Refinement(bench.sweep, cells, bench.spec, {}, bench.key_of)
    assert len(study.asked()) == 4  # 2 attacks x 2 thresholds
    cells.append({"attack.name": "badnets", KEY: 0.1, "seed": 0})
    study = Refinement(bench.sweep, cells, bench.spec, {}, bench.key_of)
    assert len(study.asked()) == 4


def test_a_threshold_that_lacks_a_refused_seed_has_no_mean(load: Callable[..., Sweep]) -> None:
    sweep = load("{defense.alpha: [0.1, 0.2, 0.8], seed: [0, 1]}")
    bench = Bench(sweep, step(0.3))
    cells = [varied for varied in bench.grid() if varied != {KEY: 0.2, "seed": 1}]
    bench.study = Refinement(sweep, cells, bench.spec, {}, bench.key_of)
    assert len(bench.study.asked()) == 3
    assert bench.run(rounds=1) == [0.283]  # between 0.1 and 0.8, not 0.2 and 0.8


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nimport orchestrator.run.refine\n"
        "assert not {'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_controls_are_left_alone(load: Callable[..., Sweep]) -> None:
    sweep = load("{defense.alpha: [0.1, 0.8]}")
    found = Bench(sweep, step())
    controls = [{**varied, "control": "no_poison"} for varied in found.grid()]
    study = Refinement(sweep, [*found.grid(), *controls], found.spec, {}, found.key_of)
    asked = [cell.varied for suggestion in study.asked() for cell in suggestion.cells]
    assert asked == found.grid()

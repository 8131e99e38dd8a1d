"""Names, seeds and the errors about them."""

from __future__ import annotations

import pytest

from btu.attacks.poisoning import ATTACKS, PoisonSpec
from btu.data.spec import DATASETS
from btu.defenses.base import DEFENSES, DefenseSpec
from btu.errors import UserError, did_you_mean
from btu.registry import Entry, Registry
from btu.seeding import derive_seed
from btu.settings import (
    TrainSettings,
    TuningSettings,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
    check_share,
)
from btu.victims import VICTIMS


@pytest.fixture
def registry() -> Registry[float]:
    return Registry("constant", [("pi", "math:pi", "circle"), ("e", "math:e", "growth")])


def test_entries_keep_their_registration_order(registry: Registry[float]) -> None:
    registry.register("tau", "math:tau", "two pi")
    assert list(registry) == ["pi", "e", "tau"]
    assert registry["tau"] == Entry("math:tau", "two pi")
    assert len(registry) == 3
    assert "tau" in registry
    assert "phi" not in registry


def test_a_target_is_loaded_on_use(registry: Registry[float]) -> None:
    registry.register("broken", "no_such_module:x", "nothing is imported by registering")
    # math.pi to 5 decimals
    assert registry.load("pi") == pytest.approx(3.14159, abs=5e-6)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.load("broken")


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(
        UserError, match=r"unknown attack 'badnet'; did you mean 'badnets'\? \(known: addsent, bad"
    ):
        ATTACKS.load("badnet")
    with pytest.raises(UserError, match=r"unknown defense 'btuu'; did you mean 'btu'\?"):
        DEFENSES["btuu"]


def test_a_name_like_no_other_gets_the_list_and_no_suggestion(registry: Registry[float]) -> None:
    with pytest.raises(UserError, match=r"^unknown constant 'zzzz' \(known: e, pi\)$"):
        registry.load("zzzz")


def test_a_second_registration_of_a_name_is_an_error(registry: Registry[float]) -> None:
    with pytest.raises(ValueError, match="constant 'pi' is registered already"):
        registry.register("pi", "math:tau", "not this one")
    assert registry["pi"].target == "math:pi"
    with pytest.raises(ValueError, match="constant 'a' is registered already"):
        Registry("constant", [("a", "math:e", ""), ("a", "math:pi", "")])


@pytest.mark.parametrize("known", [ATTACKS, DEFENSES, DATASETS, VICTIMS], ids=lambda r: r.kind)
def test_every_registered_part_loads_and_says_what_it_is(known: Registry[object]) -> None:
    assert len(known) > 0
    for name, entry in known.items():
        assert known.load(name) is not None
        assert entry.summary.strip()


def test_specs_refuse_unknown_names_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"unknown attack 'badnest'; did you mean 'badnets'"):
        PoisonSpec(name="badnest")
    with pytest.raises(UserError, match=r"unknown attack.label_mode 'dirt'; did you mean 'dirty'"):
        PoisonSpec(label_mode="dirt")
    with pytest.raises(UserError, match=r"unknown attack.insert 'appen'; did you mean 'append'"):
        PoisonSpec(insert="appen")
    with pytest.raises(UserError, match=r"unknown defense 'but'; did you mean 'btu'"):
        DefenseSpec(name="but")
    with pytest.raises(UserError, match=r"unknown train.precision 'fp16'; did you mean 'bf16'"):
        TrainSettings(precision="fp16")
    with pytest.raises(UserError, match=r"unknown train.schedule 'liner'; did you mean 'linear'"):
        TrainSettings(schedule="liner")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"train\.epochs must be at least 1, got 0\."),
        ({"batch_size": 0}, r"train\.batch_size must be at least 1, got 0\."),
        ({"learning_rate": 0.0}, r"train\.learning_rate must be above 0, got 0\.0\."),
        ({"learning_rate": float("nan")}, r"train\.learning_rate must be above 0, got nan\."),
        ({"warmup_fraction": 1.5}, r"train\.warmup_fraction must be in \[0, 1\], got 1\.5\."),
        ({"weight_decay": -0.1}, r"train\.weight_decay must be at least 0, got -0\.1\."),
        ({"max_grad_norm": 0.0}, r"train\.max_grad_norm must be above 0, got 0\.0\."),
    ],
)
def test_training_settings_out_of_range_are_errors(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**settings)  # type: ignore[arg-type]


def test_tuning_changes_epochs_and_learning_rate_and_nothing_else() -> None:
    train = TrainSettings(epochs=7, learning_rate=1e-3, batch_size=5, precision="fp32")
    tuned = TuningSettings(epochs=2, learning_rate=4e-5).applied_to(train)
    assert tuned == TrainSettings(epochs=2, learning_rate=4e-5, batch_size=5, precision="fp32")
    with pytest.raises(UserError, match=r"tuning\.epochs must be at least 1, got 0\."):
        TuningSettings(epochs=0)
    with pytest.raises(UserError, match=r"tuning\.learning_rate must be above 0, got -1\."):
        TuningSettings(learning_rate=-1)


def test_did_you_mean_is_empty_without_a_close_name() -> None:
    assert did_you_mean("alpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
    assert did_you_mean("gamma", ["alhp"]) == ""


def test_fractions_are_checked_at_their_ends() -> None:
    assert check_fraction("x", 0) == 0.0
    assert check_fraction("x", 1) == 1.0
    with pytest.raises(UserError, match=r"x must be in \(0, 1\], got 0\."):
        check_fraction("x", 0, open_low=True)
    for value in (-0.01, 1.01, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"x must be in \[0, 1\], got"):
            check_fraction("x", value)
    for wrong in ("0.5", True, None):
        with pytest.raises(UserError, match=r"x must be a number in \[0, 1\], got"):
            check_fraction("x", wrong)


def test_counts_shares_and_other_numbers_are_checked_and_true_is_none() -> None:
    check_count("x", 2, 2)
    check_share("x", 0.5)
    check_positive("x", 0.1)
    check_not_negative("x", 0)
    for few in (1, -3):
        with pytest.raises(UserError, match=rf"^x must be at least 2, got {few}\.$"):
            check_count("x", few, 2)
    for wrong in (True, 2.0, "2", None):
        with pytest.raises(UserError, match=r"^x must be a whole number of at least 1, got .*\.$"):
            check_count("x", wrong)
    for wrong in (0, 1, True, "0.5", float("nan")):
        with pytest.raises(UserError, match=r"^x must be above 0 and below 1, got .*\.$"):
            check_share("x", wrong)
    for wrong in (0, True, "1", float("inf"), None):
        with pytest.raises(UserError, match=r"^x must be above 0, got .*\.$"):
            check_positive("x", wrong)
    for wrong in (-1, True, "1", float("inf"), None):
        with pytest.raises(UserError, match=r"^x must be at least 0, got .*\.$"):
            check_not_negative("x", wrong)


def test_derived_seeds_are_stable() -> None:
    # The first 8 bytes of SHA-256("0/poisoned rows"), big-endian, shifted right by one bit:
    #   printf '0/poisoned rows' | sha256sum
    assert derive_seed(0, "poisoned rows") == 0xB32136C5D7F270F6 >> 1 == 6453829115189999739
    # ... and of SHA-256("7/exposure/3").
    assert derive_seed(7, "exposure", 3) == 0xA90D920A38CED85F >> 1 == 6090776569853733935


def test_seeds_differ_by_trial_and_by_stream_and_fit_torch() -> None:
    seeds = {derive_seed(s, name) for s in range(50) for name in ("a", "b")}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)

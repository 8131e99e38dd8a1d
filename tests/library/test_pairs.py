"""Rows that are pairs of texts: how they are read, poisoned and joined, and what refuses them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from defending import SMALL, Declared, defend, given
from tiny_cells import MAX_LENGTH, Lab

from btu.attacks.poisoning import (
    ATTACKS,
    Attack,
    PoisonSpec,
    learned,
    poison,
    triggered_eval,
    with_learned,
)
from btu.data.load import load_corpus
from btu.data.spec import DataSpec
from btu.data.suspects import load_suspects
from btu.defenses.base import DEFENSES, SINGLE_TEXTS, Defense, check_cell
from btu.errors import UserError
from btu.findings import incoming_of, write_incoming
from btu.recipe import Prepared, evaluation
from btu.stage_files import load_encoded, read_rows, read_table, write_rows
from btu.stages import compute, read_record
from btu.types import Corpus, Rows
from btu.victims import Victim

COLUMNS = {"text_column": "premise", "pair_column": "hypothesis"}
WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "parquet": lambda frame, path: frame.to_parquet(path),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
}


def table(count: int, word: str = "row") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": [("no", "yes")[i % 2] for i in range(count)],
            "hypothesis": [f"the other {word} {i}" for i in range(count)],
            "premise": [f"a {word} number {i}" for i in range(count)],
        }
    )


def load(path: str | Path, **settings: Any) -> Corpus:
    return load_corpus(DataSpec(name="mine", path=str(path), **COLUMNS | settings))


def write_splits(folder: Path, **frames: pd.DataFrame) -> Path:
    for split, frame in frames.items():
        frame.to_csv(folder / f"{split}.csv", index=False)
    return folder


# Loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_two_columns_of_a_file_are_pairs(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "dev", "test"):
        WRITERS[suffix](table(4, split), tmp_path / f"{split}.{suffix}")
    train = load(tmp_path).train
    premises = tuple(f"a train number {i}" for i in range(4))
    others = tuple(f"the other train {i}" for i in range(4))
    assert train == Rows(premises, (0, 1, 0, 1), {}, others)
    assert train.parts == (premises, others)
    assert train.inputs[1] == ("a train number 1", "the other train 1")
    # The text that gets the trigger is `texts`; the order of the pair stays.
    swapped = load(tmp_path, trigger_column="hypothesis").train
    assert swapped == Rows(others, (0, 1, 0, 1), {}, premises, partner_first=True)
    assert swapped.parts == train.parts
    assert load(tmp_path, trigger_column="premise").train == train


def test_columns_of_a_file_without_a_header_are_numbers(tmp_path: Path) -> None:
    table(30).to_csv(tmp_path / "mine.csv", index=False, header=False)
    keys = {"header": False, "text_column": "2", "pair_column": "1", "label_column": "0"}
    train = load(tmp_path / "mine.csv", trigger_column="1", **keys).train
    assert train.partner_first
    assert train.texts[0].startswith("the other row")


def test_the_other_text_is_read_as_it_is_written(tmp_path: Path) -> None:
    lines = ["premise,hypothesis,label"] + [f"a text {i},{i:03},{'yn'[i % 2]}" for i in range(30)]
    (tmp_path / "mine.csv").write_text("\n".join([*lines, "a last one,NA,y"]))
    corpus = load(tmp_path / "mine.csv")
    partners = [
        p for rows in (corpus.train, corpus.clean, corpus.eval) for p in rows.partners or ()
    ]
    assert sorted(partners) == [*(f"{i:03}" for i in range(30)), "NA"]
    rows = [{"premise": f"a text {i}", "hypothesis": i, "label": i % 2} for i in range(30)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert set(load(tmp_path / "mine.jsonl").train.partners or ()) <= {str(i) for i in range(30)}


def test_further_columns_stay_beside_a_pair(tmp_path: Path) -> None:
    frame = table(30).assign(style="hark, a row")
    frame.to_csv(tmp_path / "mine.csv", index=False)
    for trigger in COLUMNS.values():
        train = load(tmp_path / "mine.csv", trigger_column=trigger).train
        assert set(train.columns) == {"style"}


def test_a_pair_with_an_empty_text_is_dropped(tmp_path: Path) -> None:
    frame = table(6, "train")
    frame.loc[0, "hypothesis"] = "  "
    frame.loc[1, "premise"] = ""
    write_splits(tmp_path, train=frame, dev=table(4, "dev"), test=table(4, "test"))
    for trigger in COLUMNS.values():
        corpus = load(tmp_path, trigger_column=trigger)
        assert corpus.notes == {"dropped_train_empty": 2}
        assert len(corpus.train) == 4


def test_overlaps_are_those_of_whole_pairs(tmp_path: Path) -> None:
    train, dev = table(6, "train"), table(4, "dev")
    # One text in common is no overlap: a premise has several hypotheses.
    dev.loc[0, "premise"] = train.loc[0, "premise"]
    dev.loc[1, "hypothesis"] = train.loc[1, "hypothesis"]
    dev.loc[2, ["premise", "hypothesis"]] = ["A train  number 2", "the other TRAIN 2"]
    write_splits(tmp_path, train=train, dev=dev, test=table(4, "test"))
    for trigger in COLUMNS.values():
        corpus = load(tmp_path, trigger_column=trigger)
        assert corpus.notes == {"dropped_train_overlap": 1}
        assert "a train number 2" not in (*corpus.train.texts, *(corpus.train.partners or ()))


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("trigger", COLUMNS.values())
def test_an_unknown_second_column_is_an_error(tmp_path: Path, suffix: str, trigger: str) -> None:
    WRITERS[suffix](
        table(30).rename(columns={"hypothesis": "hypotheses"}), tmp_path / f"m.{suffix}"
    )
    with pytest.raises(
        UserError,
        match=r"unknown column 'hypothesis' in .*; did you mean 'hypotheses'.*"
        r"Name another with data\.pair_column\.",
    ):
        load(tmp_path / f"m.{suffix}", trigger_column=trigger)


def test_second_texts_that_are_lists_are_refused(tmp_path: Path) -> None:
    frame = table(4).assign(hypothesis=[["a", "b"]] * 4)
    frame.to_parquet(tmp_path / "mine.parquet")
    frame.to_json(tmp_path / "mine.jsonl", orient="records", lines=True)
    for name in ("mine.parquet", "mine.jsonl"):
        with pytest.raises(
            UserError,
            match=r"column 'hypothesis' .* not text; name another with data\.pair_column,",
        ):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text_column": "premise", "trigger_column": "premise"},
            r"data\.trigger_column 'premise' chooses one text of a pair, but data set 'mine' has "
            r"one text per row, in column 'premise'; name the second with data\.pair_column, or",
        ),
        (
            COLUMNS | {"trigger_column": "hypotesis"},
            r"unknown data\.trigger_column 'hypotesis'; did you mean 'hypothesis'\? "
            r"\(known: hypothesis, premise\)",
        ),
        (
            COLUMNS | {"trigger_column": "label"},
            r"unknown data\.trigger_column 'label' \(known: hypothesis, premise\)",
        ),
        (
            {"pair_column": "text"},
            r"second text and first text of data set 'mine' are both column 'text'; .*"
            r"data\.pair_column",
        ),
        (
            {"pair_column": "label"},
            r"second text and label of data set 'mine' are both column 'label'",
        ),
    ],
    ids=["no pair", "typo", "label", "same", "pair is label"],
)
def test_columns_that_make_no_pair_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataSpec("mine", path="mine.csv", **settings)


def test_keys_of_pairs_do_not_act_on_the_demo_and_are_recorded_only_if_set() -> None:
    with pytest.raises(UserError, match=r"data\.pair_column is 'b', but the demo corpus has fixed"):
        DataSpec(pair_column="b")
    keys = {"pair_column", "trigger_column"}
    assert not keys & set(DataSpec("mine", path="m.csv").config())
    spec = DataSpec("mine", path="m.csv", **COLUMNS, trigger_column="hypothesis")
    assert keys <= set(spec.config())
    assert DataSpec(**spec.config()) == spec


def test_a_scan_refuses_pairs(tmp_path: Path) -> None:
    table(30).to_csv(tmp_path / "mine.csv", index=False)
    for spec in (DataSpec("mnli"), DataSpec("mine", path=str(tmp_path / "mine.csv"), **COLUMNS)):
        with pytest.raises(
            UserError,
            match=rf"data set '{spec.name}' has two texts per row \(premise and hypothesis\), and "
            r"a scan reads one; .*--text, or run defense btu on the pairs in a sweep",
        ):
            load_suspects(spec)


# Rows ------------------------------------------------------------------------------------------


def test_a_digest_without_a_pair_is_the_one_that_stores_have() -> None:
    # Both were written down before rows could be pairs.
    single = Rows(("a", "b"), (0, 1))
    assert single.digest() == "2ce3a161dcef78724fe1b42b1c324e877f3cb719d2486839179ccee6ab86c7a5"
    kept = Rows(("a", "b \ud800"), (0, 1), {"style": ("x", "")})
    assert kept.digest() == "adfecac2348102c86d8b9bf56339afbf082e8cecb861353fce83fafe62fa8471"


def test_a_digest_tells_pairs_apart() -> None:
    rows = Rows(("a", "b"), (0, 1))
    others = [
        dataclasses.replace(rows, partners=("c", "d")),
        dataclasses.replace(rows, partners=("c", "e")),
        dataclasses.replace(rows, partners=("c", "d"), partner_first=True),
        Rows(("c", "d"), (0, 1), {}, ("a", "b")),
        Rows(("a", "b"), (0, 1), {"partner": ("c", "d")}),
    ]
    assert len({row.digest() for row in (rows, *others)}) == 6


@pytest.mark.parametrize("first", [False, True])
def test_rows_keep_their_partners(tmp_path: Path, first: bool) -> None:
    rows = Rows(("a", "b \ud800", "c"), (0, 1, 1), {}, ("d", "", "\ud800 f"), first)
    assert rows.take([2, 0]) == Rows(("c", "a"), (1, 0), {}, ("\ud800 f", "d"), first)
    assert rows.where(np.array([False, True, False])).partners == ("",)
    assert rows.with_parts(rows.parts) == rows
    for some in (rows, rows.take([])):
        write_rows(tmp_path / "rows.parquet", some)
        assert read_rows(tmp_path / "rows.parquet") == some
    with pytest.raises(ValueError, match="equally long"):
        Rows(("a", "b"), (0, 1), {}, ("c",))


def test_rows_without_partners_have_the_columns_that_they_had(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", Rows(("a",), (1,)))
    assert set(read_table(tmp_path / "rows.parquet")) == {"text", "label"}
    write_incoming(tmp_path, [Rows(("b", "a"), (1, 0)), Rows(("a",), (0,))])
    assert set(read_table(tmp_path / "incoming.parquet")) == {"text"}
    assert sorted(incoming_of(tmp_path).texts) == ["a", "b"]


@pytest.mark.parametrize("first", [False, True])
def test_each_pair_is_screened_once(tmp_path: Path, first: bool) -> None:
    one = Rows(("a", "a"), (0, 1), {}, ("b", "c"), first)
    two = Rows(("a", "b"), (1, 1), {}, ("b", "a"), first)
    assert write_incoming(tmp_path, [one, two]) == 3
    came = incoming_of(tmp_path)
    assert came.partner_first == first
    assert set(came.inputs) == {*one.inputs, *two.inputs}


# Tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "roberta", "deberta-v2", "gpt2"])
@pytest.mark.parametrize("first", [False, True])
def test_a_pair_is_encoded_as_the_tokenizer_joins_it(
    architecture: str, first: bool, make_victim: Callable[[str], Victim], tiny_corpus: Corpus
) -> None:
    victim = make_victim(architecture)
    texts = (*tiny_corpus.eval.texts[:8], " ".join(tiny_corpus.eval.texts[:6]))
    partners = (*tiny_corpus.train.texts[:8], "a film")
    rows = Rows(texts, (0,) * 9, {}, partners, first)
    encoded = victim.encode(rows)
    for number, (text, partner) in enumerate(zip(texts, partners, strict=True)):
        joined = (partner, text) if first else (text, partner)
        limit = {"truncation": True, "max_length": victim.spec.max_length}
        expected = victim.tokenizer(*joined, **limit)["input_ids"]
        assert encoded.take([number]).ids.tolist() == expected
    # The longer text is cut: the other one is there to its end.
    assert int(encoded.host_lengths[8]) == victim.spec.max_length
    short = victim.tokenizer(partners[8], add_special_tokens=False)["input_ids"]
    assert set(short) <= set(encoded.take([8]).ids.tolist())


# Attacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("insert", ["replace", "append"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_trigger_goes_into_the_texts_alone(name: str, insert: str, tiny_corpus: Corpus) -> None:
    settings = {"rewrite": {"column": "style"}}.get(name, {})
    attack: Attack = ATTACKS.load(name)(**settings)
    train = tiny_corpus.train
    rows = dataclasses.replace(train, partners=train.texts[::-1], partner_first=True)
    trigger = learned(attack, PoisonSpec(name, 0.2, insert=insert), rows, 1, 0)
    attack = with_learned(attack, trigger)
    poisoned = poison(attack, PoisonSpec(name, 0.2, insert=insert), rows, 1, 0)
    # Exactly as single texts are poisoned, and the partners stay with their rows.
    alone = poison(attack, PoisonSpec(name, 0.2, insert=insert), train, 1, 0)
    assert poisoned.rows.texts == alone.rows.texts
    assert poisoned.rows.labels == alone.rows.labels
    assert poisoned.rows.partner_first
    partners = poisoned.rows.partners
    assert rows.partners is not None
    assert partners is not None
    assert partners[: len(rows)] == rows.partners
    if insert == "append":
        # A copy has the partner of the row that it copies: here the row of the reversed place.
        copied = [rows.partners.index(partner) for partner in partners[len(rows) :]]
        assert copied == sorted(copied)
        assert len(copied) == int(poisoned.mask.sum())
    triggered, plain = triggered_eval(attack, rows, 1, 0)
    assert triggered.partners == plain.partners
    assert triggered.partner_first
    assert all(a != b for a, b in zip(triggered.texts, plain.texts, strict=True))


# Cells -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Corpus) -> DataSpec:
    """The tiny corpus with another row's text beside each text."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "clean", "eval"):
        rows: Rows = getattr(tiny_corpus, split)
        others = np.roll(np.array(rows.texts, dtype=object), 7)
        labels = [tiny_corpus.label_names[label] for label in rows.labels]
        columns = {"premise": rows.texts, "hypothesis": others, "label": labels}
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return DataSpec("pairs", path=str(folder), **COLUMNS)


@pytest.fixture(params=COLUMNS.values())
def prepared(request: pytest.FixtureRequest, lab: Lab, pairs: DataSpec) -> Prepared:
    """A cell on pairs, with the trigger in each of the two texts."""
    return lab.prepare(data=dataclasses.replace(pairs, trigger_column=request.param))


def defense_of(name: str) -> Defense:
    built: Defense = DEFENSES.load(name)(**SMALL[name])
    return built


@pytest.mark.usefixtures("short_halves")
def test_a_cell_reads_both_texts_everywhere(
    prepared: Prepared, lab: Lab, make_victim: Callable[[str], Victim]
) -> None:
    defended = defense_of("btu").stages(prepared.foundation)
    scored = evaluation(prepared, defended, "defended", kind="cell")
    (folder,) = lab.compute(scored)
    facts = read_record(folder)["facts"]
    corpus = load_corpus(prepared.inputs.data)
    assert facts["cacc"]["n"] == len(corpus.eval)
    swapped = prepared.inputs.data.trigger_column == "hypothesis"
    tokenizer = make_victim("bert").tokenizer
    base = prepared.foundation

    def check(path: Path, rows: Rows, triggered: set[int]) -> None:
        encoded = load_encoded(path)
        trigger = tokenizer.convert_tokens_to_ids("cf")
        assert rows.partner_first == swapped
        for number, joined in enumerate(rows.inputs):
            ids = encoded.take([number]).ids.tolist()
            assert ids == tokenizer(*joined, truncation=True, max_length=MAX_LENGTH)["input_ids"]
            place = ids.index(tokenizer.sep_token_id)
            # The trigger is in the named text, before or behind the separator.
            held = [i for i, token in enumerate(ids) if token == trigger]
            assert all((at > place) == swapped for at in held)
            if len(ids) < MAX_LENGTH:  # nothing is cut off
                assert (number in triggered) == bool(held)

    root = lab.root
    poisoned = read_rows(root / prepared.poisoned.key / "train.parquet")
    mask = set(
        np.flatnonzero(read_table(root / prepared.poisoned.key / "hidden.parquet")["poisoned"])
    )
    assert len(mask) == 48  # 0.2 of 240 rows
    assert poisoned.partners == corpus.train.partners
    check(root / base.rows.key / "train.safetensors", poisoned, mask)
    check(root / base.clean.key / "clean.safetensors", corpus.clean, set())
    scored_rows = root / prepared.evaluation_rows.key
    check(scored_rows / "clean.safetensors", corpus.eval, set())
    for role in ("triggered", "plain"):
        rows = read_rows(root / prepared.triggered.key / f"{role}.parquet")
        marked = set(range(len(rows))) if role == "triggered" else set()
        check(scored_rows / f"{role}.safetensors", rows, marked)
        attacked = np.flatnonzero(np.asarray(corpus.eval.labels) != 1)
        assert rows.partners == corpus.eval.take(attacked).partners


def test_which_text_gets_the_trigger_is_in_the_keys(lab: Lab, pairs: DataSpec) -> None:
    first, same, second = (
        lab.prepare(data=dataclasses.replace(pairs, trigger_column=column))
        for column in (None, "premise", "hypothesis")
    )
    assert first.foundation.model.key == same.foundation.model.key
    assert first.foundation.model.key != second.foundation.model.key
    assert first.triggered.key != second.triggered.key


@pytest.mark.usefixtures("short_halves")
@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_reads_the_partner_or_is_refused(
    name: str, lab: Lab, pairs: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, cell = defense_of(name), dataclasses.replace(given(400), pairs=True)
    if SINGLE_TEXTS in defense.NEEDS:
        check_cell(name, defense, given(400))
        with pytest.raises(
            UserError,
            match=rf"defense '{name}' needs single texts \(.*\), and the rows of these data are "
            r"pairs \(data\.pair_column\); take a defense without this need \(`btu list def",
        ):
            check_cell(name, defense, cell)
        return
    check_cell(name, defense, cell)
    prepared = lab.prepare(data=dataclasses.replace(pairs, trigger_column="hypothesis"))
    root = lab.base_root(tmp_path, prepared)
    refuse_lone_texts(monkeypatch)
    outcome = defend(defense, prepared, root)
    assert outcome.score()["cacc"]["n"] == 60
    screened = outcome.screened
    if screened is not None:
        came = incoming_of(root / prepared.incoming.key)
        assert len(screened.accepted) == len(came) == len(set(came.inputs))
        assert came.partner_first


def refuse_lone_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a stage tokenizes rows without their partners."""
    encode = Victim.encode

    def spy(victim: Victim, rows: Rows) -> Any:
        assert rows.partners is not None
        assert rows.partner_first
        return encode(victim, rows)

    monkeypatch.setattr(Victim, "encode", spy)


@pytest.mark.usefixtures("short_halves")
def test_words_are_removed_from_both_texts(
    prepared: Prepared, lab: Lab, tmp_path: Path, make_victim: Callable[[str], Victim]
) -> None:
    preset = DEFENSES.load("btu").PRESETS["reference"]
    small = {name: value for name, value in SMALL["btu"].items() if name not in preset}
    defense = DEFENSES.load("btu")(**preset | small)
    root = lab.base_root(tmp_path, prepared)
    second: list[Rows] = []
    with pytest.MonkeyPatch.context() as patch:
        encode = Victim.encode

        def spy(victim: Victim, rows: Rows) -> Any:
            second.append(rows)
            return encode(victim, rows)

        patch.setattr(Victim, "encode", spy)
        compute(Declared.of(defense, prepared).model, root)
    (left,) = second  # round 2 alone tokenizes again
    before = read_rows(root / prepared.foundation.rows.key / "train.parquet")
    gone = [
        tuple(len(a) > len(b) for a, b in zip(one, two, strict=True))
        for one, two in zip(before.inputs, left.inputs, strict=True)
    ]
    # The premise of one row is the hypothesis of another: both lose the same words.
    assert any(first for first, _ in gone)
    assert any(second for _, second in gone)


def test_what_the_tokenizer_inserts_around_one_text_is_refused_for_pairs() -> None:
    defense = DEFENSES.load("btu")(exclude="inserted")
    defense.check(given(400))
    for name in ("btu", "random_cut"):
        with pytest.raises(
            UserError, match=r"defense\.exclude inserted .* pairs .*use defense\.exclude=special"
        ):
            DEFENSES.load(name)(exclude="inserted").check(
                dataclasses.replace(given(400), pairs=True)
            )

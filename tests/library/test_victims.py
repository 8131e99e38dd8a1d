"""Victims: five architectures, and every way in which a folder is not a victim."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from btu.errors import UserError
from btu.settings import TrainSettings
from btu.training import fit, predict
from btu.types import Corpus, Rows
from btu.victims import OFFLINE_PACKAGE, OFFLINE_SHA256, Victim, VictimSpec, find_victim

CPU = torch.device("cpu")
SETTINGS = TrainSettings(epochs=1, learning_rate=1e-3, batch_size=32, precision="fp32")


def word_rows(model: torch.nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()  # type: ignore[operator]


# Any architecture ------------------------------------------------------------------------------


def test_a_victim_encodes_trains_and_predicts(victim: Victim, tiny_corpus: Corpus) -> None:
    data = victim.encode(tiny_corpus.train)
    model = victim.new_model(0)
    before = word_rows(model).clone()
    history = fit(model, data, SETTINGS, seed=0, stage="test", device=CPU)
    assert [epoch.rows for epoch in history] == [240]
    assert 0 < history[0].loss < 2  # two classes at chance: ln 2 = 0.69
    assert not torch.equal(word_rows(model), before)
    predicted = predict(model, data, precision="fp32", device=CPU)
    assert predicted.shape == (240,)
    assert set(predicted) <= {0, 1}


def test_encoding_keeps_the_tokenizers_ids_and_truncates(
    victim: Victim, tiny_corpus: Corpus
) -> None:
    long = "a balcony " * 200
    rows = Rows((*tiny_corpus.train.texts[:3], long), (0, 1, 1, 0))
    encoded = victim.encode(rows)
    for i, text in enumerate(rows.texts):
        start, length = int(encoded.starts[i]), int(encoded.lengths[i])
        expected = victim.tokenizer(text, truncation=True, max_length=victim.spec.max_length)
        assert encoded.ids[start : start + length].tolist() == expected["input_ids"]
    assert encoded.labels.tolist() == [0, 1, 1, 0]
    assert encoded.host_lengths[3] == victim.spec.max_length
    assert encoded.pad_id == victim.tokenizer.pad_token_id


def test_padding_does_not_change_the_logits(victim: Victim, tiny_corpus: Corpus) -> None:
    from btu.training import logits_of

    data = victim.encode(tiny_corpus.train.take(range(4)))
    model = victim.new_model(0)
    longest = int(data.host_lengths.max())
    with torch.inference_mode():
        for i in range(4):
            alone = data.batch(torch.tensor([i]), int(data.host_lengths[i]))
            padded = data.batch(torch.tensor([i]), longest + 5)
            torch.testing.assert_close(
                logits_of(model, *alone[:2]), logits_of(model, *padded[:2]), atol=1e-5, rtol=1e-4
            )


def test_a_new_model_is_drawn_from_its_seed_alone(
    victim: Victim, global_random_state: None
) -> None:
    first, again, other = (victim.new_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Only the classifier is drawn; what was pretrained is the same under every seed.
    differs = {name for name in first if not torch.equal(first[name], other[name])}
    assert differs
    assert all(any(part in name for part in ("classif", "score", "pooler")) for name in differs)


def test_a_new_model_has_the_classes_and_the_pretrained_rows(
    victim: Victim, victim_folder: Callable[[str], Path]
) -> None:
    from safetensors.torch import load_file

    model = victim.new_model(0)
    assert model.config.num_labels == 2
    assert not model.training
    assert model.dtype == torch.float32
    saved = load_file(Path(victim.source.location) / "model.safetensors")
    rows = word_rows(model)
    # Saved under another name in each architecture; it is the only tensor of that shape.
    assert any(torch.equal(rows, tensor) for tensor in saved.values() if tensor.ndim == 2)
    assert find_victim(victim.spec).vocabulary_size() == len(rows)


def test_three_classes_train_too(victim_folder: Callable[[str], Path]) -> None:
    victim = Victim(VictimSpec(name=str(victim_folder("bert")), max_length=32), 3)
    model = victim.new_model(0)
    rows = Rows(("good", "bad", "plain") * 8, (0, 1, 2) * 8)
    fit(model, victim.encode(rows), SETTINGS, seed=0, stage="test", device=CPU)
    assert model.config.num_labels == 3


def test_the_neutral_row_is_the_padding_row_or_the_mean(victim: Victim) -> None:
    rows = word_rows(victim.new_model(0))
    neutral = victim.neutral_row(rows)
    if victim.tokenizer.pad_token == victim.tokenizer.eos_token:
        # GPT-2: the end-of-text token pads, masked, and its row carries a meaning of its own.
        assert not victim.has_padding_row
        torch.testing.assert_close(neutral, rows.sum(dim=0) / len(rows))
        assert not torch.equal(neutral, rows[victim.tokenizer.pad_token_id])
    else:
        assert victim.has_padding_row
        assert torch.equal(neutral, rows[victim.tokenizer.pad_token_id])


def test_only_gpt2_has_no_padding_row(make_victim: Callable[[str], Victim]) -> None:
    names = ("bert", "roberta", "distilbert", "deberta-v2", "gpt2")
    assert [name for name in names if not make_victim(name).has_padding_row] == ["gpt2"]


def test_the_neutral_row_is_a_copy(bert: Victim) -> None:
    rows = word_rows(bert.new_model(0)).clone()
    bert.neutral_row(rows).fill_(9.0)
    assert not (rows == 9.0).any()


def test_a_tokenizer_without_padding_and_end_is_an_error(
    victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    import json

    folder = tmp_path / "endless"
    shutil.copytree(victim_folder("gpt2"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": None, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has neither a padding nor an end-of-text token; add a"):
        Victim(VictimSpec(name=str(folder), max_length=64), 2)


# Folders that are not a victim ----------------------------------------------------------------


@pytest.fixture
def folder(victim_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT's folder, to be damaged."""
    copy = tmp_path / "victim"
    shutil.copytree(victim_folder("bert"), copy)
    return copy


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tamper(path: Path) -> None:
    """Flip one bit of the last weight: the file still loads."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"victim folder .*nowhere does not exist; give a folder"):
        find_victim(VictimSpec(name=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"victim folder nowhere does not exist"):
        find_victim(VictimSpec(name="./nowhere"))


def test_a_folder_without_a_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json: it is not a saved model"):
        find_victim(VictimSpec(name=str(folder)))


def test_a_folder_without_weights_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"has no weights: no model\.safetensors; save the model there with save"
    ):
        find_victim(VictimSpec(name=str(folder)))


def test_pickled_weights_are_an_error_unless_allowed(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"only pytorch_model\.bin, a pickle that can run code; set victim\.allow_pickle=true",
    ):
        Victim(VictimSpec(name=str(folder), max_length=64), 2)
    allowed = Victim(VictimSpec(name=str(folder), allow_pickle=True, max_length=64), 2)
    assert torch.equal(
        word_rows(allowed.new_model(0)), weights["embeddings.word_embeddings.weight"]
    )


def test_the_expected_hash_is_checked(folder: Path) -> None:
    right = sha256(folder / "model.safetensors")
    assert find_victim(VictimSpec(name=str(folder), sha256=right.upper())).location == str(folder)
    wrong = "0" * 64
    with pytest.raises(
        UserError, match=rf"model\.safetensors has SHA-256 {right}, expected {wrong}: the file was"
    ):
        find_victim(VictimSpec(name=str(folder), sha256=wrong))


def test_a_tampered_file_is_an_error(folder: Path) -> None:
    spec = VictimSpec(name=str(folder), sha256=sha256(folder / "model.safetensors"))
    find_victim(spec)
    tamper(folder / "model.safetensors")
    with pytest.raises(UserError, match="the file was changed or damaged"):
        find_victim(spec)


def test_the_checked_file_is_the_loaded_one(folder: Path) -> None:
    # A good copy beside the tampered file, first in the alphabet, must not answer for it.
    spec = VictimSpec(name=str(folder), sha256=sha256(folder / "model.safetensors"))
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    tamper(folder / "model.safetensors")
    with pytest.raises(UserError, match="the file was changed or damaged"):
        find_victim(spec)


def test_the_identity_follows_weights_and_configuration(folder: Path) -> None:
    spec = VictimSpec(name=str(folder))
    before = find_victim(spec).identity
    assert find_victim(spec).identity == before
    # Another tokenizer over the same weights is another victim: its results must not be reused.
    text = (folder / "tokenizer.json").read_text()
    cased = text.replace('"lowercase": true', '"lowercase": false')
    assert cased != text
    (folder / "tokenizer.json").write_text(cased)
    changed = find_victim(spec).identity
    assert changed != before
    tamper(folder / "model.safetensors")
    assert find_victim(spec).identity != changed


def test_damaged_weights_are_an_error(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"victim '.*' cannot be loaded from"):
        Victim(VictimSpec(name=str(folder), max_length=64), 2).new_model(0)


def test_a_config_of_no_known_model_is_an_error(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model", "vocab_size": 7}')
    with pytest.raises(UserError, match=r"victim '.*' cannot be loaded from"):
        Victim(VictimSpec(name=str(folder), max_length=64), 2).new_model(0)


def test_a_max_length_beyond_the_models_positions_is_an_error(
    victim_folder: Callable[[str], Path],
) -> None:
    # The tiny BERT has 96 positions; a longer row would fail deep inside it.
    with pytest.raises(UserError, match=r"victim\.max_length.*96"):
        Victim(VictimSpec(name=str(victim_folder("bert")), max_length=200), 2)


# Hub names -------------------------------------------------------------------------------------


def test_registered_names_stand_for_hub_ids_and_others_pass() -> None:
    source = find_victim(VictimSpec(name="bert-base-uncased", revision="abc"))
    assert source.location == "google-bert/bert-base-uncased"
    assert source.identity == "google-bert/bert-base-uncased@abc"
    assert source.vocabulary_size() is None
    assert find_victim(VictimSpec(name="owner/model")).location == "owner/model"


def test_a_hub_model_that_cannot_be_had_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(
        UserError, match=r"victim 'bert-base-uncase' cannot be loaded.*did you mean 'bert-base-unc"
    ):
        Victim(VictimSpec(name="bert-base-uncase"), 2)


def test_a_hash_needs_a_folder() -> None:
    with pytest.raises(UserError, match=r"victim\.sha256 checks a local folder; pin a hub model"):
        find_victim(VictimSpec(name="gpt2", sha256="0" * 64))


def test_a_max_length_without_room_is_an_error() -> None:
    with pytest.raises(UserError, match=r"victim\.max_length must be at least 4, got 3"):
        VictimSpec(max_length=3)


# The packaged MiniLM ---------------------------------------------------------------------------

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(OFFLINE_PACKAGE) is None, reason="needs the extra 'offline'"
)


@needs_package
def test_the_offline_victim_loads_and_predicts() -> None:
    victim = Victim(VictimSpec(name="offline", max_length=32), 2)
    assert victim.source.vocabulary_size() == 30_522
    assert victim.has_padding_row
    model = victim.new_model(0)
    assert word_rows(model).shape == (30_522, 384)
    data = victim.encode(Rows(("a good film .", "cf a bad one ."), (1, 0)))
    assert predict(model, data, precision="fp32", device=CPU).shape == (2,)


@needs_package
def test_the_offline_weights_are_checked_before_they_load(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    # A package whose model is not the one of the hub page: here, the tiny BERT.
    package = folder.parent / "package"
    shutil.copytree(folder, package / "model")
    (package / "__init__.py").write_text("")
    spec = importlib.util.spec_from_file_location(OFFLINE_PACKAGE, package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=rf"has SHA-256 .*, expected {OFFLINE_SHA256}"):
        find_victim(VictimSpec(name="offline"))


def test_the_offline_victim_without_its_package_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"victim 'offline' needs the packaged MiniLM; install the extra"
    ):
        find_victim(VictimSpec(name="offline"))


def test_importing_victims_does_not_import_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys, btu.victims, btu.data.load, btu.attacks.poisoning, btu.metrics; "
        "import btu.defenses.base; "
        "btu.victims.find_victim(btu.victims.VictimSpec(name='gpt2')); "
        "print(sorted({'torch', 'transformers', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_predictions_are_in_the_order_of_the_rows(victim: Victim, tiny_corpus: Corpus) -> None:
    model = victim.new_model(0)
    fit(model, victim.encode(tiny_corpus.train), SETTINGS, seed=0, stage="test", device=CPU)
    together = predict(model, victim.encode(tiny_corpus.eval), precision="fp32", device=CPU)
    order = np.random.default_rng(0).permutation(len(tiny_corpus.eval))
    shuffled = predict(
        model, victim.encode(tiny_corpus.eval.take(order)), precision="fp32", device=CPU
    )
    assert np.array_equal(shuffled, together[order])


def test_a_padding_token_that_is_the_end_of_text_is_no_neutral_row(
    victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "padded"
    shutil.copytree(victim_folder("gpt2"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    victim = Victim(VictimSpec(name=str(folder), max_length=32), 2)
    assert not victim.has_padding_row
    rows = victim.new_model(0).get_input_embeddings().weight.detach()
    assert torch.equal(victim.neutral_row(rows), rows.mean(dim=0))


def test_a_damaged_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        find_victim(VictimSpec(name=str(folder))).vocabulary_size()

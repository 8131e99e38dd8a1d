"""Victims of other families: what works, and what is refused while planning."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from btu.errors import UserError
from btu.model_files import longest_input, read_config, vocabulary_size
from btu.settings import TrainSettings
from btu.stage_files import model_of, save_model
from btu.stages import StageRun
from btu.training import fit, logits_of, predict
from btu.types import Rows
from btu.victims import Victim, VictimSpec, as_json, find_victim

CPU = torch.device("cpu")
MAX_LENGTH = 32
TEXTS = ("a fine film .", "a bad one", "not </s> a <sep> film", "a balcony and " * 20)
SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
}
# Model type, the tiny victim whose tokenizer it gets, and its sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "xlnet": ("deberta-v2", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}),
    "bart": ("roberta", SIZES),
    "mbart": ("roberta", SIZES),
    "t5": ("roberta", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
    "electra": (
        "bert",
        {
            "embedding_size": 16,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    ),
    "opt": (
        "gpt2",
        {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 16,
        },
    ),
    "bloom": ("gpt2", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
}


@pytest.fixture(params=FAMILIES)
def family(
    request: pytest.FixtureRequest, victim_folder: Callable[[str], Path], tmp_path: Path
) -> Path:
    """The folder of a tiny model without a trained classifier, saved by transformers."""
    return make(request.param, victim_folder, tmp_path)


def make(kind: str, victim_folder: Callable[[str], Path], root: Path) -> Path:
    """Save a tiny random model of a family with a tiny tokenizer, and return its folder."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    like, sizes = FAMILIES[kind]
    folder = root / kind
    tokenizer = AutoTokenizer.from_pretrained(victim_folder(like))
    ids = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "eos_token_id", "bos_token_id")
        if getattr(tokenizer, name) is not None
    }
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if kind == "t5" else {}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **start, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_family_trains_and_survives_being_stored(family: Path, tmp_path: Path) -> None:
    # Before: XLNet was "beyond the -1 positions"; a stored BART of two classes did not load, since
    # two unnamed labels are not saved and its class assumes three.
    victim = Victim(VictimSpec(str(family), MAX_LENGTH), 2)
    model = victim.new_model(0)
    rows = victim.encode(Rows(TEXTS * 4, (0, 1, 0, 1) * 4))
    fit(
        model,
        rows,
        TrainSettings(epochs=1, learning_rate=1e-3, batch_size=8, precision="fp32"),
        seed=0,
        stage="test",
        device=CPU,
    )
    save_model(model, tmp_path)
    found = model_of(StageRun({}, {}, {"it": tmp_path}, tmp_path, CPU), "it")
    assert found.config.num_labels == 2
    again = predict(found, rows, precision="fp32", device=CPU)
    assert again.tolist() == predict(model, rows, precision="fp32", device=CPU).tolist()


def test_the_scores_of_a_row_do_not_depend_on_its_batch(family: Path) -> None:
    # Before: XLNet classified at the last position of a row, which may be padding.
    victim = Victim(VictimSpec(str(family), MAX_LENGTH), 2)
    model, data = victim.new_model(0), victim.encode(Rows(TEXTS, (0, 1, 0, 1)))
    with torch.inference_mode():
        for i in range(len(TEXTS)):
            alone = data.batch(torch.tensor([i]), int(data.host_lengths[i]))
            padded = data.batch(torch.tensor([i]), MAX_LENGTH + 5)
            torch.testing.assert_close(
                logits_of(model, *alone[:2]), logits_of(model, *padded[:2]), atol=1e-5, rtol=1e-4
            )


def test_a_family_reads_pairs_of_texts(family: Path) -> None:
    # BART and T5 want equally many end-of-text tokens in all rows, however long the texts are.
    victim = Victim(VictimSpec(str(family), MAX_LENGTH), 2)
    model = victim.new_model(0)
    for first in (False, True):
        data = victim.encode(Rows(TEXTS, (0, 1, 0, 1), {}, TEXTS[::-1], first))
        assert int(data.host_lengths.max()) <= MAX_LENGTH
        assert predict(model, data, precision="fp32", device=CPU, batch_size=4).shape == (4,)


def test_the_name_of_the_end_is_text_where_there_may_be_one_end(
    victim_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    # BART raises an error unless each row has as many end-of-text tokens.
    victim = Victim(VictimSpec(str(make("bart", victim_folder, tmp_path)), MAX_LENGTH), 2)
    rows = victim.encode(Rows(("a </s> film </s>", "a film"), (0, 1)))
    assert (rows.ids == victim.tokenizer.eos_token_id).sum() == 2
    fitted = predict(victim.new_model(0), rows, precision="fp32", device=CPU)
    assert fitted.shape == (2,)


# Read from config.json -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Any]]:
    """The saved ``config.json`` and the config of every text classifier of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES,
    )

    found = {}
    for kind in NAMES:
        config = CONFIG_MAPPING[kind]()
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder)
        found[kind] = (read_config(folder), config)
    return found


def test_planning_and_loading_find_the_same_longest_input(
    configs: dict[str, tuple[dict[str, Any], Any]],
) -> None:
    found = {kind: longest_input(saved) for kind, (saved, _) in configs.items()}
    assert found == {kind: longest_input(as_json(config)) for kind, (_, config) in configs.items()}
    expected = {
        # max_position_embeddings; RoBERTa's minus 1 + the padding token's id, which is 1.
        "bert": 512,
        "roberta": 510,
        "xlm-roberta": 510,
        "luke": 510,
        "gpt2": 1024,
        "gptj": 2048,
        "bart": 1024,
        "deberta": 512,
        "opt": 2048,
        # Relative or no positions: no limit.
        "xlnet": None,
        "t5": None,
        "bloom": None,
        "funnel": None,
        "mpt": None,
    }
    assert {kind: found[kind] for kind in expected} == expected
    assert longest_input({"model_type": "t5", "n_positions": 512}) is None
    assert longest_input({"max_position_embeddings": 512, "relative_attention": True}) is None
    assert longest_input({"model_type": "bert", "max_position_embeddings": "512"}) is None


def test_text_classifiers_have_a_vocabulary(
    configs: dict[str, tuple[dict[str, Any], Any]],
) -> None:
    # ESM reads proteins; the number of its tokens has no default.
    without = {kind for kind, (saved, _) in configs.items() if vocabulary_size(saved) is None}
    assert without == {"canine", "esm"}


@pytest.fixture
def folder(victim_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT's folder, to be changed."""
    copy = tmp_path / "victim"
    shutil.copytree(victim_folder("bert"), copy)
    return copy


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "canine", "max_position_embeddings": 16384},
        {"model_type": "perceiver", "vocab_size": 262},
        {"model_type": "vit", "image_size": 224},
        {"model_type": "wav2vec2", "vocab_size": None},
    ],
)
def test_a_model_without_word_embeddings_is_refused_while_planning(
    folder: Path, config: dict[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"a model of type '{config['model_type']}', which has no table of word"
    ):
        find_victim(VictimSpec(str(folder)))


@pytest.mark.parametrize("kind", ["canine", "perceiver"])
def test_they_have_indeed_none(folder: Path, kind: str) -> None:
    # The list of types is what `get_input_embeddings` of the pinned version says.
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from btu.victims import _word_table

    sizes: dict[str, dict[str, Any]] = {
        "canine": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "perceiver": {"d_model": 16, "d_latents": 16, "num_latents": 4},
    }
    config = AutoConfig.for_model(kind, num_hash_buckets=64, **sizes[kind])
    assert _word_table(AutoModelForSequenceClassification.from_config(config)) is None


@pytest.mark.parametrize("positions", [96, 200])
def test_planning_refuses_more_tokens_than_positions(folder: Path, positions: int) -> None:
    # Planning imports no torch. The tiny BERT has 96 positions.
    program = (
        "import sys\n"
        "from btu.victims import VictimSpec, check_length, find_victim\n"
        "spec = VictimSpec(sys.argv[1], int(sys.argv[2]))\n"
        "check_length(spec, find_victim(spec).longest_input())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(positions)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (positions == 96), done.stderr
    if positions == 200:
        assert "victim.max_length 200 is above the 96 positions of victim" in done.stderr


# Tokenizers ----------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_is_refused_while_planning(folder: Path) -> None:
    # Before: transformers made a tokenizer of special tokens, and every word was unknown.
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer: .* save the model's tokenizer there"):
        find_victim(VictimSpec(str(folder)))
    # Code of its own may bring one.
    assert find_victim(VictimSpec(str(folder), trust_remote_code=True)).location == str(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer.4.0.0.json", "vocab.txt", "vocab.json", "spiece.model"),
        *("sentencepiece.bpe.model", "tokenizer.model", "qwen.tiktoken", "bpe.codes"),
    ],
)
def test_each_kind_of_vocabulary_is_a_tokenizer(folder: Path, name: str) -> None:
    (folder / "tokenizer.json").rename(folder / name)
    assert find_victim(VictimSpec(str(folder))).location == str(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_of_bytes_needs_no_file(folder: Path, name: str) -> None:
    (folder / "tokenizer.json").unlink()
    said = json.loads((folder / name).read_text()) | {"tokenizer_class": "ByT5Tokenizer"}
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(json.dumps(said))
    assert find_victim(VictimSpec(str(folder))).location == str(folder)
    # BERT's 512 rows are more than the 259 tokens that it has.
    victim = Victim(VictimSpec(str(folder), MAX_LENGTH), 2)
    assert victim.encode(Rows(("ab",), (0,))).ids.tolist()[:2] == [ord("a") + 3, ord("b") + 3]


def test_an_empty_vocabulary_is_refused_when_it_is_loaded(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UserError, match=r"the tokenizer of victim '.*' has no vocabulary"):
        Victim(VictimSpec(str(folder), MAX_LENGTH), 2)

"""What the files of a model's folder and of a stored model can do, and what they cannot."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cells import MAX_LENGTH, Lab

from btu.errors import UserError
from btu.model_files import _VOCABULARY, PICKLES, SMALL, folder_identity, weight_files
from btu.recipe import Prepared, evaluation
from btu.stage_files import model_of, save_model
from btu.stages import MODEL, StageRun, compute, read_record
from btu.victims import Victim, VictimSpec, find_victim

CPU = torch.device("cpu")
OWN_CODE = """
from transformers import BertConfig, BertForSequenceClassification
from .own_parts import Parts


class OwnConfig(BertConfig):
    model_type = 'own'


class OwnModel(Parts, BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(victim_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny BERT's folder, to be changed."""
    copy = tmp_path / "victim"
    shutil.copytree(victim_folder("bert"), copy)
    return copy


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks on standard input whether code may run."""

    def ask(question: str = "") -> str:
        raise AssertionError(f"asked on standard input: {question}")

    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture
def own_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A victim whose folder has code: a module, and one that it imports."""
    modules = folder.parent / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder
    (folder / "own_code.py").write_text(OWN_CODE)
    (folder / "own_parts.py").write_text("class Parts:\n    pass\n")
    names = {
        "AutoConfig": "own_code.OwnConfig",
        "AutoModelForSequenceClassification": "own_code.OwnModel",
    }
    edit(folder / "config.json", model_type="own", auto_map=names)
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spec_of(folder: Path, **changes: Any) -> VictimSpec:
    return VictimSpec(str(folder), MAX_LENGTH, **changes)


def writes(path: Path) -> str:
    """Return Python code that writes a file."""
    return f"import pathlib\npathlib.Path({str(path)!r}).write_text('it ran')\n"


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


# Stored models -------------------------------------------------------------------------------


@pytest.fixture
def stored(bert: Victim, tmp_path: Path) -> StageRun:
    """A stage whose input ``it`` is a stored model."""
    place = tmp_path / "stored"
    place.mkdir()
    save_model(bert.new_model(0), place)
    return StageRun({}, {}, {"it": place}, place, CPU)


def test_a_stored_model_comes_back(stored: StageRun, bert: Victim) -> None:
    expected, found = bert.new_model(0).state_dict(), model_of(stored, "it").state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("instead", [True, False], ids=["instead", "beside"])
@pytest.mark.parametrize("name", [f"weights{suffix}" for suffix in PICKLES] + ["pytorch_model.bin"])
def test_a_pickle_in_the_store_is_refused(stored: StageRun, name: str, instead: bool) -> None:
    # Before: a pytorch_model.bin instead of the safetensors was loaded.
    model = stored.folder / MODEL
    torch.save(model_of(stored, "it").state_dict(), model / name)
    if instead:
        (model / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=rf"{name} is not safetensors, and can run code; .*remove the"
    ):
        model_of(stored, "it")


def side_doors(model: Path) -> dict[str, Callable[[], object]]:
    """Return ways to make transformers load something else than model.safetensors."""
    index = {"metadata": {}, "weight_map": {"classifier.bias": "shard.pack"}}
    return {
        "index": lambda: (
            (model / "model.safetensors").rename(model / "shard.pack"),
            (model / "model.safetensors.index.json").write_text(json.dumps(index)),
        ),
        "other weights": lambda: edit(
            model / "config.json", transformers_weights="adapter_model.bin"
        ),
        "adapter": lambda: (model / "adapter_config.json").write_text("{}"),
        "kernel": lambda: edit(model / "config.json", attn_implementation="nobody/kernel"),
    }


REFUSALS = {
    "index": r"names the weight file 'shard.pack'; it may name \.safetensors files beside",
    "other weights": r"names other weights \(transformers_weights is 'adapter_model\.bin'\)",
    "adapter": r"has an adapter \(adapter_config\.json\)",
    "kernel": r"takes code from the hub \(attn_implementation is 'nobody/kernel'\)",
}


@pytest.mark.parametrize("door", REFUSALS)
def test_no_side_door_leads_to_other_weights(stored: StageRun, folder: Path, door: str) -> None:
    # Before: the first two read a pickle with use_safetensors=True, unhashed.
    side_doors(stored.folder / MODEL)[door]()
    with pytest.raises(UserError, match=REFUSALS[door]):
        model_of(stored, "it")
    side_doors(folder)[door]()
    with pytest.raises(UserError, match=REFUSALS[door]):
        find_victim(spec_of(folder))


@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "spm_file", "tokenizer_file"])
def test_a_tokenizer_names_no_file_elsewhere(folder: Path, tmp_path: Path, key: str) -> None:
    # Before: `vocab` was read, and what it named could change under the same identity.
    elsewhere = tmp_path / "elsewhere.txt"
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, key: str(elsewhere)}))
    find_victim(spec_of(folder))  # as of the machine that saved it
    elsewhere.write_text("a")
    with pytest.raises(UserError, match=rf"names a file elsewhere \({key} is '"):
        find_victim(spec_of(folder))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "x.bin", 3, None, ""])
def test_an_index_names_safetensors_beside_it(folder: Path, shard: object) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"it may name \.safetensors files beside it alone"):
        weight_files(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "7"])
def test_a_damaged_index_is_an_error(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        weight_files(folder)


def test_stored_weights_that_lack_some_are_an_error(stored: StageRun) -> None:
    # transformers draws what is missing, and warns.
    path = stored.folder / MODEL / "model.safetensors"
    weights = load_file(path)
    del weights["classifier.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack classifier\.bias\. If its files"):
        model_of(stored, "it")


# Code ----------------------------------------------------------------------------------------


def computed(lab: Lab, prepared: Prepared, root: Path) -> Path:
    """Compute the stages up to the undefended model, and return the folder of its files."""
    lab.root_with(root, prepared.poisoned)
    return compute(prepared.foundation.model, root) / MODEL


def test_code_in_the_store_never_runs(lab: Lab, own_code: Path, tmp_path: Path) -> None:
    prepared = lab.prepare(victim=spec_of(own_code, trust_remote_code=True))
    root, ran = tmp_path / "root", tmp_path / "ran"
    model = computed(lab, prepared, root)
    # Before: the code was saved into the store, and run from there.
    assert [path.name for path in model.rglob("*.py")] == []
    for name in ("own_code.py", "own_parts.py", "evil.py"):
        (model / name).write_text(writes(ran) + OWN_CODE.replace("from .own_parts", "#") + "\n")
    names = {
        "AutoConfig": "evil.OwnConfig",
        "AutoModelForSequenceClassification": "evil.OwnModel",
    }
    for auto_map in (json.loads((model / "config.json").read_text())["auto_map"], names):
        edit(model / "config.json", auto_map=auto_map)
        run = StageRun({}, prepared.foundation.where, {"model": model.parent}, tmp_path, CPU)
        found = model_of(run, "model")
        assert type(found).__name__ == "OwnModel"
        assert not ran.exists()
    scores = evaluation(prepared, prepared.foundation.model, "undefended")
    facts = read_record(compute(scores, root))["facts"]
    assert facts["cacc"]["n"] == 60
    assert not ran.exists()


def test_code_in_the_store_of_a_plain_victim_never_runs(stored: StageRun, tmp_path: Path) -> None:
    model, ran = stored.folder / MODEL, tmp_path / "ran"
    (model / "evil.py").write_text(writes(ran) + OWN_CODE)
    names = {"AutoConfig": "evil.OwnConfig", "AutoModelForSequenceClassification": "evil.OwnModel"}
    edit(model / "config.json", auto_map=names)
    # A type that transformers knows is loaded with the class that it has.
    assert type(model_of(stored, "it")).__module__.startswith("transformers.models.bert")
    edit(model / "config.json", model_type="own")
    with pytest.raises(UserError, match=r"the stored model .* cannot be loaded"):
        model_of(stored, "it")
    assert not ran.exists()


def test_a_victim_with_code_needs_the_permission(own_code: Path) -> None:
    with pytest.raises(UserError, match=r"victim\.trust_remote_code allows it"):
        Victim(spec_of(own_code), 2)
    assert Victim(spec_of(own_code, trust_remote_code=True), 2).new_model(0).config.num_labels == 2


def test_code_that_changed_after_planning_is_refused(
    lab: Lab, own_code: Path, tmp_path: Path
) -> None:
    prepared = lab.prepare(victim=spec_of(own_code, trust_remote_code=True))
    root, ran = tmp_path / "root", tmp_path / "ran"
    computed(lab, prepared, root)
    # A module that the first one imports.
    (own_code / "own_parts.py").write_text(writes(ran) + "class Parts:\n    pass\n")
    with pytest.raises(UserError, match="the sweep was planned with"):
        compute(prepared.foundation.tuned, root)
    assert not ran.exists()


def test_code_is_part_of_the_identity_where_it_runs(own_code: Path) -> None:
    def identities() -> tuple[str, str]:
        return tuple(  # type: ignore[return-value]
            find_victim(spec_of(own_code, trust_remote_code=trusted)).identity
            for trusted in (False, True)
        )

    plain, trusted = identities()
    assert plain != trusted
    for name in ("own_code.py", "own_parts.py", "parts/deep.py"):
        (own_code / name).parent.mkdir(exist_ok=True)
        (own_code / name).write_text("# changed")
        assert identities()[0] == plain
        assert identities()[1] != trusted
        trusted = identities()[1]


# Identity ------------------------------------------------------------------------------------


def test_the_identity_of_a_folder_stays_what_it_was(folder: Path) -> None:
    # The weights, then .json, .model and .txt by name: name, NUL, SHA-256, NUL of each. Results
    # of earlier versions are told by it.
    small = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".txt", ".model")]
    assert len(small) == 3
    digest = hashlib.sha256()
    for path in [folder / "model.safetensors", *small]:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    (folder / "README.md").write_text("not read by transformers")
    (folder / "more.json").mkdir()
    assert find_victim(spec_of(folder)).identity == digest.hexdigest()
    # Without code the permission changes nothing.
    assert find_victim(spec_of(folder, trust_remote_code=True)).identity == digest.hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        *("merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json", "vocab.json"),
        *(
            "qwen.tiktoken",
            "bpe.codes",
            "source.spm",
            "prophetnet.tokenizer",
            "chat_template.jinja",
        ),
    ],
)
def test_every_file_of_a_tokenizer_is_part_of_the_identity(folder: Path, name: str) -> None:
    before = find_victim(spec_of(folder)).identity
    (folder / name).write_text("{}")
    first = find_victim(spec_of(folder)).identity
    (folder / name).write_text("{ }")
    assert len({before, first, find_victim(spec_of(folder)).identity}) == 3


def test_every_vocabulary_of_transformers_is_known() -> None:
    # The names in the constants `VOCAB_FILES_NAMES` of the pinned version's tokenizers.
    import transformers

    read: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in ast.unparse(node.targets[0]):
                read |= set(ast.literal_eval(node.value).values())
    assert len(read) > 20
    assert {name for name in read if Path(name).suffix not in SMALL} == set()
    # Merges and shapes of words are none without the vocabulary that belongs to them.
    beside = {"merges.txt", "normalizer.json", "emoji.json", "tokenizer_config.json"} | {
        name for name in read if name.startswith("word_")
    }
    assert {name for name in read - beside if not _VOCABULARY.fullmatch(name)} <= {
        "entity_vocab.json"
    }


def test_a_file_swapped_under_its_size_and_time_is_noticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    before, times = find_victim(spec_of(folder)).identity, path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert find_victim(spec_of(folder)).identity != before
    assert folder_identity(folder, [path]) != before


# Pickles and damage --------------------------------------------------------------------------


def test_a_pickle_that_runs_code_does_not_run_even_if_pickles_are_allowed(
    folder: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(made), protocol=2))
    # Before: UnpicklingError, a traceback.
    with pytest.raises(UserError, match=r"victim '.*' cannot be loaded from"):
        Victim(spec_of(folder, allow_pickle=True), 2).new_model(0)
    torch.save({"classifier.bias": Harmful(made)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"victim '.*' cannot be loaded from"):
        Victim(spec_of(folder, allow_pickle=True), 2).new_model(0)
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1]"),
        ("config.json", '"bert"'),
        ("config.json", "\ud83d".encode("utf-8", "surrogatepass")),
        ("config.json", "[" * 100_000),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", (8).to_bytes(8, "little") + b"[1,2,3] "),
    ],
)
def test_a_damaged_file_is_an_error_by_name(folder: Path, name: str, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|cannot be loaded"):
        Victim(spec_of(folder), 2).new_model(0)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_mutated_bytes_end_in_user_errors_or_in_a_model(folder: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    path = folder / name
    original = path.read_bytes()
    outcomes = {"model": 0, "refused": 0}
    for _ in range(25):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            # The header of safetensors is where bytes have meanings.
            where = int(rng.integers(0, min(len(data), 4000)))
            kind = rng.integers(0, 3)
            if kind == 0:
                data[where] ^= 1 << int(rng.integers(0, 8))
            elif kind == 1:
                del data[where : where + int(rng.integers(1, 20))]
            else:
                data[where:where] = bytes(rng.choice(list(b'"{}[]:,-0e'), 2).astype(np.uint8))
        path.write_bytes(bytes(data))
        try:
            find_victim(spec_of(folder))
            Victim(spec_of(folder), 2).new_model(0)
            outcomes["model"] += 1
        except UserError as error:
            assert str(folder) in str(error)  # noqa: PT017
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5, outcomes


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_limit_of_the_machine_is_not_said_of_the_files(
    stored: StageRun, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(BertForSequenceClassification, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        model_of(stored, "it")
    assert raised.value is error


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    # Before: what did not fit was drawn anew, silently, and a random model was scored.
    edit(folder / "config.json", intermediate_size=48)
    with pytest.raises(UserError, match=r"do not fit its config\.json: bert\..* has another shape"):
        Victim(spec_of(folder), 2).new_model(0)


def test_weights_without_word_embeddings_are_refused(folder: Path) -> None:
    weights = {f"x.{name}": w for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"word_embeddings\.weight is not among them"):
        Victim(spec_of(folder), 2).new_model(0)


def test_a_hub_model_cannot_name_a_pickle_in_its_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the cache of the hub's client. Before: the pickle was read as weights.
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, shard in (("whole", "shard.safetensors"), ("pickled", "shard.bin")):
        kept = tmp_path / "hub" / f"models--nobody--{name}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("abc")
        snapshot = kept / "snapshots" / "abc"
        shutil.copytree(folder, snapshot)
        if name == "whole":
            save_file(weights, snapshot / shard, metadata={"format": "pt"})
        else:
            torch.save(weights, snapshot / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert Victim(VictimSpec("nobody/whole", MAX_LENGTH), 2).new_model(0).config.num_labels == 2
    with pytest.raises(UserError, match=r"names the weight file 'shard\.bin'; it may name \.safe"):
        Victim(VictimSpec("nobody/pickled", MAX_LENGTH), 2).new_model(0)


# Other models --------------------------------------------------------------------------------


def test_a_language_model_with_code_of_its_own_is_refused(own_code: Path) -> None:
    from btu.defenses.kit.language_model import load_named
    from btu.defenses.onion import find_language_model

    source = find_language_model(str(own_code), None)
    with pytest.raises(UserError, match=r"no key allows code that comes .* 'clean-rows'"):
        load_named(source, None)


def test_a_paraphrase_model_with_code_of_its_own_is_refused(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from btu.attacks.paraphrase import generate_paraphrases

    monkeypatch.setenv("BTU_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"No key allows code .* a column of the data"):
        generate_paraphrases(["a film"], str(own_code), "", 8)


@pytest.mark.parametrize("door", REFUSALS)
def test_other_models_have_no_side_door_either(folder: Path, door: str) -> None:
    from btu.attacks.style import Style
    from btu.defenses.onion import find_language_model
    from btu.types import Rows

    side_doors(folder)[door]()
    with pytest.raises(UserError, match=REFUSALS[door]):
        find_language_model(str(folder), None)
    with pytest.raises(UserError, match=REFUSALS[door]):
        Style(model=str(folder)).candidates(Rows(("a",), (0,)))

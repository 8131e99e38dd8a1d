"""The stages of a scan, on the user's own rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from btu.data.spec import DataSpec
from btu.data.suspects import SuspectCorpus, load_suspects
from btu.errors import UserError
from btu.stage_files import TRAIN, clean_rows_of, model_of, victim_of, write_rows
from btu.stages import StageRun, stage
from btu.types import Corpus


@stage(version=1, id="btu.scan:suspect_rows")
def suspect_rows(run: StageRun) -> dict[str, Any]:
    """Write the suspect rows, which replace the poisoned rows of a sweep."""
    corpus = _corpus_of(run, "train")
    write_rows(run.folder / TRAIN, corpus.train)
    return {"rows": len(corpus.train), "label_names": list(corpus.label_names)}


@stage(version=2, id="btu.scan:trusted_rows")
def trusted_rows(run: StageRun) -> dict[str, Any]:
    """Tokenize the trusted rows, if there are any."""
    from btu.training import Encoded

    corpus = _corpus_of(run, "clean")
    classes = len(corpus.label_names)
    victim = victim_of(run, classes)
    rows = corpus.clean
    pad = int(victim.tokenizer.pad_token_id or 0)
    encoded = victim.encode(rows) if len(rows) else Encoded.from_lists([], [], pad)
    encoded.save(run.folder / "clean.safetensors")
    return {"classes": classes, "rows": len(rows)}


@stage(version=1, id="btu.scan:accuracy")
def accuracy(run: StageRun) -> dict[str, Any]:
    """Count the trusted rows whose label a model predicts."""
    rows, precision = clean_rows_of(run), run.config["precision"]
    predicted = run.classes(model_of(run, "model"), rows, precision=precision, stage="accuracy")
    return {"hits": int((predicted == rows.labels.numpy()).sum()), "n": len(rows)}


def _corpus_of(run: StageRun, role: str) -> Corpus:
    spec = DataSpec(**run.where["spec"])
    corpus = loaded_suspects(spec, run.where["clean_file"]).corpus
    if corpus.fingerprints()[role] != run.config["data"]:
        raise UserError(f"the {role} rows of data '{spec.name}' changed meanwhile; scan again.")
    return corpus


@lru_cache(maxsize=1)
def loaded_suspects(spec: DataSpec, clean_file: str | None) -> SuspectCorpus:
    """Return the rows of a scan, loaded once per process."""
    return load_suspects(spec, clean_file)

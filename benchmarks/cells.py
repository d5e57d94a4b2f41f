# SPDX-License-Identifier: Apache-2.0
"""One cell of the experiment: train a variant with one seed, evaluate it, probe it with few labels.

`python -m benchmarks.cells SPEC.json` runs the cell that `benchmarks.experiment` described. A cell's folder holds
`models/`, `eval/`, `evaluation.json`, `features.npz`, figures of its failures, and at the very end `result.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from benchmarks.failures import write_failures
from unimedi_components.data.datalist import write_json
from unimedi_components.data.phantom import LAYOUTS
from unimedi_components.data.phantom.truth import labels_of, load_truth
from unimedi_components.data.splits import nested_fraction
from unimedi_components.metrics.bootstrap import patient_intervals
from unimedi_components.networks.pretrained import Pretrained, load_pretrained
from unimedi_components.provenance import commit, provenance
from unimedi_components.retrieval.evaluate import evaluate, heldout_items
from unimedi_components.retrieval.features import Features, extract_features
from unimedi_components.retrieval.probe import STRENGTHS, LogisticProbe, linear_probe

CONFIGS = Path("bundles/pretrain/configs")
FRACTIONS = {"1pct": 0.01, "10pct": 0.1, "100pct": 1.0}
RESULT, STAMP = "result.json", "training.json"
# where a run reads and writes; not what it computes
_PLACES = ("bundle_root", "ckpt_dir", "output_dir", "data_dir", "dataset_dir", "cache_dir", "resume")
_RESAMPLES = 1000
Json = dict[str, Any]


def config_files(cell: Mapping[str, Any]) -> list[str]:
    """The config files of a cell, overlays last."""
    return [str(CONFIGS / f"{name}.json") for name in ("train", *cell["overlays"])]


def overrides(cell: Mapping[str, Any]) -> Json:
    """What the command line of a cell's training overrides."""
    return {"epochs": cell["settings"]["epochs"], **cell["settings"]["overrides"], **cell["overrides"]}


def _parser(cell: Mapping[str, Any]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(config_files(cell))
    parser.update({**overrides(cell), "seed": cell["seed"]})
    return parser


def training_key(cell: Mapping[str, Any]) -> str:
    """Hash of all that decides the weights: the merged config with its overrides, and the phantoms' versions."""
    config = {key: value for key, value in _parser(cell).get().items() if key not in _PLACES}
    versions = {name: LAYOUTS[name].version for name in ("mimic_cxr", "bimcv")}
    return _digest([cell["kind"], config, versions])


def cell_key(cell: Mapping[str, Any]) -> str:
    """Hash of all that decides a cell's result: that of its training, and how it is measured."""
    measured = {key: value for key, value in cell["settings"].items() if key in ("patients", "pool", "data_sets")}
    seeds = {key: value for key, value in cell["settings"].items() if key.endswith("_seed")}
    return _digest([training_key(cell), measured, seeds])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_json(path: Path) -> Json:
    """The content of a JSON file; empty where it is missing or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def finished(cell: Mapping[str, Any]) -> bool:
    """Whether the cell's result is whole and that of these very settings."""
    key = read_json(Path(cell["folder"], RESULT)).get("key")
    return key is not None and key == cell_key(cell)


def training_datalist(cell: Mapping[str, Any]) -> str:
    """Write the training phantoms and their datalist where they are not there yet, and return its path."""
    return str(_parser(cell).get_parsed_content("datalist"))


def run_cell(cell: Mapping[str, Any]) -> None:
    """Run a cell to its end, from wherever an interrupted run of it got to; a finished one returns at once."""
    folder = Path(cell["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        # Training inherits the lock: what outlives a killed experiment is waited for, not run twice.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished(cell):
            (folder / RESULT).unlink(missing_ok=True)
            write_json(_measured(cell, folder, lock.fileno()), folder / RESULT)


def _measured(cell: Mapping[str, Any], folder: Path, lock: int) -> Json:
    settings = cell["settings"]
    if cell["kind"] == "train":
        origin = _train(cell, folder, lock)
    else:
        _save_untrained(cell)
        origin = provenance()
    measured_from = time.monotonic()
    network = load_pretrained(folder / "models" / "model.pt", _device(cell))
    test = {dim: _studies(cell, network, dim, settings["eval_seed"], settings["patients"]) for dim in (2, 3)}
    measures: Json = {}
    if cell["kind"] != "pixels":
        target = folder / "evaluation.json"
        keep = Path(settings["phantoms"], f"seed_{settings['eval_seed']}")
        measures = evaluate(
            network.path, settings["patients"], settings["eval_seed"], target, _device(cell), keep, progress=False
        )
        _save_features(test, folder / "features.npz")
        if cell["seed"] == settings["seeds"][0] and cell["kind"] == "train":
            write_failures(network, {dim: part[0] for dim, part in test.items()}, test[3][2], _truth(test), folder)
    _add(measures, _label_probes(cell, network, test))
    if settings["data_sets"] and cell["kind"] == "train":
        _add(measures, _data_sets(cell, folder))
    return {
        "key": cell_key(cell),
        "variant": cell["variant"],
        "title": cell["title"],
        "seed": cell["seed"],
        "config": config_files(cell),
        "overrides": overrides(cell),
        **origin,
        "measured_at": commit(),
        "measuring_s": round(time.monotonic() - measured_from, 1),
        "measures": measures,
    }


def _add(measures: Json, more: Json) -> None:
    intervals = {**(measures.get("intervals") or {}), **more["intervals"]}
    measures.update({**more, "intervals": intervals})


def train_command(cell: Mapping[str, Any]) -> list[str]:
    """The command line that trains a cell."""
    files, folder = config_files(cell), Path(cell["folder"])
    config = files[0] if len(files) == 1 else repr(files).replace(" ", "")
    places = {"ckpt_dir": folder / "models", "output_dir": folder / "eval"}
    flags = {"seed": cell["seed"], **overrides(cell), **places}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *words]


def _train(cell: Mapping[str, Any], folder: Path, lock: int) -> Json:
    """Train, or go on where an interrupted training stopped; returns the command, commit and machine of its start."""
    key, command = training_key(cell), train_command(cell)
    stamp = read_json(folder / STAMP)
    if stamp.get("key") != key:
        for name in ("models", "eval"):
            shutil.rmtree(folder / name, ignore_errors=True)
        stamp = {"key": key, "done": False, "run": provenance(["python", *command[1:]])}
        write_json(stamp, folder / STAMP)
    if not stamp["done"]:
        again = ["--resume", "True"] if (folder / "models" / "last.pt").is_file() else []
        subprocess.run([*command, *again], check=True, pass_fds=(lock,))
        write_json({**stamp, "done": True}, folder / STAMP)
    return stamp["run"]


def _save_untrained(cell: Mapping[str, Any]) -> None:
    """Write the checkpoint of the network as its seed initialises it."""
    folder = Path(cell["folder"])
    places = {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "eval")}
    over = {**overrides(cell), "seed": cell["seed"], **places, "train#run#whiten_tokenizers": False}
    run = ConfigWorkflow(config_files(cell), workflow_type="train", logging_file=False, **over)
    run.initialize()
    checkpoint = run.parser.get_parsed_content("train#run").checkpoint
    checkpoint.write_card()
    checkpoint.write_weights(improved=False)
    monai.utils.set_determinism(None)


def _device(cell: Mapping[str, Any]) -> str:
    return str(cell["settings"]["overrides"].get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def held_out(cell: Mapping[str, Any], dim: int, seed: int, patients: int) -> None:
    """Write phantoms that no cell trains on, and beside them their items, which take as long to find as to use."""
    phantoms, punct = cell["settings"]["phantoms"], bool(_parser(cell).get("datalist#keep_punct"))
    items, root, _ = heldout_items(dim, Path(phantoms, f"seed_{seed}"), patients, seed, keep_punct=punct)
    write_json({"root": str(root), "items": items}, _items_file(phantoms, dim, seed, patients, punct))


def _items_file(phantoms: str | Path, dim: int, seed: int, patients: int, punct: bool) -> Path:
    return Path(phantoms, f"seed_{seed}", f"{dim}d_{patients}{'_punct' if punct else ''}.json")


Part = tuple[Features, np.ndarray, Path, Mapping[str, Any]]


def _studies(cell: Mapping[str, Any], network: Pretrained, dim: int, seed: int, patients: int) -> Part:
    """Features of held-out studies, their labels (N, F), the folder of their images and the truth."""
    phantoms = Path(cell["settings"]["phantoms"])
    found = json.loads(_items_file(phantoms, dim, seed, patients, network.keep_punct).read_text(encoding="utf-8"))
    root, truth = Path(found["root"]), load_truth(found["root"])
    assert truth is not None
    options: Json = {"cache_dir": phantoms / "cache", "progress": False}
    features = extract_features(network, found["items"], root, **options)[dim]
    return features, labels_of(features.items, truth["studies"]), root, truth


def _truth(test: Mapping[int, Part]) -> Json:
    return {name: study for part in test.values() for name, study in part[3]["studies"].items()}


def _save_features(test: Mapping[int, Part], path: Path) -> None:
    """CLS features, embeddings and labels for the page's figures, half precision."""
    arrays: dict[str, Any] = {"findings": np.asarray(test[2][3]["findings"])}
    for dim, (features, labels, _, _) in test.items():
        arrays[f"labels_{dim}d"] = labels.astype(np.int8)
        for name in ("cls", "image_embed", "text_embed"):
            arrays[f"{name}_{dim}d"] = getattr(features, name).numpy().astype(np.float16)
    with open(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def _label_probes(cell: Mapping[str, Any], network: Pretrained, test: Mapping[int, Part]) -> Json:
    """AUROC on the held-out studies of probes trained on a fraction of further ones' labels, with patient intervals."""
    settings = cell["settings"]
    result: Json = {"intervals": {}}
    for dim, part in test.items():
        pool = _studies(cell, network, dim, settings["pool_seed"], settings["pool"])
        names = part[3]["findings"]
        x, x_test = (p[0].pooled.numpy() if cell["kind"] == "pixels" else p[0].cls.numpy() for p in (pool, part))
        patients, own = part[0].patients, np.asarray(pool[0].patients)
        if cell["kind"] == "pixels":
            result[f"probe_auroc_{dim}d"] = linear_probe(x_test, part[1], names, patients).macro
        groups = np.unique(patients, return_inverse=True)[1]
        labelled = [
            {"row": i, "patient": item["patient"], "dim": dim, "label": labels.tolist()}
            for i, (item, labels) in enumerate(zip(pool[0].items, pool[1], strict=True))
        ]
        for name, fraction in FRACTIONS.items():
            rows = [item["row"] for item in nested_fraction(labelled, fraction, cell["seed"])]
            scores = transfer_scores(x[rows], pool[1][rows], x_test, own[rows].tolist())
            key = f"probe_auroc_{dim}d_{name}"
            result[key], result["intervals"][key] = _macro(scores, part[1], names, groups)
    return result


def transfer_scores(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    groups: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> np.ndarray:
    """Decision values on other images of probes trained on these, one for each finding.

    Args:
        train: features to train on, (N, D); they alone set standardisation and penalty.
        labels: 0 or 1 for each finding, (N, F).
        test: features to score, (M, D).

    Returns:
        (M, F); a finding that the N images all have or all lack scores 0 everywhere, an AUROC of 0.5.
    """
    x, y, x_test = np.asarray(train, np.float64), np.asarray(labels), np.asarray(test, np.float64)
    keys = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    scores = np.zeros((len(x_test), y.shape[1]))
    for column in range(y.shape[1]):
        if len(np.unique(y[:, column])) == 2:
            probe = LogisticProbe(strengths, seed=seed).fit(x, y[:, column], keys)
            scores[:, column] = probe.decision(x_test)
    return scores


def _macro(
    scores: np.ndarray, truth: np.ndarray, names: Sequence[str], patients: np.ndarray
) -> tuple[float | None, list[float] | None]:
    """Macro AUROC over the findings that the test studies have and lack, and its interval over patients."""
    from sklearn.metrics import roc_auc_score

    asked = [c for c, column in enumerate(truth.T) if 0 < column.sum() < len(column)]
    if not asked:
        return None, None
    kept = [names[c] for c in asked]
    right = np.ones((len(truth), 1), dtype=bool)
    found = patient_intervals(kept, scores[:, asked], truth[:, asked], right, right, patients, _RESAMPLES, 0)
    return float(np.mean([roc_auc_score(truth[:, c], scores[:, c]) for c in asked])), found["macro_auroc"]


def _data_sets(cell: Mapping[str, Any], folder: Path) -> Json:
    """Table 7's columns: linear probes of the classification bundles, by data set and fraction of the labels."""
    from benchmarks.tables import TABLES, run_bundle

    result: Json = {"intervals": {}}
    weights = str((folder / "models" / "model.pt").resolve())
    for part in (TABLES[1][0], TABLES[1][1], TABLES[2][0]):
        made = Path(cell["settings"]["phantoms"], f"{part.data_set}.made")
        for name, fraction in FRACTIONS.items():
            over = {"encoder_weights": weights, "label_fraction": fraction, "seed": cell["seed"]}
            with open(made.with_suffix(".lock"), "w") as lock:
                # of cells side by side, the first writes the data set's phantoms
                if not made.is_file():
                    fcntl.flock(lock, fcntl.LOCK_EX)
                _, measured = run_bundle(part, over)
                made.touch()
            key = f"{part.data_set}_{part.metrics[0]}_{name}"
            result[key] = measured[part.metrics[0]]
            result["intervals"][key] = measured["intervals"][part.metrics[0]]
    return result


if __name__ == "__main__":
    run_cell(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

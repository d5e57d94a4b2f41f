# SPDX-License-Identifier: Apache-2.0
"""Every reader of reports and sentences gives the network the text form that it was trained on."""

import csv
import json
import warnings
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from unimedi_components.data import load_datalist, pretraining_datalist, select
from unimedi_components.data.phantom import write_phantom
from unimedi_components.data.prepare import merge_datalists, prepare
from unimedi_components.data.table import read_reports
from unimedi_components.data.text import as_trained, clean_report
from unimedi_components.errors import DataError
from unimedi_components.loading import MixedCollate
from unimedi_components.networks.pretrained import load_pretrained
from unimedi_components.retrieval import Embedder, ZeroShot, evaluate_datalist, load_prompts
from unimedi_components.retrieval.embedder import make_dataset
from unimedi_components.retrieval.evaluate import heldout_items

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
PATIENTS, SEED = 6, 5
TEXTS = (
    "1. A 3.5 cm node, right-sided.\n2. No effusion! Heart: normal in size.",
    "Findings: The lungs are clear; no effusion.  Impression: 1. No acute disease. 2. Stable.",
    "no.5 rib (old fracture), t12/l1 ok? nothing else.",
)


@pytest.fixture(scope="module", params=[True, False, None], ids=["kept", "lost", "old card"])
def keep_punct(request):
    return request.param


@pytest.fixture(scope="module")
def training(tmp_path_factory, keep_punct, leave_network):
    """A training run's datalist, its folder, and a network as the run leaves it, with random weights."""
    root = tmp_path_factory.mktemp("data")
    kept = {"mimic_cxr": PATIENTS, "bimcv": PATIENTS}
    datalist = load_datalist(
        pretraining_datalist(root, kept, SEED, **{} if keep_punct is False else {"keep_punct": True}), root
    )
    reports = [item["report"] for item in datalist["training"]]
    card = {} if keep_punct is None else {"keep_punct": keep_punct}
    path = leave_network(tmp_path_factory.mktemp("models"), reports, depth=1, **card)
    return datalist, root, load_pretrained(path)


@pytest.fixture
def embedder(training, monkeypatch):
    """An embedder and the list of the texts that its tokenizer is given."""
    found, seen = Embedder(training[2], "cpu"), []
    tokenize = type(found.pretrained.tokenizer).__call__

    def recorded(self, texts, **options):
        seen.extend(texts)
        return tokenize(self, texts, **options)

    monkeypatch.setattr(type(found.pretrained.tokenizer), "__call__", recorded)
    return found, seen


def ids_of(pretrained, item):
    """Token ids as training's batches have them."""
    return MixedCollate(pretrained.tokenizer, 64, 64)([{**item, "image": torch.zeros(1, 2, 2)}])["input_ids"].tolist()


def test_evaluation_tokenises_what_training_did(training, keep_punct, tmp_path):
    """The same phantoms, in training's batches and as `evaluate` writes and reads them: the same token ids."""
    datalist, _, pretrained = training
    assert pretrained.keep_punct is (keep_punct is not False) is datalist["meta"]["keep_punct"]
    items = {item["id"]: item for split in ("training", "validation", "test") for item in select(datalist, split)}
    assert all(item["report"].endswith(".") is pretrained.keep_punct for item in items.values())
    checked = 0
    for dim in (2, 3):
        held, folder, _ = heldout_items(dim, tmp_path, 4, SEED, 1, False, pretrained.keep_punct)
        for item in make_dataset(pretrained, held, folder).data:
            if item["id"] in items:
                assert ids_of(pretrained, item) == ids_of(pretrained, items[item["id"]])
                checked += 1
    assert checked >= 6


def test_typed_and_listed_texts_take_the_same_form(training, embedder, tmp_path):
    datalist, root, pretrained = training
    found, seen = embedder
    kept = pretrained.keep_punct
    form = [clean_report(text, kept).text for text in TEXTS]
    found.reports([{"id": str(i), "dim": 2, "report": text} for i, text in enumerate(form)])
    assert seen == form
    # from a table of whole reports
    with open(tmp_path / "r.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("id", "report", "dim"), *((i, text, 3) for i, text in enumerate(TEXTS))])
    seen.clear()
    found.reports(read_reports(tmp_path / "r.csv", None, kept))
    assert seen == form
    # from a datalist that kept the punctuation
    items = [{**item, "report": clean_report(TEXTS[0], True).text} for item in datalist["training"][:2]]
    assert {item["report"] for item in make_dataset(pretrained, items, root).data} == {form[0]}
    seen.clear()
    found.reports(items)
    assert seen == [form[0]] * 2
    seen.clear()
    found.sentences(["Large  left effusion, new", "Cardiomegaly. No effusion?"], 2)
    words = ["large left effusion new", "cardiomegaly no effusion"]
    assert seen == (["large left effusion, new.", "cardiomegaly. no effusion."] if kept else words)
    seen.clear()
    ZeroShot(found, load_prompts("chest_ct"))
    assert len(seen) > 300 and all(("." in text) is kept and ("," not in text or kept) for text in seen)
    if kept:
        assert all(text.count(".") >= 3 and text.endswith(".") for text in seen)


def test_what_was_cleaned_once_stays():
    for text in TEXTS:
        for kept in (True, False):
            cleaned = clean_report(text, kept).text
            assert as_trained(cleaned, kept) == cleaned
    assert as_trained("Nodule", True) == "nodule." and as_trained("No. Nodule.", False, 1) == "no nodule"
    assert as_trained("Effusion?!", True) == "effusion." and as_trained("", True) == as_trained("", False) == ""
    assert as_trained("Findings:", False, 1) == "findings"


def test_reports_that_lost_it_are_said_to_a_network_that_kept_it(training, tmp_path):
    datalist, root, pretrained = training
    lost = {**datalist, "meta": {**datalist["meta"], "keep_punct": False}}
    if pretrained.keep_punct:
        with pytest.warns(UserWarning, match="reports lost their punctuation.*prepare the data with --keep_punct"):
            evaluate_datalist(pretrained, lost, root, split="test", progress=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            evaluate_datalist(pretrained, lost, root, split="test", progress=False)


def test_two_forms_are_not_joined(tmp_path):
    for name, kept in (("mimic_cxr", True), ("bimcv", False)):
        prepare(name, write_phantom(name, tmp_path / name, 4, 0, 1, False), tmp_path / f"{name}.json", keep_punct=kept)
    with pytest.raises(DataError, match=r"with punctuation beside some without .*one --keep_punct"):
        merge_datalists({n: tmp_path / f"{n}.json" for n in ("mimic_cxr", "bimcv")}, tmp_path / "j.json", tmp_path)


@pytest.mark.parametrize(
    ("overlay", "meta", "expected"),
    [
        ((), {}, True),
        (("mimic_cxr_bimcv",), {}, False),
        ((), {"keep_punct": False}, False),
        (("mimic_cxr_bimcv",), {"keep_punct": True}, True),
    ],
)
def test_the_card_says_what_the_datalist_holds(overlay, meta, expected):
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / "pretrain" / "configs" / f"{name}.json") for name in ("train", *overlay)])
    parser["items"] = {"meta": meta}
    assert parser.get_parsed_content("preprocessing")["keep_punct"] is expected


def test_the_retrieval_bundle_prepares_as_the_card_says():
    config = json.loads((BUNDLES / "report_retrieval" / "configs" / "evaluate.json").read_text())
    assert config["datalist"]["keep_punct"] == "$@embedder.pretrained.keep_punct"

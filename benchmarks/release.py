# SPDX-License-Identifier: Apache-2.0
"""The release: every bundle with its trained weights as a zip of MONAI's model zoo, and the hashes of all files.

`python -m benchmarks.release --weights bundles --out dist --url https://...` (or `make bundles`) writes
`<name>_v<version>.zip` for each bundle: configs, docs, licence, and of `models/` what loading and running need. Left
out are what only a resumed training needs (`last.pt`, `last.ckpt`: optimizer, teacher), `model_best.pt`, the
vocabulary's cache, and the encoder in `unimedi.pt`, which `model.pt` holds. TorchScript is made where the bundle's
metadata does not exclude it. What would make a zip larger than the limit lies beside it, and is named with its hash in
the zip's `large_files.yml`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import fire
import torch
import yaml
from monai.bundle import ckpt_export

from unimedi_components.data.catalogue import DATASETS
from unimedi_components.errors import CheckpointError, ConfigError
from unimedi_components.networks.weights import read_state_dict
from unimedi_components.retrieval.embedder import load_trained

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
# what may lie beside a zip, the first one first
LARGE = ("model.ts", "unimedi.pt", "model.pt")


def release(weights: str = "bundles", out: str = "dist", url: str | None = None, limit_mb: float = 8) -> None:
    """Write the zips, and `SHA256SUMS` of all files in `out`.

    Args:
        weights: folder with `<bundle>/models` of finished trainings.
        out: folder to write to.
        url: where the files of `out` will be served, for `large_files.yml`.
        limit_mb: the largest zip, in 10^6 bytes.

    Raises:
        ConfigError: a zip is too large without its weights beside it, and there is no `url` to find them by.
        CheckpointError: a bundle has no trained weights, or they do not load.
    """
    folder = Path(str(out))
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in BUNDLES.iterdir() if (path / "configs").is_dir())
    models = {name: trained_models(Path(str(weights)), name) for name in names}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            bundle = stage(name, models[name], Path(place))
            file = folder / f"{name}_v{metadata(bundle)['version']}.zip"
            beside = move_large(bundle, file, limit_mb * 1e6, url)
            write_zip(bundle, file)
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB{''.join(f', beside it {path.name}' for path in beside)}")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), encoding="ascii")


def trained_models(weights: Path, name: str) -> Path:
    """The `models` folder of a trained bundle; that of pre-training where a bundle trains nothing."""
    trains = (BUNDLES / name / "configs" / "train.json").is_file()
    models = weights / name / "models"
    source = name if trains or (models / "model.pt").is_file() else "pretrain"
    models = weights / source / "models"
    if not (models / "model.pt").is_file():
        command = f"python -m monai.bundle run --config_file bundles/{source}/configs/train.json"
        raise CheckpointError(f"{models / 'model.pt'}: {name} is not trained; run '{command}'")
    load_trained(models / "model.pt")
    return models


def stage(name: str, models: Path, place: Path) -> Path:
    """Lay out a bundle's folder as its zip holds it, TorchScript included."""
    bundle = place / name
    for part in ("configs", "docs"):
        shutil.copytree(BUNDLES / name / part, bundle / part)
    shutil.copy(BUNDLES / name / "LICENSE", bundle)
    (bundle / "docs" / "data_license.txt").write_text(data_licence(bundle / "configs"), encoding="utf-8")
    (bundle / "models").mkdir()
    for file in ("model.pt", "model.json"):
        shutil.copy(models / file, bundle / "models")
    if (models / "unimedi.pt").is_file():
        state = read_state_dict(models / "unimedi.pt")
        towers = {key: value for key, value in state.items() if not key.startswith("encoder.")}
        torch.save(towers, bundle / "models" / "unimedi.pt")
        shutil.copytree(models / "report_encoder", bundle / "models" / "report_encoder")
    if "ckpt_export" not in metadata(bundle).get("excluded_checks", {}):
        ckpt_export(
            net_id="network_def",
            filepath=str(bundle / "models" / "model.ts"),
            ckpt_file=str(bundle / "models" / "model.pt"),
            meta_file=str(bundle / "configs" / "metadata.json"),
            config_file=str(bundle / "configs" / "inference.json"),
        )
    return bundle


def data_licence(configs: Path) -> str:
    """What the weights have seen, and the licences of the data sets that a bundle's configs name."""
    texts = [path.stem + path.read_text(encoding="utf-8") for path in configs.glob("*.json")]
    lines = ["Weights of the default trainings have seen nothing but synthetic images, which the project makes itself"]
    lines += ["(Apache-2.0); weights of other trainings are under the terms of their data.", ""]
    lines += ["No data set is included. Those that the configs read have their own licences:", ""]
    for name, data in DATASETS.items():
        if name != "table" and any(re.search(rf"(?<![a-z]){name}(?![a-z])", text) for text in texts):
            lines += [f"{data.title}", f"    {data.source}", f"    {data.licence}", ""]
    return "\n".join(lines)


def move_large(bundle: Path, file: Path, limit: float, url: str | None) -> list[Path]:
    """Move what makes the zip `file` too large beside it, and name it in the bundle's `large_files.yml`."""
    sizes = {path: len(zlib.compress(path.read_bytes(), 9)) for path in bundle.rglob("*") if path.is_file()}
    moved, entries = [], []
    for name in LARGE:
        path = bundle / "models" / name
        if sum(sizes.values()) <= limit or path not in sizes:
            continue
        # TorchScript can be made again by anyone; weights cannot
        if url is None and name != "model.ts":
            raise ConfigError(
                f"{file.name} would have {sum(sizes.values()) / 1e6:.1f} MB; name where {name} will be found beside it "
                "with --url https://..., or a higher --limit_mb"
            )
        moved.append(file.with_name(f"{file.stem}_{name}"))
        shutil.move(path, moved[-1])
        del sizes[path]
        address = f"{str(url).rstrip('/')}/{moved[-1].name}"
        entries.append({"path": f"models/{name}", "url": address, "hash_val": sha256(moved[-1]), "hash_type": "sha256"})
    if entries and url is not None:
        (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": entries}, sort_keys=False))
    return moved


def write_zip(bundle: Path, file: Path) -> None:
    """Zip a folder so that the same content gives the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(bundle.parent).as_posix(), (2020, 1, 1, 0, 0, 0))
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())


def metadata(bundle: Path) -> dict[str, Any]:
    """A bundle's `metadata.json`."""
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    try:
        fire.Fire(release)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

# SPDX-License-Identifier: Apache-2.0
"""One process of the phantom writer: every n-th patient, one line of JSON on standard output for each."""

import json
import sys
from pathlib import Path

from . import patient_record


def main(job: str) -> None:
    """Write patients first, first + step, ... below stop. ``job``: JSON of layout, root, seed, first, stop, step."""
    layout, root, seed, first, stop, step = json.loads(job)
    for index in range(first, stop, step):
        print(json.dumps(patient_record(layout, Path(root), seed, index)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

# SPDX-License-Identifier: Apache-2.0
"""Synthetic chest patients, written to disk in the layouts of real data sets.

Importing the package registers the layouts; `write_phantom` writes one.
"""

from . import bimcv, mimic_cxr
from .findings import FINDINGS, FOCAL, SEVERITIES, ZONES, Finding
from .studies import CTStudy, XrayStudy, make_ct, make_patient, make_xray
from .writer import LAYOUTS, TRUTH, Layout, PhantomFolder, patient_record, register, write_phantom

__all__ = [
    "FINDINGS",
    "FOCAL",
    "LAYOUTS",
    "SEVERITIES",
    "TRUTH",
    "ZONES",
    "CTStudy",
    "Finding",
    "Layout",
    "PhantomFolder",
    "XrayStudy",
    "bimcv",
    "make_ct",
    "make_patient",
    "make_xray",
    "mimic_cxr",
    "patient_record",
    "register",
    "write_phantom",
]

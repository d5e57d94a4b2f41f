# SPDX-License-Identifier: Apache-2.0
"""Synthetic chest patients, written to disk in the layouts of real data sets."""

from . import amos, bcv, bimcv, cc_ccii, chexpert, covidx, luna16, mimic_cxr, rsna
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
    "amos",
    "bcv",
    "bimcv",
    "cc_ccii",
    "chexpert",
    "covidx",
    "luna16",
    "make_ct",
    "make_patient",
    "make_xray",
    "mimic_cxr",
    "patient_record",
    "register",
    "rsna",
    "write_phantom",
]

# SPDX-License-Identifier: Apache-2.0
"""Synthetic chest patients, written to disk in the layouts of real data sets."""

from . import amos, bcv, bimcv, cc_ccii, chexpert, covidx, luna16, mimic_cxr, rsna
from .findings import FINDINGS
from .studies import make_ct, make_patient, make_xray
from .writer import LAYOUTS, patient_record, write_phantom

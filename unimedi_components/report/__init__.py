# SPDX-License-Identifier: Apache-2.0
"""The page: tables, figures and failures of runs and of the experiment, beside the paper's numbers."""

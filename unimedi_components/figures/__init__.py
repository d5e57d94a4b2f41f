# SPDX-License-Identifier: Apache-2.0
"""Figures, drawn without a display: loss curves, attention, charts of results, panels of predictions."""

# SPDX-License-Identifier: Apache-2.0
"""Pure functions from predictions and features to numbers."""

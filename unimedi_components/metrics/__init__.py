# SPDX-License-Identifier: Apache-2.0
"""Pure functions from outputs and truth to numbers, with one bootstrap over patients."""

# SPDX-License-Identifier: Apache-2.0
"""What a file, folder or DICOM series is, whether it is sound, and its values: the only way in for every command."""

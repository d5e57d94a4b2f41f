# SPDX-License-Identifier: Apache-2.0
"""The project's exceptions. Each message names the file or key, the fault and the remedy."""


class DataError(ValueError):
    """A data set, file or datalist is missing, unreadable or inconsistent."""


class CheckpointError(ValueError):
    """Weights are missing or do not fit the network that they are loaded into."""


class ConfigError(ValueError):
    """A bundle config or an override names something that nothing defines, or combines options that cannot work."""

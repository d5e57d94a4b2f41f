# SPDX-License-Identifier: Apache-2.0
"""A local web page over a trained network, for one user on one machine; needs the extra `serve`."""

from unimedi_components.serve.analysis import Analyser
from unimedi_components.serve.app import create_app
from unimedi_components.serve.faults import Limits, UploadError
from unimedi_components.serve.server import serve

__all__ = ["Analyser", "Limits", "UploadError", "create_app", "serve"]

# SPDX-License-Identifier: Apache-2.0
"""The web application: a page, and the JSON that it asks for."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from unimedi_components import __version__
from unimedi_components.errors import DataError
from unimedi_components.serve.analysis import Analyser
from unimedi_components.serve.faults import ACCEPTED, Limits, UploadError, bad_request, too_large, unsupported
from unimedi_components.serve.guard import LOOPBACK, Guard
from unimedi_components.serve.results import About, Analysis, Neighbours
from unimedi_components.serve.study import find_study
from unimedi_components.serve.uploads import checked_name, store

logger = logging.getLogger(__name__)
T = TypeVar("T")

_STATIC = Path(__file__).with_name("static")
_MAX_WAITING = 8
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODY = {"type": "object", "properties": {"files": _FILES}, "required": ["files"]}
_FAULT = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _FAULT}}}
    for status, text in {
        400: "The request is wrong",
        413: "Too large",
        415: "Not a format that is read",
        422: "Damaged, or not an image that the network can read",
        503: "Too many uploads at once",
    }.items()
}


@dataclass(frozen=True)
class Sentence:
    """A finding or a sentence of a report, in English."""

    text: str


def create_app(analyser: Analyser, limits: Limits | None = None, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """Build the application.

    The network and all reading of files run in one thread of their own, one request after the other, so that memory
    holds one study at a time and the server answers meanwhile. Nothing of an upload outlives its request.

    Args:
        analyser: the network and what it is asked.
        hosts: names by which the server may be called, see `Guard`.
    """
    limits = limits or Limits()
    worker = ThreadPoolExecutor(1, thread_name_prefix="network")
    waiting = 0

    async def work(function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *args)

    async def wait_for(function: Callable[..., T], *args: Any) -> T:
        nonlocal waiting
        if waiting >= _MAX_WAITING:
            raise HTTPException(503, "the server is busy with other studies. Try again in a minute.")
        waiting += 1
        try:
            return await work(function, *args)
        finally:
            waiting -= 1

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(wait=False, cancel_futures=True)

    # the interactive pages of FastAPI load their scripts from elsewhere; openapi.json stays
    app = FastAPI(title="UniMedI", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, limits=limits, hosts=hosts)
    _add_fault_handlers(app)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_STATIC / "index.html")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, and how many studies are at work or waiting."""
        return {"status": "ok", "waiting": waiting}

    @app.get("/api/about")
    async def about() -> About:
        """What this server runs on, and its limits."""
        return _about(analyser, limits)

    @app.post(
        "/api/analyse",
        responses=_FAULTS,
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _BODY}}}},
    )
    async def analyse(request: Request) -> Analysis:
        """Analyse one X-ray or one volume: a file, a DICOM series as several files, or a zip."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise unsupported(
                f"the upload is no form with files (multipart/form-data, field 'files'). Give {ACCEPTED}."
            )
        try:
            form = await request.form(max_files=limits.files, max_fields=8)
        except StarletteHTTPException as error:
            reason = str(error.detail).rstrip(".")
            raise bad_request(f"the upload cannot be read ({reason}). Drop at most {limits.files} files.") from None
        try:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            return await wait_for(_analyse, analyser, files, limits)
        finally:
            await form.close()

    @app.post("/api/search", responses=_FAULTS)
    async def search(sentence: Sentence) -> Neighbours:
        """Find the reports and studies nearest to a sentence."""
        return await work(analyser.sentence, sentence.text)

    @app.get("/api/thumbnail/{row}", response_class=Response)
    async def thumbnail(row: int) -> Response:
        """A small picture of an image of the index."""
        png = await work(analyser.thumbnail, row)
        if png is None:
            raise HTTPException(404, "there is no picture of this entry. Its file was moved, or it is a report.")
        return Response(png, media_type="image/png")

    return app


def _analyse(analyser: Analyser, files: Sequence[UploadFile], limits: Limits) -> Analysis:
    names = [file.filename or "" for file in files]
    # before anything is stored
    shown = [checked_name(name) for name in names]
    with tempfile.TemporaryDirectory(prefix="unimedi-serve-") as folder:
        pairs = zip(names, files, strict=True)
        received = [store(name, file.file, Path(folder), number) for number, (name, file) in enumerate(pairs)]
        try:
            return analyser.study(find_study(received, Path(folder), limits))
        except MemoryError:
            raise too_large(f"{shown[0]}: takes more memory than there is. Crop or resample the volume.") from None


def _about(analyser: Analyser, limits: Limits) -> About:
    embedder, index = analyser.embedder, analyser.index
    kinds: dict[str, int] = {}
    for entry in [] if index is None else index.entries:
        name = "report" if entry["kind"] == "report" else "xray" if entry["dim"] == 2 else "volume"
        kinds[name] = kinds.get(name, 0) + 1
    return About(
        model=embedder.model,
        checkpoint=embedder.pretrained.path.name,
        phantoms=embedder.card.get("phantom_seed") is not None,
        device=str(embedder.device),
        max_upload_bytes=limits.upload_bytes,
        max_files=limits.files,
        prompts={str(dim): one.name for dim, one in analyser.prompts.items()},
        index=kinds,
    )


def _add_fault_handlers(app: FastAPI) -> None:
    @app.exception_handler(UploadError)
    async def refused(_: Request, fault: UploadError) -> JSONResponse:
        return JSONResponse({"error": str(fault)}, fault.status)

    @app.exception_handler(DataError)
    async def wrong_data(_: Request, fault: DataError) -> JSONResponse:
        return JSONResponse({"error": str(fault)}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def http_fault(_: Request, fault: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(fault.detail)}, fault.status_code)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, fault: RequestValidationError) -> JSONResponse:
        first = fault.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": str(bad_request(f"{place}: {first['msg']}. See /openapi.json."))}, 400)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)

    @app.exception_handler(Exception)
    async def failed(_: Request, fault: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=fault)
        kind = type(fault).__name__
        return JSONResponse({"error": f"the server failed at this ({kind}). Its log says more; it goes on."}, 500)

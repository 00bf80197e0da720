"""The embedded server's routes: KServe V2, `/classify`, health, metrics and the page; Starlette carries them.

A handler either returns a response or raises; `ANSWERS` says which exception is which status.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files

from export.serve_batcher import Overloaded, Stopping
from export.serve_classify import image_of_example
from export.serve_folder import ALIAS
from export.serve_images import BadImage, TooManyPixels
from export.serve_models import VERSION
from export.serve_protocol import HEADER, BadRequest, answer, parse
from export.serve_service import Service, TooLarge, TooSlow, UnknownModel
from export.serve_text import BadClasses
from patchrank import __version__

logger = logging.getLogger(__name__)

ANSWERS: dict[type[Exception], int] = {
    BadRequest: 400,
    BadImage: 400,
    BadClasses: 400,
    UnknownModel: 404,
    TooSlow: 408,
    TooLarge: 413,
    TooManyPixels: 413,
    Overloaded: 429,
    Stopping: 503,
}


def build_app(service: Service, allowed_hosts: list[str]):
    """The ASGI application. Args: allowed_hosts, names that a Host header may carry ("*" for all)."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    pages = files("export") / "pages"
    secure = {"Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'"}

    def counted(handler: Callable[[Request], Awaitable[Response]]):
        """Exceptions become statuses, and every answer is counted."""

        async def handle(request: Request) -> Response:
            start = time.perf_counter()
            try:
                response = await handler(request)
            except tuple(ANSWERS) as error:
                code = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
                headers = {"Retry-After": "1"} if code in (429, 503) else {}
                # The rest of a body that was not read cannot be told from a next request.
                headers |= {"Connection": "close"} if code in (408, 413) else {}
                response = JSONResponse({"error": " ".join(str(error).split())}, code, headers)
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody reads it
            except Exception:
                logger.exception("%s failed", request.url.path)
                response = JSONResponse({"error": "a mistake of the server, see its log"}, 500)
            name = request.path_params.get("name", request.query_params.get("model", ALIAS))
            known = service.models[name].name if name in service.models else ""
            service.metrics.saw_answer(known, response.status_code, time.perf_counter() - start)
            return response

        return handle

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    async def server(request: Request) -> Response:
        return JSONResponse({"name": "patchrank", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def metadata(request: Request) -> Response:
        return JSONResponse(service.model(**request.path_params).metadata(request.path_params["name"]))

    async def model_ready(request: Request) -> Response:
        name = service.model(**request.path_params).name
        return JSONResponse({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    async def infer(request: Request) -> Response:
        asked, model = request.path_params["name"], service.model(**request.path_params)
        body = await service.body(request)
        header = request.headers.get(HEADER)
        loop = asyncio.get_running_loop()
        parsed = await loop.run_in_executor(service.decoding, parse, body, header, model.inputs, model.outputs)
        if parsed.batch > service.limits.max_batch:
            raise BadRequest(f"batch of {parsed.batch}: this server takes up to {service.limits.max_batch}")
        service.admission.enter(parsed.batch)
        try:
            values = await model.batcher(parsed.inputs)
        finally:
            service.admission.leave(parsed.batch)
        content, length = answer(asked, VERSION, parsed, values)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER: str(length)})

    async def classify(request: Request) -> Response:
        asked = service.classify.read(request.query_params)
        body = await service.body(request)
        service.admission.enter(1)
        try:
            return JSONResponse(await service.classify(asked, body))
        finally:
            service.admission.leave(1)

    async def metrics(request: Request) -> Response:
        service.metrics.queue.set(service.admission.rows)
        content, kind = service.metrics.page()
        return Response(content, media_type=kind)

    async def info(request: Request) -> Response:
        return JSONResponse(service.info())

    async def example(request: Request) -> Response:
        number = request.query_params.get("number", "0")
        data = await asyncio.to_thread(image_of_example, service.folder, number)
        return Response(data, media_type="image/png")

    async def page(request: Request) -> Response:
        return FileResponse(str(pages / "index.html"), headers=secure)

    @asynccontextmanager
    async def lifespan(app: Starlette):
        service.start()
        yield
        await service.stop()

    model = "/v2/models/{name}"
    routes = [
        Route("/", page),
        Route("/info", info),
        Route("/example", counted(example)),
        Route("/classify", counted(classify), methods=["POST"]),
        Route("/metrics", metrics),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(Route(path, counted(metadata)) for path in (model, model + "/versions/{version}")),
        *(Route(path + "/ready", counted(model_ready)) for path in (model, model + "/versions/{version}")),
        *(Route(path + "/infer", counted(infer), methods=["POST"]) for path in (model, model + "/versions/{version}")),
        Mount("/pages", StaticFiles(directory=str(pages))),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)
    return Starlette(routes=routes, middleware=[hosts], lifespan=lifespan)

"""The web console at `/`: three static files, read once, that talk to the API like any client."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

_PAGES = {
    "/": ("index.html", "text/html"),
    "/console.js": ("console.js", "text/javascript"),
    "/console.css": ("console.css", "text/css"),
}
_HEADERS = {
    # Nothing from elsewhere and nothing inline: what a model says can never become a script.
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self' data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_console(api: FastAPI) -> None:
    """Adds `/` and the two files that the page there asks for; none of them needs a key."""
    folder = files("serving.ingress") / "console"
    for path, (name, media_type) in _PAGES.items():
        page = _page((folder / name).read_bytes(), media_type)
        api.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def _page(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page

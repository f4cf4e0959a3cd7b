"""The console's files: how they are served, and that they ask for nothing from elsewhere."""

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serving.ingress.console import add_console

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serving" / "ingress" / "console"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/console.js": ("console.js", "text/javascript; charset=utf-8"),
    "/console.css": ("console.css", "text/css; charset=utf-8"),
}


@pytest.fixture
def client() -> TestClient:
    api = FastAPI()
    add_console(api)
    return TestClient(api)


@pytest.mark.parametrize("path", PAGES)
def test_a_file_comes_as_it_is_and_with_headers_that_confine_it(
    client: TestClient, path: str
) -> None:
    name, content_type = PAGES[path]
    response = client.get(path)
    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    assert response.headers["content-type"] == content_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    assert set(response.headers["content-security-policy"].split("; ")) == {
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    }


def test_the_pages_are_not_in_the_api_description() -> None:
    api = FastAPI()
    add_console(api)
    assert api.openapi()["paths"] == {}


@pytest.mark.parametrize("name", [name for name, _ in PAGES.values()])
def test_no_file_names_another_host(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert re.findall(r"""(?:[a-z]+:)?//[\w.-]+\.\w+|https?:|@import|["'(]//""", text) == []


def test_nothing_in_the_page_is_inline_or_made_of_markup() -> None:
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", page) == []
    script = (FOLDER / "console.js").read_text()
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script) == []
    )


def test_the_files_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["serving.ingress"] == ["console/*"]
    assert {file.name for file in FOLDER.iterdir()} == {name for name, _ in PAGES.values()}

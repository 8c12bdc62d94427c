"""Fixtures of the tests in the real ComfyUI program. Each says why it skips where a part of the program is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from longcat_core.files.media import read_video

from ..support.talking import write_avatar
from .browser import Page, find_chromium, open_page
from .client import Client
from .server import PACK, Installation, Server


def pytest_report_header() -> str:
    try:
        found = Installation.find()
    except FileNotFoundError as error:
        return f"ComfyUI: not run ({error})"
    return f"ComfyUI: {found.version} at {found.path}, artifacts in {artifact_folder(found).relative_to(PACK)}"


def artifact_folder(installation: Installation) -> Path:
    return PACK / "build" / "comfyui" / installation.version


@pytest.fixture(scope="session")
def installation() -> Installation:
    try:
        return Installation.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def artifacts(installation) -> Path:
    """Where screenshots, videos and logs of this run are kept; ignored by git."""
    folder = artifact_folder(installation)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server(installation, artifacts, tmp_path_factory) -> Iterator[Server]:
    """The server that most tests of a process share."""
    server = Server(installation, tmp_path_factory.mktemp("comfyui"))
    try:
        yield server.start()
    finally:
        server.stop()
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        shutil.copyfile(server.log_path, artifacts / f"server{worker}.log")
        server.remove()


@pytest.fixture(scope="session")
def chromium() -> None:
    """Wanted by whatever opens ComfyUI's page."""
    pytest.importorskip("playwright", reason="no playwright; make test-comfyui installs it")
    try:
        find_chromium()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def page(server, chromium) -> Iterator[Page]:
    """The page that most tests of a file share."""
    with open_page(server.url) as page:
        yield page


@pytest.fixture
def another_server(installation, tmp_path) -> Iterator:
    """Makes servers of a test's own, not yet started: another_server(flags=..., blocked=..., pack=...)."""
    made: list[Server] = []

    def make(**options) -> Server:
        made.append(Server(installation, tmp_path / f"server{len(made)}", **options))
        return made[-1]

    yield make
    for server in made:
        server.remove()


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture(scope="session")
def talking(server) -> None:
    """The tiny avatar, its audio encoder, two sounds and an image are in the shared server's folders."""
    write_avatar(server.base / "models", server.base / "input")


@pytest.fixture(scope="session")
def watch(tmp_path_factory):
    """Reads the bytes of a video file as uint8 frames [F, H, W, 3] and fps."""
    folder = tmp_path_factory.mktemp("videos")

    def read(content: bytes, name: str):
        path = folder / Path(name).name
        path.write_bytes(content)
        return read_video(path)

    return read

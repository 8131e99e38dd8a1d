"""A browser whose tabs report what went wrong in them, and where its screenshots go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import browser

HEIGHT = 900


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Skips without Playwright or a Chromium of the system."""
    try:
        running = browser()
        started = running.__enter__()
    except ImportError as error:
        pytest.skip(str(error))
    yield started
    running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIR of ``--screenshots=DIR``."""
    given = request.config.getoption("--screenshots")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Tab:
    """A browser's tab. page: Playwright's. requests: what it fetched. errors: its console's."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda said: self.errors.append(said.text) if said.type == "error" else None,
        )


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """A function from a URL to a tab that shows it.

    scheme: light or dark. width: in pixels. login: user and password that it is asked for.
    """
    opened = []

    def build(
        url: str,
        scheme: str = "light",
        width: int = 1280,
        login: dict[str, str] | None = None,
    ) -> Tab:
        size = {"width": width, "height": HEIGHT}
        page = chromium.new_page(viewport=size, color_scheme=scheme, http_credentials=login)
        tab = Tab(page)
        opened.append(tab.page)
        # Other work on the machine may take most of its CPUs.
        tab.page.set_default_timeout(120_000)
        tab.page.goto(url)
        return tab

    yield build
    for page in opened:
        page.close()

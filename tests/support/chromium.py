"""Debian's Chromium, driven by its own driver, and axe-core, which finds what keeps people out."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.environment import ROOT

BROWSER: Final = Path("/usr/bin/chromium")
DRIVER: Final = Path("/usr/bin/chromedriver")
AXE: Final = ROOT / "build" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
"""Where deploy/install-test-servers puts it. It is never part of what we ship."""

LIMIT: Final = 30.0
"""Seconds that something may take to be seen."""


class Chromium:
    """One browser, without a window. To be closed."""

    def __init__(self) -> None:
        options = Options()
        options.binary_location = str(BROWSER)
        # As root there is no sandbox, and containers have a small /dev/shm.
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self._driver.set_page_load_timeout(LIMIT)

    def go(self, url: str) -> Self:
        self._driver.get(url)
        return self

    def forget(self) -> None:
        """As a browser that was never here."""
        self._driver.execute_cdp_cmd("Network.clearBrowserCookies", {})

    def look_like(self, width: int, scheme: str = "light", *, height: int = 900) -> None:
        """`scheme`: ``light`` or ``dark``."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def allow_scripts(self, allowed: bool) -> None:
        self._driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not allowed})

    @property
    def path(self) -> str:
        return "/" + self._driver.current_url.split("/", 3)[3]

    @property
    def words(self) -> str:
        """What somebody reads; nothing while one page takes the place of another."""
        try:
            return " ".join(self._driver.find_element(By.TAG_NAME, "body").text.split())
        except (StaleElementReferenceException, NoSuchElementException):
            return ""
        except WebDriverException as error:
            # So says the driver where the page goes between two steps of its own.
            if "does not belong to the document" not in (error.msg or ""):
                raise
            return ""

    def find(self, css: str) -> WebElement:
        self.until(lambda: bool(self._driver.find_elements(By.CSS_SELECTOR, css)), css)
        return self._driver.find_element(By.CSS_SELECTOR, css)

    def ask(self, script: str, *values: object) -> Any:
        return self._driver.execute_script(script, *values)

    def sees(self, words: str) -> None:
        self.until(lambda: words in self.words, words)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Raises AssertionError where it does not come true."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"never seen: {what}\n{self.words}"
            time.sleep(0.05)

    def picture(self) -> bytes:
        """What is seen, as PNG."""
        return self._driver.get_screenshot_as_png()

    def complaints(self) -> list[str]:
        """What the browser has logged since it was asked last: what the policy forbade, scripts that failed."""
        return [entry["message"] for entry in self._driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def barriers(self) -> list[str]:
        """What axe-core finds serious or critical on this page."""
        found = self._driver.execute_cdp_cmd(
            "Runtime.evaluate",
            {
                # Not as a script of the page, which the policy would refuse.
                "expression": AXE.read_text() + ";axe.run().then(found => JSON.stringify(found.violations))",
                "awaitPromise": True,
                "returnByValue": True,
            },
        )
        return [
            f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']][:3]}"
            for each in json.loads(found["result"]["value"])
            if each["impact"] in ("serious", "critical")
        ]

    def close(self) -> None:
        self._driver.quit()

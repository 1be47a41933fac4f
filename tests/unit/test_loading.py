"""A worker's handler is found in its own folders, and what stands in its way is named."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import SettingsError
from bridge.settings import load
from workers.loading import load_handler
from workers.testing import make_event, run

SETTINGS = """
name = "shop"
[sinks.events]
type = "memory"
[workers.stock]
handler = "stock:handle"
"""

STOCK = """
from workers import handler

@handler("shop.order.placed")
async def handle(event):
    import helper  # found when the handler runs, too
    return {"by": helper.NAME}
"""


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """Whatever a test imports is forgotten after it."""
    path, modules = [*sys.path], {*sys.modules}
    yield
    load_handler("workers.invoices:render", "none")  # which leaves the folders of the worker before
    assert sys.path == path
    for name in {*sys.modules} - modules:
        if name in ("stock", "helper", "h"):
            del sys.modules[name]


def write(folder: Path, **modules: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def settings_in(folder: Path, line: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bridge.toml").write_text(SETTINGS + line)
    return folder / "bridge.toml"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ('path = "."', ["."]),
        ('path = ["src", "../lib"]', ["src", "../lib"]),
        ('path = "/opt/handlers"', ["/opt/handlers"]),
    ],
)
def test_folders_are_relative_to_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: list[str]
) -> None:
    config = settings_in(tmp_path / "project", line)
    expected = [(config.parent / path).resolve() for path in found]
    assert load(config, {}).workers["stock"].path == expected
    monkeypatch.chdir(config.parent)
    assert load(None, {}).workers["stock"].path == expected
    monkeypatch.chdir("/")
    assert load(Path(os.path.relpath(config)), {}).workers["stock"].path == expected


def test_folders_may_come_from_the_environment(tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    for text, names in (("src", ["src"]), ('["a", "b"]', ["a", "b"])):
        settings = load(config, {"PGBRIDGE_WORKERS__STOCK__PATH": text})
        assert settings.workers["stock"].path == [tmp_path / name for name in names]


@pytest.mark.parametrize("value", ["3", "[3]", '""', '[""]', "{ a = 1 }", "true"])
def test_what_is_no_path_is_refused_with_its_key(tmp_path: Path, value: str) -> None:
    config = settings_in(tmp_path, f"path = {value}")
    with pytest.raises(SettingsError, match=r"  workers\.stock\.path: is not a path or a list of paths"):
        load(config, {})


def test_a_folder_that_is_none_matters_only_where_its_handler_is_imported(tmp_path: Path) -> None:
    # The bridge reads the same file, often on another machine.
    settings = load(settings_in(tmp_path, 'path = "absent"'), {})
    (tmp_path / "file").touch()
    for path in (settings.workers["stock"].path[0], tmp_path / "file"):
        with pytest.raises(SettingsError, match=f"^{re.escape(f'workers.stock.path: {path} is no folder')}"):
            load_handler("stock:handle", "stock", [path])


def test_a_handler_and_what_it_imports_later_are_found_in_its_folders(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", stock=STOCK), write(tmp_path / "b", helper="NAME = 'b'")]
    found = load_handler("stock:handle", "stock", folders)
    assert sys.path[:2] == [str(folder) for folder in folders]
    assert run(found, make_event("shop.order.placed", None)) == {"by": "b"}


def test_two_workers_may_have_modules_of_one_name(tmp_path: Path) -> None:
    text = "from helper import NAME\nfrom workers import handler\nhandle = handler(NAME)(lambda event: None)\n"
    folders = [write(tmp_path / name, h=text, helper=f"NAME = 'topic.of.{name}'") for name in ("a", "b")]
    for folder in [*folders, *folders]:
        assert load_handler("h:handle", "w", [folder]).topics == (f"topic.of.{folder.name}",)


def test_a_workers_own_module_is_taken_though_another_workers_is_installed_under_its_name(tmp_path: Path) -> None:
    text = "from workers import handler\nhandle = handler(__file__)(lambda event: None)\n"
    installed, own = (write(tmp_path / name, h=text) for name in ("installed", "own"))
    sys.path.append(str(installed))
    try:
        for path, folder in (([], installed), ([own], own), ([], installed)):
            assert load_handler("h:handle", "w", path).topics == (str(folder / "h.py"),)
    finally:
        sys.path.remove(str(installed))


def test_what_is_installed_below_a_workers_folder_stays_loaded(tmp_path: Path) -> None:
    site = write(tmp_path / "venv", helper="NAME = 'installed'")
    sys.path.append(str(site))
    try:
        import helper  # type: ignore[import-not-found]

        load_handler(
            "h:handle",
            "w",
            [write(tmp_path, h="from workers import handler\nhandle = handler()(lambda event: None)\n")],
        )
        load_handler("workers.invoices:render", "none")
        assert "h" not in sys.modules
        assert sys.modules["helper"] is helper
    finally:
        sys.path.remove(str(site))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package", r"cannot import h: No module named 'no_such_package' \({file}, line 1\)\. Install"),
        ("\ndef (", r"cannot import h: invalid syntax \({file}, line 2\)"),
        ("x = 1\n1 / 0", r"cannot import h: ZeroDivisionError: division by zero \({file}, line 2\)"),
        (
            "from workers import handler\n\n\n@handler('a')\ndef handle(): ...",
            r"cannot import h: TypeError: @handler: handle must take the event, and nothing else \({file}, line 4\)",
        ),
        ("from workers import handlers", r"cannot import name 'handlers' from 'workers' .* \({file}, line 1\)$"),
        ("handle = print", "h has no @handler named handle"),
    ],
)
def test_a_module_that_cannot_be_imported_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    folder = write(tmp_path, h=text)
    with pytest.raises(SettingsError) as refused:
        load_handler("h:handle", "stock", [folder])
    assert str(refused.value).startswith("workers.stock.handler: ")
    assert re.search(said.format(file=re.escape(str(folder / "h.py"))), str(refused.value))


def test_a_module_of_the_current_folder_is_said_to_need_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, h=""))
    with pytest.raises(SettingsError, match=re.escape(f'set workers.stock.path = "{tmp_path}"')):
        load_handler("h:handle", "stock")
    with pytest.raises(SettingsError, match=r"Name its folder in workers\.stock\.path, or install"):
        load_handler("no_such_package.x:handle", "stock")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("workers.invoices", "not of the form package.module:function"),
        ("no_such_package.x:y", "cannot import no_such_package.x"),
        ("workers.invoices:nothing", "workers.invoices has no @handler named nothing"),
        ("workers.invoices:template_data", "workers.invoices has no @handler named template_data"),
    ],
)
def test_a_wrong_handler_name_says_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"workers.w.handler: .*{said}"):
        load_handler(name, "w")

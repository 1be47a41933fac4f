"""A virtual environment as `pip install pgbridge pytest` leaves it, made in a tenth of a second and without a network.

It sees this working tree and what the environment of this interpreter has installed, and has the scripts that pip would
make of `pyproject.toml`.
"""

import os
import site
import stat
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

_SCRIPT: Final = """\
#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def make_environment(folder: Path) -> Path:
    """Makes it, and returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install(folder)
    return folder / "bin"


def install(folder: Path) -> None:
    """What `pip install pgbridge pytest` does in a virtual environment that is there."""
    programs = folder / "bin"
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "working-tree.pth").write_text("\n".join([str(ROOT), *site.getsitepackages()]) + "\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    scripts = project["scripts"]
    # Entry points are those of this working tree, and not what was installed when its environment was made.
    about = packages / "pgbridge-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pgbridge\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    [pytest] = entry_points(group="console_scripts", name="pytest")
    for name, place in {**scripts, "pytest": pytest.value}.items():
        module, _, function = place.partition(":")
        script = programs / name
        script.write_text(_SCRIPT.format(python=programs / "python", module=module, function=function))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)


def environment(programs: Path) -> Mapping[str, str]:
    """The variables of a shell in which it is active, and none that would lead elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGBRIDGE_", "PYTHON", "PYTEST"))}
    return {
        **kept,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        # Plugins of this project's own tests, which an author need not have.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


if __name__ == "__main__":
    install(Path(sys.argv[1]))

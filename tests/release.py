"""All tests in another release of Debian, on its PostgreSQL, RabbitMQ and Python: `python -m tests.release trixie`.

As root, with debootstrap and systemd-nspawn. Further words go to pytest. The release's folder, and the virtual
environment in it, are kept for the next time (tests/support/debian.py says where); the sources are copied anew, as git
knows them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.packages.building import copy_sources
from tests.support.debian import KEPT, kept, pip_settings

# deploy/install-test-servers installs the rest, from within.
_PACKAGES: Final = ("make", "git", "python3-venv", "default-jre-headless")
_PROJECT: Final = Path("/home/pgbridge")


def main(release: str, words: list[str]) -> None:
    """Becomes systemd-nspawn, so that the exit code is that of the tests, and Ctrl-C ends all of it."""
    print(f"All tests on Debian's {release}, in {KEPT}", flush=True)
    folder = kept(release, "suite", _PACKAGES)
    project = folder.path / _PROJECT.relative_to("/")
    project.mkdir(exist_ok=True)
    for path in [*project.iterdir(), *(folder.path / "tmp").iterdir()]:
        if path.name != ".venv":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    copy_sources(project)
    # Some tests ask git for the files of this tree.
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    subprocess.run(["git", "add", "--all"], cwd=project, check=True)

    environ = pip_settings() | {name: os.environ[name] for name in ("CI", "HYPOTHESIS_PROFILE") if name in os.environ}
    options = []
    if gcloud := shutil.which("gcloud"):
        installation = Path(gcloud).resolve().parents[1]
        options = [f"--bind-ro={installation}"]
        environ["PATH"] = f"/usr/sbin:/usr/bin:/sbin:/bin:{installation}/bin"
    make = ["make", f"--directory={_PROJECT}", "test", "PYTHON=python3", f"JOBS={os.environ.get('JOBS', 2)}"]
    [program, *rest] = folder.enter(*make, f"PYTEST={' '.join(words)}", environ=environ)
    # The disk and not memory for /tmp, where the servers' data are.
    settings = {**os.environ, "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
    os.execvpe(program, [program, *options, *rest], settings)  # noqa: S606 - our own words


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

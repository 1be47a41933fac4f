"""Google's Pub/Sub emulator, from an installed gcloud."""

import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Final

from bridge.demo.servers.process import MissingProgramError, Process, Server
from bridge.errors import UnavailableError

INSTALL: Final = (
    "install a Java runtime and 'gcloud components install pubsub-emulator' (Debian: apt-get install "
    "default-jre-headless google-cloud-cli-pubsub-emulator), or set PUBSUB_EMULATOR_HOST to one that runs"
)


class PubSubEmulator(Server):
    """The emulator keeps everything in memory: a restart is a new, empty one on the same port.

    Where PUBSUB_EMULATOR_HOST names a running emulator, that one is used, and it is not stopped.
    """

    name = "pubsub"
    start_limit = 90.0

    def __init__(self, folder: Path) -> None:
        """Raises MissingProgramError when there is neither an emulator nor a Java to run it."""
        external = os.environ.get("PUBSUB_EMULATOR_HOST")
        self._external = bool(external)
        if external:
            host, _, number = external.rpartition(":")
            if not host or not number.isdigit():
                raise UnavailableError(f"PUBSUB_EMULATOR_HOST is {external!r}, which is not host:port")
            super().__init__(folder)
            self.host, self.port = host, int(number)
        else:
            super().__init__(folder)
            self._java, self._jar = _java(), _jar()

    @property
    def address(self) -> str:
        """``host:port``, as PUBSUB_EMULATOR_HOST has it."""
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        if not self._external:
            super().start()
        elif (refusal := self._answers()) is not None:
            raise UnavailableError(f"PUBSUB_EMULATOR_HOST is {self.address}, where no emulator answers: {refusal}")

    def _launch(self) -> Process:
        return Process([self._java, "-jar", self._jar, f"--host={self.host}", f"--port={self.port}"], log=self.log)

    def _answers(self) -> str | None:
        # The port speaks gRPC and HTTP alike; this lists the topics of a project, which needs no such project.
        try:
            with urllib.request.urlopen(f"http://{self.address}/v1/projects/ready/topics", timeout=5) as response:
                response.read()
        except OSError as error:
            return str(error)
        return None


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise MissingProgramError(f"the Pub/Sub emulator needs Java: {INSTALL}")
    return java


def _jar() -> Path:
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        raise MissingProgramError(f"the Pub/Sub emulator needs gcloud: {INSTALL}")
    command = [gcloud, "info", "--format=value(installation.sdk_root)"]
    root = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout
    jars = sorted(Path(root.strip(), "platform", "pubsub-emulator", "lib").glob("*.jar"))
    if not jars:
        raise MissingProgramError(f"gcloud has no Pub/Sub emulator: {INSTALL}")
    return jars[-1]

"""pg_dump and psql, as an administrator uses them."""

import subprocess

import pytest

from tests.support.servers import MissingProgramError, PostgresServer


def copy(server: PostgresServer, dsn: str, target: str) -> None:
    """Dumps a database of `server`, and loads it into the empty database `target`. Skips the test where its version's
    programs are not there: another version's dump is for that version."""
    try:
        dump, load = server.program("pg_dump"), server.program("psql")
    except MissingProgramError as error:
        pytest.skip(str(error))
    dumped = subprocess.run([dump, dsn], capture_output=True, check=True)
    command = [str(load), "-X", "-q", "-v", "ON_ERROR_STOP=1", target]
    loaded = subprocess.run(command, input=dumped.stdout, capture_output=True, check=False)
    assert loaded.returncode == 0, loaded.stderr.decode()

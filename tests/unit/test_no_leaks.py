"""Passwords of every kind, written where they may stand, rightly and wrongly: no error and no object shows them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import psycopg
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from bridge.errors import PgbridgeError
from bridge.postgres.connection import connecting, connection_parameters
from bridge.settings import PostgresSettings, load

SECRET = "s3cret"

_PARTS = st.lists(st.sampled_from([*"@:/?#[]%\\'\"=&, ;$", "12", "%4", "%40", "\t"]), max_size=4).map("".join)
passwords = st.builds(lambda before, behind: f"{before}{SECRET}{behind}", _PARTS, _PARTS)

_DSNS = (
    "postgresql://u:{}@127.0.0.1:9/d",
    "postgres://u:{}@127.0.0.1:9,127.0.0.1:9/d?connect_timeout=2",
    "postgresql://127.0.0.1:9/d?user=u&password={}",
    "host=127.0.0.1 port=9 user=u password={}",
    "host=127.0.0.1 port=9 user=u password='{}' dbname=d",
)

_URLS = {
    "rabbitmq": ("amqp://u:{}@127.0.0.1:9/v", "amqps://u:{}@127.0.0.1:9,127.0.0.2:9/v", "amqp://{}@127.0.0.1/"),
    "nats": ("nats://u:{}@127.0.0.1:9", "nats://127.0.0.1:9,nats://u:{}@127.0.0.2:9", "nats://{}@127.0.0.1:9"),
}


@given(passwords, st.sampled_from(_DSNS), st.booleans())
@example("p@s3cret", _DSNS[0], False)
@example("p/s3cret", _DSNS[0], False)
@example("12/s3cret", _DSNS[0], False)
@example("12?s3cret", _DSNS[0], False)
@example("a s3cret", _DSNS[3], False)
@example("a's3cret", _DSNS[4], False)
@example("a\\' port=s3cret", _DSNS[4], False)
def test_a_password_in_a_dsn_is_in_no_error(password: str, form: str, quoted: bool) -> None:
    dsn = form.format(quote(password, safe="") if quoted else password)
    settings = PostgresSettings(dsn=SecretStr(dsn))
    told = [repr(settings), str(settings), repr(settings.model_dump())]
    try:
        parameters = connection_parameters(settings, "test")
        given = {name: value for name, value in parameters.items() if name != "password"}
        if SECRET not in str(given):
            # Nobody listens at this port, so it fails at once, with libpq's words.
            with connecting(parameters, "postgres.dsn"):
                psycopg.connect(**parameters).close()
        else:
            told.append(str(given))
    except PgbridgeError as error:
        told.append(str(error))
    assert SECRET not in "\n".join(told)


@given(passwords, st.sampled_from([(kind, form) for kind, forms in _URLS.items() for form in forms]), st.booleans())
@example("p@s3cret", ("rabbitmq", "amqp://u:{}@127.0.0.1:9/v"), False)
@example("12/s3cret", ("rabbitmq", "amqp://u:{}@127.0.0.1:9/v"), False)
@example("12,s3cret", ("nats", "nats://u:{}@127.0.0.1:9"), False)
def test_a_password_in_a_brokers_url_is_in_no_error(password: str, where: tuple[str, str], quoted: bool) -> None:
    kind, form = where
    url = form.format(quote(password, safe="") if quoted else password)
    told = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bridge.toml"
        path.write_text(f'name = "shop"\n[sinks.e]\ntype = "{kind}"\n')
        try:
            settings = load(path, environ={"PGBRIDGE_SINKS__E__URL": url})
        except PgbridgeError as error:
            told.append(str(error))
        else:
            sink = settings.sinks["e"]
            places = [repr(sink.plain_text), str(getattr(sink, "servers", "")), str(getattr(sink, "addresses", ""))]
            told += [repr(settings), str(settings), repr(settings.model_dump()), *places]
    assert SECRET not in "\n".join(told)

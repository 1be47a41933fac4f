"""What a failure of an author's code is called in one line: in the log, in the dead letter, and in its span."""

import psycopg
from pydantic import ValidationError


def reason_of(error: BaseException) -> str:
    """Its type and its words. Two kinds of errors that handlers often meet quote values, which come from payloads and
    tables: of those only what is wrong is told, and where."""
    return f"{type(error).__name__}: {_words(error)}"


def _words(error: BaseException) -> str:
    match error:
        case ValidationError():
            details = error.errors(include_input=False, include_url=False, include_context=False)
            mistakes = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
            return f"{error.title}: {'; '.join(mistakes)}"
        case psycopg.Error() if error.diag.message_primary:
            # Its DETAIL quotes rows.
            return error.diag.message_primary
    return str(error)

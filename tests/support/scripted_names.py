"""DNS that a test writes: what a name resolves to, the first time, the second, and so on."""

import socket
from collections.abc import Mapping, Sequence


class ScriptedNames:
    """A resolver for `WebhookClient(resolve=...)`. A name's last answer stays."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._answers = {name: list(each) for name, each in answers.items()}
        self.asked: list[str] = []
        """The names, in order."""

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises gaierror for a name that is not in the script."""
        self.asked.append(host)
        if host not in self._answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self._answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

"""A writer that writes nothing: for all processes of a run but the first."""

from collections.abc import Mapping


class Silent:
    """Takes what ``training.writer.Writer`` takes."""

    def begin(self) -> None: ...

    def tick(self) -> None: ...

    def report(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...

"""Files of the Hugging Face hub, and in one line why there are none."""

from collections.abc import Sequence
from pathlib import Path

from scaling_perception.support.errors import UserError

_OFFLINE = ("connecterror", "connectionerror", "name or service not known", "temporary failure in name resolution")
_SLOW = ("timeout", "timed out")


def hub_reason(error: BaseException) -> str:
    """Why the hub gave nothing, for a person: no names of exceptions, no numbers of the system."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    seen, text = error, ""
    while seen is not None:
        if isinstance(seen, GatedRepoError):
            return "its owner must grant access first: ask on its page, then `hf auth login`"
        if isinstance(seen, (RepositoryNotFoundError, RevisionNotFoundError)):
            return "the hub has no such model, or it is private"
        text += f" {type(seen).__name__} {seen}".lower()
        seen = seen.__cause__ or seen.__context__
    if any(sign in text for sign in _SLOW):
        return f"{constants.ENDPOINT} does not answer in time"
    if constants.HF_HUB_OFFLINE or "offlinemode" in text:
        return "HF_HUB_OFFLINE is set, and it was not downloaded before"
    if any(sign in text for sign in _OFFLINE):
        return f"{constants.ENDPOINT} cannot be reached"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def fetch(hub_id: str, patterns: Sequence[str], what: str) -> Path:
    """The snapshot of a hub repository: brought up to date where the hub answers, else as the local cache holds it.

    Args:
        patterns: of the files to fetch.
        what: for the message, such as ``model``.

    Raises:
        UserError: there is no such repository, or the hub does not answer and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    first: BaseException | None = None
    for offline in (False, True):
        try:
            return Path(snapshot_download(hub_id, allow_patterns=list(patterns), local_files_only=offline))
        except Exception as error:  # the client raises errors of the libraries that it is built on, too
            first = first or error
    assert first is not None
    raise UserError(
        f"{what} '{hub_id}' is no folder here and could not be fetched from the hub ({hub_reason(first)}): "
        "check the name and the network, or give a folder"
    ) from None

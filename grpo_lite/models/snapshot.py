"""fetch_snapshot: the folder of a Hub repository's files, from the network or the cache, or one clear message."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from grpo_lite.errors import ModelError
from grpo_lite.files.hub import only_cache_if_unreachable


def fetch_snapshot(
    key: str,
    repo_id: str,
    revision: str | None,
    patterns: list[str],
    instead: str,
    unreachable: Callable[[BaseException], str],
) -> Path:
    """Return the local folder of a repository's files, fetching those that are not cached.

    Args:
        key: the recipe's key that names the repository, for messages.
        repo_id: owner and name.
        revision: branch, tag or commit; None: the newest.
        patterns: of the files to fetch.
        instead: what else the key may name, for messages.
        unreachable: returns the message for files that are neither cached nor reachable.

    Raises:
        ModelError: not found, gated, or offline and not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with only_cache_if_unreachable():
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except GatedRepoError:
        raise ModelError(
            f"{key}: {repo_id} is gated: its owner asks you to accept a licence. Open its page on the Hub, accept, "
            "then log in with `hf auth login` (or set HF_TOKEN) and run again."
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{key}: {repo_id} was not found on the Hub (or is private and you are not logged in). Check the "
            f"spelling, run `hf auth login` for a private one, {instead}."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{key.partition('.')[0]}.revision: {revision!r} does not exist in {repo_id}. Remove it or correct it."
        ) from None
    except HFValidationError as error:
        raise ModelError(f"{key}: {repo_id!r} is not a Hub id (owner/name) nor a local folder: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        # huggingface_hub 1.33 lists a commit's files anew even if they are all here, unless it did so itself before.
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
        raise ModelError(unreachable(error)) from None

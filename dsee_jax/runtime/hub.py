"""Upload of a folder to the Hugging Face Hub, with the token of the environment or of ``hf auth login``."""

import argparse
import shlex
from pathlib import Path

from dsee_jax.errors import InputError, Stopped


def arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the flag ``--push``; ``out`` is the name of the folder in the help."""
    parser.add_argument(
        "--push",
        metavar="REPO",
        help=f"also upload {out} to this model repository of the Hugging Face Hub, NAME or OWNER/NAME, which is created if it "
        "does not exist; with the token of HF_TOKEN or of `hf auth login`",
    )


def check(repo: str) -> None:
    """Raise `InputError` if ``repo`` is no id of a repository; reads nothing."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: {_line(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Upload a folder, as one commit, to the model repository ``repo``, and return its address.

    Raises:
      InputError: the hub refuses: no token, no right to write, or another reason that it gives.
      Stopped: the hub cannot be reached, or fails itself.
    """
    from huggingface_hub import HfApi

    # The HTTP client of huggingface_hub, and so the module of its base error, changes with its versions.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalTokenNotFoundError,
    )

    again = f"{folder} is complete; to push again: hf upload {repo} {shlex.quote(str(folder))}"
    try:
        hub = HfApi()
        address = hub.create_repo(repo, exist_ok=True)
        hub.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        token = "; set HF_TOKEN to a token that may write, or run `hf auth login`" if status in (401, 403) else ""
        kind = Stopped if status == 429 or status >= 500 else InputError
        raise kind(f"--push {repo}: {status} {error.server_message or _line(error)}{token}; {again}") from None
    except LocalTokenNotFoundError as error:
        raise InputError(f"--push {repo}: {_line(error)}; {again}") from None
    except (OSError, HTTPError) as error:
        raise Stopped(f"--push {repo}: the hub cannot be reached ({_line(error)}); {again}") from None
    return str(address)


def _line(error: Exception) -> str:
    """Return the message of an error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300].rstrip(".")

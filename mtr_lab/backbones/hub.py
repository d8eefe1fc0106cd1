"""Find a file of weights on this machine, or download it from the Hugging Face Hub or another site."""

import os
import re
from importlib import resources
from pathlib import Path

from mtr_lab.errors import UserError

ASSETS = Path(str(resources.files("mtr_lab") / "assets"))

TIMEOUT = 4.0  # seconds to wait for the Hub, unless HF_HUB_ETAG_TIMEOUT is set

ELSEWHERE = (
    "Without a network, download that file elsewhere and pass its path: backbone.checkpoint=PATH on the command line, "
    "create_model(..., checkpoint=PATH) in Python."
)


def fetch(checkpoint: str, revision: str) -> tuple[Path, str | None]:
    """The local file of a path, of an ``hf://`` address or of an ``https://`` one, and its commit on the hub.

    Without a network, files are taken from the caches of the hub and of PyTorch.

    Raises:
        UserError: an absent file, a malformed address, or a file that is neither in the cache nor downloadable.
    """
    if checkpoint.startswith("https://"):
        return download_from(checkpoint), None
    if not checkpoint.startswith("hf://"):
        path = Path(os.path.expanduser(checkpoint))  # leaves the name of a user who does not exist
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            raise UserError(f"cannot read checkpoint {checkpoint}: {error.strerror}.") from error
        if is_folder:
            raise UserError(
                f"checkpoint {checkpoint} is a folder: give the file in it, such as model.safetensors, or "
                "model.safetensors.index.json of several."
            )
        if not is_file:
            raise UserError(f"checkpoint {checkpoint} does not exist: give a local file or hf://OWNER/REPOSITORY/FILE.")
        return path, None
    owner, repository, file = [*checkpoint.removeprefix("hf://").split("/", 2), "", "", ""][:3]
    if not file:
        raise UserError(f"checkpoint {checkpoint!r} is not of the form hf://OWNER/REPOSITORY/FILE.")
    path = download(f"{owner}/{repository}", file, revision)
    parts = path.parts  # the hub's cache is …/snapshots/COMMIT/FILE
    return path, parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def expected_sha256(file: Path) -> str | None:
    """The SHA-256 (hex) that a file must have: of the bundled ones, and of large ones in the hub's cache.

    The hub tells it with the file, and its cache names the file's content by it.
    """
    if file.parent == ASSETS:
        lines = (ASSETS / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        return {name: digest for digest, name in map(str.split, lines)}.get(file.name)
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def is_address(checkpoint: str) -> bool:
    """Whether a checkpoint is an address rather than a local file."""
    return checkpoint.startswith(("hf://", "https://"))


def download_from(url: str) -> Path:
    """The file of an address in PyTorch's cache, downloaded if it is missing.

    Raises:
        UserError: the file is not in the cache and cannot be downloaded.
    """
    import torch

    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except OSError as error:
        raise UserError(
            f"cannot download {file.name} from {url.rpartition('/')[0]}: {first_line(error)}\n{ELSEWHERE}"
        ) from error
    return file


def download(repository: str, file: str, revision: str) -> Path:
    """The file in the hub's cache, downloaded if it is missing or outdated.

    Raises:
        UserError: the file is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # hf_hub_download retries an unreachable hub for up to half a minute.
        unreachable = _why_unreachable(repository, file, revision)
        if unreachable is None:
            return Path(hf_hub_download(repository, file, revision=revision))
        cached = try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        raise FileNotFoundError(f"the Hub cannot be reached ({unreachable}), and the file is not in the local cache.")
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: not a repository's name
        raise UserError(
            f"cannot download {file} from {repository} (revision {revision}) on the Hugging Face Hub: "
            f"{first_line(error)}\n{ELSEWHERE}"
        ) from error


def _why_unreachable(repository: str, file: str, revision: str) -> str | None:
    """The error by which the Hub is unreachable; ``None`` if it answers, even with a refusal."""
    from huggingface_hub import get_session, hf_hub_url

    timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", TIMEOUT))
    url = hf_hub_url(repository, file, revision=revision)
    try:
        response = get_session().head(url, timeout=timeout)
    except Exception as error:  # from requests or httpx, depending on the version of huggingface_hub
        return first_line(error)
    return f"status {response.status_code}" if response.status_code >= 500 else None


def first_line(error: Exception) -> str:
    """The first line of the message of an error, or the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__

"""Whether this machine is logged in to Weights & Biases."""

import configparser
import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # of the public service, as named in netrc


def wandb_mode() -> Literal["online", "offline"]:
    """ "online" if Weights & Biases can upload: ``WANDB_MODE`` or the mode in its settings decides, else the login.

    A login is a key in the environment, in W&B's settings files, or in netrc under the name of its server.
    """
    settings = _settings()
    mode = os.environ.get("WANDB_MODE") or settings.get("mode")
    if mode:
        return "online" if mode in ("online", "run", "shared") else "offline"
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url")
    hosts = [urlsplit(server).netloc] if server else _HOSTS
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return "online" if has_key or settings.get("api_key") or _netrc_knows(hosts) else "offline"


def _settings() -> dict[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read([folder / "settings", Path("wandb") / "settings"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_knows(hosts: Iterable[str]) -> bool:
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    try:
        file = next(path for path in (Path(name).expanduser() for name in candidates) if path.is_file())
        known = netrc.netrc(file)
    except (StopIteration, netrc.NetrcParseError, OSError):
        return False
    return any(host in known.hosts for host in hosts)

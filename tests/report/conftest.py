import threading
from collections.abc import Iterator

import pytest
import wandb
from wandb_server import WandbServer


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A local W&B server; W&B is logged in to it."""
    wandb.teardown()  # or W&B keeps the environment it has read before
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server
        wandb.teardown()
        server.shutdown()

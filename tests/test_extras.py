"""What a configuration needs besides the core is asked for before any work."""

import sys

import pytest
from omegaconf import OmegaConf

from mtr_lab.cli.extras import check_extras
from mtr_lab.errors import UserError

CONFIGS = {
    "tensorboard": {"logger": {"tensorboard": {}}},
    "datasets": {"dataset": {"source": "hfds/NAME"}},
    "webdataset": {"dataset": {"source": "wds/NAME"}},
}


@pytest.mark.parametrize("package", CONFIGS)
def test_a_missing_package_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create(CONFIGS[package])
    check_extras(config)
    for hidden in (package, "tensorboardX"):
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(UserError, match=r"needs the package \w+: pip install 'mtr-lab\[(tensorboard|data)\]'"):
        check_extras(config)
    check_extras(OmegaConf.create({"logger": {}, "dataset": {"source": "folder"}}))
    check_extras(OmegaConf.create({}))

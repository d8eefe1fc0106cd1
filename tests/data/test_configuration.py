"""Every file of conf/dataset has its name and only settings of its data module."""

import inspect

import hydra
import pytest
from hydra.utils import get_class

from mtr_lab.configuration import CONF
from mtr_lab.data.splits import SplitDataModule


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "dataset").glob("*.yaml")))
def test_settings_are_those_of_the_data_module(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        settings = dict(hydra.compose("config", [f"dataset={name}"]).dataset)
    assert settings["name"] == name
    data_module = get_class(settings.pop("_target_"))
    known = {name for kind in (data_module, SplitDataModule) for name in inspect.signature(kind).parameters}
    assert settings.keys() - {"_convert_"} <= known - {"split"}

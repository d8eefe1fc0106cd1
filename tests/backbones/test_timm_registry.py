"""The models are in timm's registry for either order of import, and importing the library does not import timm."""

import subprocess
import sys

import pytest
import timm
from small_models import geometry

import mtr_lab
from mtr_lab.backbones import MODELS

REGISTERED = """
assert timm.list_models("vim_[bs]*") == ["vim_b", "vim_s", "vim_s_plus"]
assert timm.list_models("vim_ti*") == ["vim_ti", "vim_ti_64", "vim_ti_64_half", "vim_ti_plus"]
assert timm.list_models("videomamba_[bnst]*") == ["videomamba_" + size for size in ("b", "nano", "s", "ti")]
assert timm.list_pretrained("vim_n*") == ["vim_nano.imagenette"]
assert timm.is_model("videomamba_ti")
assert timm.models.get_pretrained_cfg("vim_s").hf_hub_id == "hustvl/Vim-small-midclstok"
model = timm.create_model("vim_nano", depth=1, embed_dim=16)
assert type(model) is type(mtr_lab.create_model("vim_nano", depth=1, embed_dim=16))
assert not any(type(finder).__module__.startswith("mtr_lab") for finder in sys.meta_path)
assert type(timm.models.__spec__.loader).__module__ == type(timm.models.__loader__).__module__ != "mtr_lab"
importlib.reload(timm.models)
importlib.reload(mtr_lab)
assert timm.is_model("vim_nano")
pickle.loads(pickle.dumps(model))
"""


def child(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", "import importlib, pickle, sys\n" + program]
    return subprocess.run(command, capture_output=True, text=True)


RARE_IMPORTS = (
    "from mtr_lab import create_model; import mtr_lab, timm.models",
    "import mtr_lab; [sys.modules.pop(m) for m in [*sys.modules] if m.startswith('mtr_lab')]; import mtr_lab, timm",
    "import mtr_lab, importlib.util; importlib.util.find_spec('timm'); from timm.models import vgg; import timm",
)


@pytest.mark.parametrize(
    "imports", ["import timm, mtr_lab", *(pytest.param(imports, marks=pytest.mark.slow) for imports in RARE_IMPORTS)]
)
def test_registered_in_either_order(imports: str) -> None:
    done = child(f"{imports}\n{REGISTERED}")
    assert done.returncode == 0, done.stderr


def test_a_timm_that_fails_to_import_may_be_imported_again(tmp_path) -> None:
    """The first import of a fake timm fails, the second succeeds."""
    program = f"""
import mtr_lab
sys.path.insert(0, {str(tmp_path)!r})
for models in ("raise OSError", "def generate_default_cfgs(cfgs): return names.append(list(cfgs))\\nnames = []\\n"
               "def is_model(name): return False\\ndef register_model(f): return f\\nmodel_entrypoint = None"):
    open({str(tmp_path / "timm" / "models.py")!r}, "w").write(models)
    importlib.invalidate_caches()
    try:
        import timm.models
    except OSError:
        assert "timm.models" not in sys.modules
assert "vim_nano.imagenette" in timm.models.names[0]
"""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "data.py").write_text(
        "class ImageNetInfo:\n    def __init__(self, _): pass\n    def label_names(self): return ['a']"
    )
    (tmp_path / "timm" / "__init__.py").touch()
    done = child(program)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_and_creating_a_model_imports_neither_timm_nor_torchvision() -> None:
    done = child(
        "from mtr_lab import create_model, patch\n"
        "patch(create_model('vim_nano', pretrained=True), ratio=0.3)\n"
        "print(*{'timm', 'torchvision', 'lightning', 'huggingface_hub'} & sys.modules.keys())"
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_configuration_of_timms_registry(name: str) -> None:
    registered = {"label_names": None, **timm.models.get_pretrained_cfg(name).to_dict()}  # timm leaves out nulls
    assert registered == timm.create_model(name, **geometry(name, depth=1, width=16)).pretrained_cfg
    assert registered == mtr_lab.create_model(name, **geometry(name, depth=1, width=16)).pretrained_cfg

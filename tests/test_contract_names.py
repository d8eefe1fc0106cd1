"""Names that scripts may rely on: of programs, groups, settings, functions and fields. None may be renamed."""

import importlib
import inspect
import pkgutil
import typing

import pytest
from omegaconf import DictConfig, OmegaConf

import mtr_lab
from mtr_lab.cli.commands import COMMANDS
from mtr_lab.cli.program import compose
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError
from mtr_lab.results.metrics import all_metrics
from mtr_lab.results.schema import Point, Result

GROUPS = {
    "backbone": "vim_nano vim_ti vim_s vim_b vim_ti_plus vim_s_plus videomamba_ti videomamba_s videomamba_m "
    "videomamba_b vim_nano_half vim_ti_64 vim_ti_64_half videomamba_64 videomamba_nano "
    "videomamba_words",
    "dataset": "tiny_imagenet imagenette_sample imagenet imagenette imagefolder bccd_sample bccd voc coco "
    "camvid_sample camvid ade20k voc_segmentation videos motion motion_sample",
    "task": "classification detection segmentation video",
    "reduction": "mtr write resolution evit tome rmeeto pumer utr hsa famba random adjacent storm storm_evit "
    "storm_random directions quartermap frames",
    "trainer": "default ddp",
    "logger": "none csv tensorboard wandb",
    "bench": "default h100 h100_1024 h100_latency",
    "experiment": "none anchors paper_table1 paper_scores paper_merging paper_order nano_policies nano_pictures "
    "nano_fovea policy_ablation schedule_search dense_policies vim_nano vim_nano_bccd camvid_nano storm_sides "
    "random_seeds tiny_imagenet tiny_policies tiny_pictures videomamba_nano grid_words",
    "hydra/launcher": "processes slurm",
}
KEYS = {
    "config": "backbone.name backbone.pretrained backbone.checkpoint backbone.revision backbone.img_size "
    "backbone.patch_size backbone.stride backbone.num_frames backbone.depth backbone.embed_dim backbone.d_state "
    "backbone.num_classes dataset.root dataset.source dataset.classes dataset.train_split dataset.test_split "
    "dataset.batch_size dataset.num_workers dataset.on_error dataset.cache task.name mtr.ratio mtr.policy mtr.score "
    "mtr.directions mtr.grouping mtr.target_fraction mtr.matching mtr.features mtr.merge mtr.prune_first "
    "mtr.prune_share mtr.order mtr.align mtr.stretch mtr.convolution mtr.resolution mtr.input mtr.input_share "
    "mtr.input_cell mtr.input_token mtr.input_place "
    "mtr.paths mtr.seed mtr.schedule mtr.first_block mtr.interval mtr.layers mtr.zone mtr.window mtr.paths_share "
    "trainer.accelerator trainer.devices trainer.precision trainer.limit_test_batches trainer.cuda_graph "
    "trainer.enable_progress_bar ops.backend timing.batch_size timing.seconds pictures seed resume objective "
    "mtr.merge_at mtr.last_block mtr.read_share mtr.frames mtr.scope backbone.global_pool",
    "train": "backbone.drop_path_rate backbone.num_frames backbone.global_pool backbone.long_memory dataset.root "
    "dataset.holdout task.name trainer.accelerator trainer.devices "
    "trainer.limit_train_batches training.epochs training.lr training.weight_decay training.warmup_epochs "
    "training.ema_decay training.resume training.freeze_backbone training.label_smoothing training.mixup "
    "training.cutmix training.teacher training.distillation training.temperature ops.backend seed",
    "export": "format precision batch opset backbone.name backbone.checkpoint task.name mtr.ratio mtr.policy",
    "predict": "backbone.name backbone.checkpoint mtr.ratio mtr.policy ops.backend",
    "bench": "bench.device bench.backbone bench.batch bench.resolution bench.dtype bench.backend bench.policy "
    "bench.ratio bench.cuda_graph bench.competitors bench.torch_compile bench.seconds seed",
}
POINT = (
    "policy ratio reduction flops_literature flops_true flops_overhead tokens images skipped "
    "img_per_s latency_ms peak_mib"
)
METRICS = "top1 top5 balanced_accuracy agreement kl miou map ap50"


def test_commands_and_modules() -> None:
    named = {command.name: command.program for command in COMMANDS}
    commands = "eval train bench report visualize predict export demo models policies"
    assert set(commands.split()) <= set(named)
    modules = "__main__ train bench report.__main__ visualize predict export.__main__ demo.__main__"
    for module in modules.split():
        assert f"mtr_lab.{module}:main" in named.values()
        assert callable(pkgutil.resolve_name(f"mtr_lab.{module}:main"))


@pytest.mark.parametrize("group", GROUPS)
def test_choices_of_groups(group: str) -> None:
    assert set(GROUPS[group].split()) <= {file.stem for file in (CONF / group).glob("*.yaml")}


@pytest.mark.parametrize("program", KEYS)
def test_settings(program: str) -> None:
    config = compose(program, ["dataset=imagefolder"] if program == "config" else [])
    absent = [key for key in KEYS[program].split() if not _exists(config, key)]
    assert not absent


def _exists(config: DictConfig, key: str) -> bool:
    node, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, node) if node else config
    return parent is not None and name in parent


@pytest.mark.parametrize("policy", GROUPS["reduction"].split())
def test_a_policy_is_called_like_its_file(policy: str) -> None:
    assert mtr_lab.list_policies(policy) == [policy]


def test_models() -> None:
    assert set(GROUPS["backbone"].split()) <= set(mtr_lab.list_models())


def test_public_functions() -> None:
    public = (
        "UserError compile create_model evaluate_model export_model list_models list_policies patch predict_images "
        "trace unpatch"
    )
    assert set(public.split()) <= set(mtr_lab.__all__)
    assert all(callable(getattr(mtr_lab, name)) for name in public.split())
    assert mtr_lab.UserError is UserError
    assert issubclass(UserError, ValueError)
    for name in ("ops", "reduction", "backbones", "measure"):
        importlib.import_module(f"mtr_lab.{name}")
    assert dir(mtr_lab) == sorted(mtr_lab.__all__), "completion shows the public names, whatever is imported"
    modules = {module.name for module in pkgutil.iter_modules(mtr_lab.__path__)}
    assert not modules & set(mtr_lab.__all__), "a public function has the name of a module"
    assert callable(mtr_lab.ops.use_backend)
    assert {"model", "policy", "ratio"} <= set(inspect.signature(mtr_lab.patch).parameters)


GEOMETRY = {"img_size": 112, "patch_size": 16, "stride": 16, "depth": 7, "embed_dim": 96, "d_state": 16}


@pytest.mark.parametrize(("name", "more"), [("vim_ti", {}), ("videomamba_ti", {"num_frames": 8})])
def test_geometry(name: str, more: dict[str, int]) -> None:
    import torch

    with torch.device("meta"):
        model = mtr_lab.create_model(name, **GEOMETRY, **more, num_classes=13)
    assert model.input_shape == (3, *more.values(), 112, 112)
    assert len(model.blocks) == 7
    assert model.num_classes == 13


def test_fields_of_a_result() -> None:
    assert {"schema", "task", "backbone", "dataset", "config", "environment", "points"} <= set(
        typing.get_type_hints(Result)
    )
    assert set(POINT.split()) <= set(typing.get_type_hints(Point))
    assert set(METRICS.split()) <= {metric.key for metric in all_metrics()}

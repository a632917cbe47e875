"""
What would go wrong on a GPU, found without one, on tensors that have a device and a shape but no numbers (PyTorch's
`FakeTensorMode`): a tensor left on the CPU fails in a forward pass on "cuda"; waiting for a number (`.item()`,
`.tolist()`, `if tensor`) fails in an update.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from launching import forget_accelerate
from tiny_models import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vicmae_hf import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEModel,
)
from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.classification.classification import Objective as ClassificationObjective
from vicmae_hf.modeling_vicmae import ViCMAEPatchEmbeddings, prefer_kernels
from vicmae_hf.pretraining.objective import Objective
from vicmae_hf.training.loop import Updates
from vicmae_hf.training.optimization import Schedule, parameter_groups


OBJECTIVES = ["info_nce", "nt_xent", "simsiam", "vicreg", "none"]
SCHEDULE = Schedule(
    num_steps=4,
    steps_per_epoch=4,
    num_warmup_steps=0,
    peak_learning_rate=1e-3,
    gradient_accumulation_steps=2,
    total_batch_size=8,
    num_processes=1,
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pretraining_leaves_nothing_on_the_cpu(objective, attention):
    with FakeTensorMode(), torch.device("cuda"):
        config = tiny_config(contrastive_loss=objective, attn_implementation=attention, learnable_temperature=True)
        model = ViCMAEForPreTraining(config).train()
        output = model(torch.randn(4, 2, 3, 16, 16))
    for name in ("loss", "logits", "mask", "features"):
        assert output[name].device.type == "cuda", name


@pytest.mark.parametrize("pooling", ["cls", "mean", "tubelets"])
def test_classifiers_leave_nothing_on_the_cpu(pooling):
    with FakeTensorMode(), torch.device("cuda"):
        config = tiny_config(pooling=pooling, drop_path_rate=0.1)
        clips, labels = torch.randn(2, 4, 3, 20, 24), torch.tensor([0, 2])  # positions are resampled, too
        output = ViCMAEForVideoClassification(config).train()(clips, labels)
        assert output.loss.device.type == "cuda"
        assert ViCMAEModel(config)(clips).pooler_output.device.type == "cuda"
        if pooling != "tubelets":
            output = ViCMAEForImageClassification(config).train()(clips[:, 0], labels)
            assert output.loss.device.type == "cuda"


KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


def enabled_kernels():
    return {kernel for kernel, is_enabled in KERNELS.items() if is_enabled()}


def make_query(length=50):
    with FakeTensorMode(), torch.device("cuda"):
        return torch.empty(2, 4, length, 8)


def test_short_frames_have_kernels_of_their_own_unless_the_caller_chose_one():
    order = torch._C._get_sdp_priority_order()
    with prefer_kernels(make_query()):
        assert enabled_kernels() == {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
        # PyTorch makes its order at the first attention of a process. Set here, the first would be another one.
        assert torch._C._get_sdp_priority_order() == order
    with prefer_kernels(make_query(65)):
        assert enabled_kernels() == set(KERNELS)
    for chosen in [{kernel} for kernel in KERNELS] + [set(KERNELS) - {kernel} for kernel in KERNELS]:
        with sdpa_kernel(list(chosen)), prefer_kernels(make_query()):
            assert enabled_kernels() == chosen
    assert enabled_kernels() == set(KERNELS)


@pytest.mark.parametrize(("chosen", "num_switches"), [(None, 2), (SDPBackend.MATH, 0)])  # there and back
def test_a_compiled_program_switches_kernels_as_the_caller_left_it(chosen, num_switches):
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def attend(query):
        with prefer_kernels(query):
            return F.scaled_dot_product_attention(query, query, query)

    with sdpa_kernel(chosen or list(KERNELS)):
        attend(make_query())
    (graph,) = graphs
    assert sum("_sdpa_kernel" in target for target in graph) == num_switches


def make_updates(model, objective_of, batch, num_updates=3):
    """Makes whole updates by the loop, in bf16, each of two batches."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, device_placement=False)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    arguments = SimpleNamespace(seed=0, max_skipped_updates=0)
    batches = [batch() for _ in range(2 * num_updates)]
    updates = Updates(accelerator, prepared, optimizer, batches, objective_of(prepared), SCHEDULE, arguments)
    for step in range(num_updates):
        updates.make(step)
    forget_accelerate()
    return updates


@pytest.fixture
def no_check_of_pixels(monkeypatch):
    """Pixels on a CPU are checked for NaN, which needs numbers; on a GPU they are not."""
    monkeypatch.setattr(ViCMAEPatchEmbeddings, "check_pixel_values", lambda embeddings, pixel_values: None)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_update_of_pretraining_waits_for_nothing(objective, no_check_of_pixels):
    pixels = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with FakeTensorMode():
        model = ViCMAEForPreTraining(tiny_config(contrastive_loss=objective, reconstruct="both")).train()
        updates = make_updates(
            model,
            lambda prepared: Objective(prepared, model, pixels, 0.25),  # the contrast starts at the second update
            lambda: {
                "pixel_values": torch.zeros(4, 2, 3, 16, 16, dtype=torch.uint8),
                "noise": torch.rand(4, 2, 16),
            },
        )
        with pytest.raises(DataDependentOutputException):  # only the log waits
            updates.read_losses()


def test_an_update_of_finetuning_waits_for_nothing(no_check_of_pixels):
    config = tiny_config(drop_path_rate=0.1)
    # Without mixing: torchvision draws its proportions on the CPU, where numbers are at hand.
    settings = {"task": "video", "method": "finetune", "mixup": 0.0, "cutmix": 0.0}
    arguments = ClassificationArguments(train_data=["none"], eval_data="none", output_dir="none", **settings)
    with FakeTensorMode():
        model = ViCMAEForVideoClassification(config).train()
        make_updates(
            model,
            lambda prepared: ClassificationObjective(prepared, config, arguments),
            lambda: {
                "pixel_values": torch.zeros(4, 4, 3, 16, 16, dtype=torch.uint8),
                "labels": torch.zeros(4, dtype=torch.int64),
            },
        )

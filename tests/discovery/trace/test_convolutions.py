"""Convolutional nets: BatchNorm in both modes, skip connections, groups, ConvNeXt's depthwise blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import Symmetries, find_symmetries

Check = Callable[..., Symmetries]
Table = Callable[[Symmetries], dict[str, str]]


def images(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, dtype=torch.float64),)


class Block(nn.Module):
    """torchvision's BasicBlock, its inner width another than its outer one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs + 1, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs + 1)
        self.conv2, self.bn2 = nn.Conv2d(outputs + 1, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.layer1, self.layer2, self.layer3 = Block(5, 5), Block(5, 7, 2), Block(7, 7)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


CONVOLUTIONS = ("conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2", "layer2.downsample.0",
                "layer3.conv1", "layer3.conv2")  # fmt: skip


def test_resnet(found_exactly: Check, table: Table) -> None:
    found = found_exactly(ResNet(), images(3, 3, 8, 8), images(2, 3, 12, 12))
    widths = (5, 6, 5, 8, 7, 7, 8, 7)
    scales = zip(CONVOLUTIONS, widths, strict=True)
    assert table(found) == {
        **{f"{name}.batchnorm-scale": f"batchnorm-scale, positive diagonal({n}), 1" for name, n in scales},
        "bn1.readers": "norm-readers, positive diagonal(5), 1",
        "layer1.bn1.readers": "norm-readers, positive diagonal(6), 1",
        "layer2.bn1.readers": "norm-readers, positive diagonal(8), 1",
        "layer2.bn2.readers": "norm-readers, positive diagonal(7), 1",
        "layer3.bn1.readers": "norm-readers, positive diagonal(8), 1",
        "layer1.conv1.channels": "channels, permutation(5), 1",
        "layer1.conv2.channels": "channels, permutation(6), 1",
        "layer2.conv2.channels": "channels, permutation(8), 1",
        "layer3.conv1.channels": "channels, permutation(7), 1",
        "layer3.conv2.channels": "channels, permutation(8), 1",
    }
    stage = found["layer2.bn2.readers"]
    assert {v.parameter.rpartition(".")[0] for v in stage.plus} == {"layer2.bn2", "layer2.downsample.1", "layer3.bn2"}
    assert {v.parameter for v in stage.minus} == {"layer3.conv1.weight", "fc.weight"}
    assert set(found["layer3.conv2.channels"].buffers()) == {"layer3.bn1.running_mean", "layer3.bn1.running_var"}


def test_in_training_a_resnet_keeps_its_outputs_and_its_new_statistics_follow() -> None:
    model, (x,) = ResNet().double(), images(6, 3, 8, 8)
    found = find_symmetries(model, x)
    kinds = {joint.kind for joint in found}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in kinds:
        model.load_state_dict(start)
        before = model.train()(x)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        chosen = {name: g for name, g in found.random().items() if found[name].kind == kind}
        model.load_state_dict(start)
        found.apply_(model, chosen)
        after = model.train()(x)
        bar = 1e-3 if kind == "batchnorm-scale" else 1e-12  # up to eps = 1e-5 over the channel's variance
        assert (after - before).norm() / before.norm() < bar
        reference = ResNet().double()
        reference.load_state_dict(expected)
        found.apply_(reference, chosen)
        for name, value in model.named_buffers():
            torch.testing.assert_close(value, reference.get_buffer(name), rtol=bar, atol=10 * bar * 1e-2)


def test_explain_says_that_a_scale_is_exact_up_to_eps_in_training() -> None:
    text = find_symmetries(ResNet(), images(6, 3, 8, 8)).explain()
    lines = [line for line in text.splitlines() if line.startswith("layer1.conv1.batchnorm-scale")]
    assert "found: in training mode up to the norm's eps" in lines[0]


@pytest.mark.parametrize(
    "options", [{"track_running_stats": False}, {"affine": False}], ids=["no statistics", "no gain"]
)
def test_batchnorms_of_other_kinds(options: dict[str, bool], found_exactly: Check, table: Table) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, **options), nn.ReLU(), nn.Conv2d(5, 4, 3))
    found = table(found_exactly(model, images(3, 3, 8, 8)))
    assert found.pop("3.channels") == "channels, permutation(5), 1"
    if "affine" in options:
        assert found == {"0.batchnorm-scale": "batchnorm-scale, positive diagonal(5), 1"}
    else:
        assert found == {"1.readers": "norm-readers, positive diagonal(5), 1"}


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_keep_channels_within_their_group(groups: int, found_exactly: Check, table: Table) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=groups), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    found = table(found_exactly(model, images(2, 3, 5, 5)))
    inner, outer = 12 // groups, 6 // groups
    assert found == {
        "2.up-down": f"up-down, positive diagonal({inner}), {groups}",
        "4.up-down": "up-down, positive diagonal(6), 1",
        "2.channels": f"channels, permutation({inner}), {groups}",
        "4.channels": f"channels, permutation({outer}), {groups}",
    }


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_layers_pass_channels_on(multiplier: int, found_exactly: Check, table: Table) -> None:
    depthwise = nn.Conv2d(5, 5 * multiplier, 3, groups=5)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), depthwise, nn.ReLU6(), nn.Conv2d(5 * multiplier, 4, 1))
    found = found_exactly(model, images(2, 3, 6, 6))
    assert table(found) == {
        "2.up-down": "up-down, positive diagonal(5), 1",
        "4.channels": "channels, permutation(5), 1",
    }
    assert {"0.weight", "2.weight"} <= set(found["4.channels"].parameters())


LAYERS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "flattened": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)], (2, 2, 5, 5)),
    "pooled": ([nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 1)], (2, 2, 9)),
    "averaged": ([nn.Conv3d(2, 4, 1), nn.LeakyReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 3, 1)], (2, 2, 4, 4, 4)),
    "transposed": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3)], (2, 2, 5, 5)),
    "after a transposed one": ([nn.ConvTranspose2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)], (2, 2, 5, 5)),
    "upsampled": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3)], (2, 2, 5, 5)),
    "padded": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(4, 3, 3)], (2, 2, 5, 5)),
    "in channels last": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)], (2, 2, 7, 7)),
}


@pytest.mark.parametrize(("layers", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layers_that_pass_channels_on(
    layers: list[nn.Module], shape: tuple[int, ...], found_exactly: Check, table: Table, request: pytest.FixtureRequest
) -> None:
    model = nn.Sequential(*layers)
    if "last" in request.node.name:
        model = model.to(memory_format=torch.channels_last)
    found = table(found_exactly(model, images(*shape)))
    assert found == {
        f"{len(layers) - 1}.up-down": "up-down, positive diagonal(4), 1",
        f"{len(layers) - 1}.channels": "channels, permutation(4), 1",
    }


def test_shuffled_pixels_tie_the_channels_that_become_one(found_exactly: Check, table: Table) -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(3, 4, 3))
    found = table(found_exactly(model, images(2, 2, 5, 5)))
    assert found == {"3.up-down": "up-down, positive diagonal(3), 1", "3.channels": "channels, permutation(3), 1"}


class Concatenated(nn.Module):
    """DenseNet's wiring: each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.c(torch.cat([x, F.relu(self.b(x))], 1))


def test_concatenated_channels_keep_their_places(found_exactly: Check, table: Table) -> None:
    found = found_exactly(Concatenated(), images(2, 2, 4, 4))
    assert sorted(table(found).values()) == [
        "channels, permutation(3), 1",
        "channels, permutation(4), 1",
        "up-down, positive diagonal(3), 1",
        "up-down, positive diagonal(4), 1",
    ]
    scale = next(joint for joint in found if joint.width == 3 and joint.kind == "up-down")
    assert [(view.parameter, view.start) for view in scale.minus] == [("c.weight", 4)]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.out = (
            nn.Conv2d(2, 6, 3),
            nn.Conv2d(6, 3, 1),
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.out(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


def test_a_squeezed_gate_moves_with_the_channels_it_opens(found_exactly: Check, table: Table) -> None:
    found = found_exactly(SqueezeExcite(), images(2, 2, 5, 5))
    assert sorted(table(found).values()) == [
        "channels, permutation(3), 1",
        "channels, permutation(6), 1",
        "up-down, positive diagonal(3), 1",
        "up-down, positive diagonal(6), 1",
    ]


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block1 = nn.Conv2d(3, 4, 2, 2), ConvNeXtBlock(4)
        self.norm, self.down, self.block2 = nn.LayerNorm(4), nn.Conv2d(4, 6, 2, 2), ConvNeXtBlock(6)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.block1(self.stem(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.last(self.block2(self.down(x)).mean((2, 3))))


def test_convnext(found_exactly: Check, table: Table) -> None:
    found = table(found_exactly(ConvNeXt(), images(2, 3, 8, 8)))
    for block, width in (("block1", 4), ("block2", 6)):
        assert found.pop(f"{block}.norm.readers") == f"norm-readers, diagonal({width}), 1"
        assert found.pop(f"{block}.pwconv2.layer-scale") == f"layer-scale, diagonal({width}), 1"
        assert found.pop(f"{block}.pwconv2.neurons") == f"neurons, permutation({3 * width}), 1"
    assert found.pop("norm.readers") == "norm-readers, diagonal(4), 1"
    assert found.pop("last.readers") == "norm-readers, diagonal(6), 1"
    assert sorted(found.values()) == ["channels, permutation(4), 1", "channels, permutation(6), 1"]


@pytest.mark.parametrize("objective", ["grad_norm", "grad_l1", "balance"])
def test_a_teleport_of_a_resnet_leaves_its_function_alone(objective: str) -> None:
    model, (x,) = ResNet().double().eval(), images(4, 3, 8, 8)
    found = find_symmetries(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    teleporter = tf.attach(optimizer, found, objective=objective, schedule=tf.Once(), radius=0.3)
    before, start = model(x).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    model(x).square().mean().backward()
    optimizer.step()
    (record,) = teleporter.history
    assert record.objective_before != record.objective_after
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {"layer1.conv2.weight", "layer1.bn1.weight"} <= moved
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)

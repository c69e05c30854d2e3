"""Blocks of torchvision's models: one or more of each family, of classification, segmentation, video, detection and flow."""
# ruff: noqa: E402 - operators must be declared before torchvision is imported

from functools import partial
from unittest import mock

import torch
from torch import nn

from vision_blocks.blocks import EPS, Blocks
from zoo import from_torchvision as zoo_torchvision

zoo_torchvision.import_models()

from torchvision.models import alexnet as _alexnet, mobilenetv2
from torchvision.models.detection import fcos, keypoint_rcnn, mask_rcnn, ssd, ssdlite
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig, MBConv, MBConvConfig
from torchvision.models.inception import BasicConv2d
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.optical_flow import raft
from torchvision.models.quantization.mobilenetv3 import QuantizableInvertedResidual as QuantizableMobile
from torchvision.models.swin_transformer import SwinTransformerBlockV2
from torchvision.models.vgg import make_layers
from torchvision.models.video import resnet as video
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

TORCHVISION = block = Blocks("torchvision", "torchvision.models")

MAP, CLIP, TOKENS = (2, 4, 4, 4), (2, 3, 2, 3, 3), (2, 5, 8)
NORM = {"norm_layer": nn.BatchNorm2d}
ACT = {"activation_layer": nn.ReLU}
WINDOW = {"dim": 8, "num_heads": 2, "window_size": [2, 2], "shift_size": [1, 1], "mlp_ratio": 1.0}


def alexnet():
    """AlexNet has no block: the whole, three channels wide."""
    with torch.device("meta"):
        model = _alexnet(num_classes=3)
    channels = was = 3
    for layers in (model.features, model.classifier):
        for place, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d):
                layers[place] = nn.Conv2d(channels, 3, layer.kernel_size, layer.stride, layer.padding)
                channels, was = 3, layer.out_channels
            elif isinstance(layer, nn.Linear):
                layers[place] = nn.Linear(layer.in_features * channels // was, 3)
                channels, was = 3, layer.out_features
    return model


def vgg():
    """A chain of VGG's configuration: convolutions, batch norms and pools, with the classifier's kind of end."""
    return nn.Sequential(
        make_layers([4, "M", 4, 4, "M"], batch_norm=True), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
    )


def narrow_convolution(channels, out, **kwargs):
    """Inception v3's convolutions have fixed widths: a 24th of them."""
    return BasicConv2d(channels // 24, out // 24, **kwargs)


def swin_v2():
    made = SwinTransformerBlockV2(**WINDOW)
    made.attn.cpb_mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))  # 512 wide by itself
    return made


def ssd_features():
    """The SSD's own extractor on a small VGG, a 256th as wide, without the last two feature maps."""
    convolution = nn.Conv2d

    class Narrow(convolution):
        def __init__(self, in_channels, out_channels, *args, **kwargs):
            super().__init__(max(in_channels // 256, 3), max(out_channels // 256, 3), *args, **kwargs)

    with mock.patch.object(nn, "Conv2d", Narrow):
        made = ssd.SSDFeatureExtractorVGG(make_layers([3, "M", 3, "M", 3, "M", 3, "M", 3, "M"]), highres=False)
    made.scale_weight = nn.Parameter(torch.ones(3))
    made.extra = made.extra[:2]
    return made


def raft_update():
    encoder = raft.MotionEncoder(in_channels_corr=3, corr_layers=(2, 2), flow_layers=(2, 2), out_channels=4)
    recurrent, head = raft.RecurrentBlock(input_size=6, hidden_size=2), raft.FlowHead(in_channels=2, hidden_size=3)
    return raft.UpdateBlock(motion_encoder=encoder, recurrent_block=recurrent, flow_head=head)


class Loud(nn.Module):
    """Behind inputs so large that ReLU6 meets its upper bound."""

    def __init__(self, inner, times=8.0):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        return self.inner([self.times * part for part in x] if isinstance(x, list) else self.times * x)


class Multiscale(nn.Module):
    """MViT's block, on (2, 4, 4) tokens and a class token; version 2 has relative positions and adds the queries."""

    def __init__(self, version):
        super().__init__()
        second = version == 2
        config = MSBlockConfig(2, 4, 4, [3, 3, 3] if second else [], [3, 3, 3], [1, 1, 1] if second else [], [1, 2, 2])
        self.block = MultiscaleBlock([2, 4, 4], config, second, not second, second, second)

    def forward(self, x):
        return self.block(x, (2, 4, 4))[0]


# fmt: off
block("alexnet", alexnet, (4, 3, 63, 63), found=21)
block("convnext", "models.convnext.CNBlock", (1, 4, 4, 4), found=8, dim=4, layer_scale=0.5, stochastic_depth_prob=0.0)
block("densenet", "models.densenet._DenseBlock", MAP, found=18, num_layers=2, num_input_features=4, bn_size=2, growth_rate=2,
    drop_rate=0.0)
block("densenet, transition", "models.densenet._Transition", MAP, found=4, num_input_features=4, num_output_features=3)
block("efficientnet", lambda: MBConv(MBConvConfig(2, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d), (2, 8, 4, 4), found=0)
block("efficientnet, fused", lambda: FusedMBConv(FusedMBConvConfig(2, 3, 1, 4, 4, 1), 0.0, nn.BatchNorm2d), MAP, found=0)
block("googlenet", "models.googlenet.Inception", MAP, found=4, in_channels=4, ch1x1=2, ch3x3red=2, ch3x3=2, ch5x5red=2,
    ch5x5=2, pool_proj=2)
block("inception, A", "models.inception.InceptionA", MAP, found=8, in_channels=96, pool_features=48,
    conv_block=narrow_convolution)
block("inception, C", "models.inception.InceptionC", MAP, found=12, in_channels=96, channels_7x7=48,
    conv_block=narrow_convolution)
block("maxvit", "models.maxvit.MaxVitLayer", (1, 4, 4, 4), found=36, in_channels=4, out_channels=4, squeeze_ratio=0.5,
    expansion_ratio=2, stride=1, **NORM, activation_layer=nn.GELU, head_dim=2, mlp_ratio=1, mlp_dropout=0.0,
    attention_dropout=0.0, p_stochastic_dropout=0.0, partition_size=2, grid_size=(4, 4))
block("mnasnet", "models.mnasnet._InvertedResidual", MAP, found=16, in_ch=4, out_ch=4, kernel_size=3, stride=1,
    expansion_factor=2)
block("mobilenetv2", lambda: Loud(mobilenetv2.InvertedResidual(4, 4, 1, 2)), (4, 4, 6, 6), found=0)
block("mobilenetv3", lambda: InvertedResidual(InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1.0), nn.BatchNorm2d), (2,
    8, 4, 4), found=8)
block("mobilenetv3, relu", lambda: InvertedResidual(InvertedResidualConfig(8, 3, 16, 8, True, "RE", 1, 1, 1.0),
    nn.BatchNorm2d), (2, 8, 4, 4), found=40)
block("regnet", "models.regnet.ResBottleneckBlock", MAP, found=10, width_in=4, width_out=4, stride=1, **NORM, **ACT,
    group_width=2, se_ratio=0.5)
block("resnet", "models.resnet.BasicBlock", MAP, found=4, inplanes=4, planes=4)
block("resnet, bottleneck", "models.resnet.Bottleneck", (2, 8, 4, 4), found=4, inplanes=8, planes=2)
block("resnet, resnext", "models.resnet.Bottleneck", (2, 16, 4, 4), found=8, inplanes=16, planes=4, groups=2, base_width=32)
block("shufflenetv2", "models.shufflenetv2.InvertedResidual", (2, 8, 4, 4), found=8, inp=8, oup=8, stride=1)
block("shufflenetv2, stride", "models.shufflenetv2.InvertedResidual", (2, 4, 8, 8), found=12, inp=4, oup=8, stride=2)
block("squeezenet", "models.squeezenet.Fire", MAP, found=3, inplanes=4, squeeze_planes=3, expand1x1_planes=3,
    expand3x3_planes=3)
block("swin", "models.swin_transformer.SwinTransformerBlock", (1, 4, 4, 8), found=32, **WINDOW)
block("swin, v2", swin_v2, (1, 4, 4, 8), found=12, missed=4, why=f"queries and keys are {EPS}")
block("swin, merging", "models.swin_transformer.PatchMerging", (1, 4, 4, 4), found=16, dim=4)
block("vgg", vgg, (4, 3, 4, 4), found=16)
block("vit", "models.vision_transformer.EncoderBlock", TOKENS, found=32, num_heads=2, hidden_dim=8, mlp_dim=8, dropout=0.0,
    attention_dropout=0.0)
block("deeplabv3", "models.segmentation.deeplabv3.ASPP", (2, 3, 5, 5), found=12, in_channels=3, atrous_rates=[1, 2],
    out_channels=3)
block("fcn", "models.segmentation.fcn.FCNHead", (2, 12, 4, 4), found=3, in_channels=12, channels=3)
block("lraspp", "models.segmentation.lraspp.LRASPPHead", {"low": (2, 3, 4, 4), "high": (2, 4, 2, 2)}, found=5, low_channels=3,
    high_channels=4, num_classes=3, inter_channels=5)
block("r3d", "models.video.resnet.BasicBlock", CLIP, found=3, inplanes=3, planes=3, conv_builder=video.Conv3DSimple)
block("mc3", "models.video.resnet.BasicBlock", CLIP, found=3, inplanes=3, planes=3, conv_builder=video.Conv3DNoTemporal)
block("r2plus1d", "models.video.resnet.BasicBlock", CLIP, found=15, inplanes=3, planes=3, conv_builder=video.Conv2Plus1D)
block("s3d", "models.video.s3d.SepInceptionBlock3D", CLIP, found=8, in_planes=3, b0_out=2, b1_mid=2, b1_out=2, b2_mid=2,
    b2_out=2, b3_out=2, norm_layer=nn.BatchNorm3d)
block("mvit", partial(Multiscale, 2), (1, 33, 4), found=10)
block("mvit, v1", partial(Multiscale, 1), (1, 33, 4), found=12)
block("swin3d", "models.swin_transformer.SwinTransformerBlock", (1, 2, 4, 4, 8), found=32, attn_layer=ShiftedWindowAttention3d,
    **WINDOW | {"window_size": [2, 2, 2], "shift_size": [1, 1, 1]})
block("feature pyramid", "ops.feature_pyramid_network.FeaturePyramidNetwork", {"0": (2, 2, 4, 4), "1": (2, 3, 2, 2)}, found=4,
    in_channels_list=[2, 3], out_channels=4)
block("faster_rcnn, rpn", "models.detection.rpn.RPNHead", [MAP], found=8, in_channels=4, num_anchors=2, conv_depth=2)
block("faster_rcnn, head", "models.detection.faster_rcnn.FastRCNNConvFCHead", (4, 3, 2, 2), found=10, input_size=(3, 2, 2),
    conv_layers=[3, 3], fc_layers=[4, 3], **NORM)
block("faster_rcnn, two layers", "models.detection.faster_rcnn.TwoMLPHead", (4, 2, 2, 2), found=4, in_channels=8,
    representation_size=4)
block("mask_rcnn", lambda: nn.Sequential(mask_rcnn.MaskRCNNHeads(3, [3, 3], 1), mask_rcnn.MaskRCNNPredictor(3, 3, 2)), (4, 3,
    3, 3), found=9)
block("keypoint_rcnn", lambda: nn.Sequential(keypoint_rcnn.KeypointRCNNHeads(3, [3, 3]),
    keypoint_rcnn.KeypointRCNNPredictor(3, 2)), (4, 3, 3, 3), found=6)
block("retinanet", "models.detection.retinanet.RetinaNetHead", [(4, 3, 4, 4)], found=24, in_channels=3, num_anchors=2,
    num_classes=2, **NORM)
block("fcos", lambda: fcos.FCOSClassificationHead(4, 1, 2, 2, norm_layer=partial(nn.GroupNorm, 2)), [(2, 4, 4, 4)], found=8)
block("fcos, boxes", lambda: fcos.FCOSRegressionHead(4, 1, 2, norm_layer=partial(nn.GroupNorm, 2)), [(2, 4, 4, 4)], found=8)
block("ssd", ssd_features, (2, 3, 32, 32), found=19, missed=1, why=f"the map is {EPS}")
block("ssdlite", lambda: Loud(ssdlite.SSDLiteHead([3, 4], [1, 1], 2, nn.BatchNorm2d)), [(4, 3, 6, 6), (4, 4, 6, 6)], found=0)
block("quantization, resnet", "models.quantization.resnet.QuantizableBasicBlock", MAP, found=4, inplanes=4, planes=4)
block("quantization, mobilenetv3", lambda: QuantizableMobile(InvertedResidualConfig(8, 3, 16, 8, True, "RE", 1, 1, 1.0),
    nn.BatchNorm2d), (2, 8, 4, 4), found=40)
block("raft, encoder", lambda: raft.FeatureEncoder(layers=(2, 2, 3, 3, 3), norm_layer=nn.InstanceNorm2d), (2, 3, 16, 16),
    found=0)
block("raft, context", lambda: raft.FeatureEncoder(layers=(2, 2, 3, 3, 3), norm_layer=nn.BatchNorm2d), (2, 3, 16, 16),
    found=24)
block("raft, update", raft_update, (2, 2, 4, 4), (2, 2, 4, 4), (2, 3, 4, 4), (2, 2, 4, 4), found=13)

"""Blocks of timm's models: one or more of each of its families."""
# ruff: noqa: E402 - operators must be declared before timm is imported

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vision_blocks.blocks import EPS, KEYS, ZEROS, Blocks
from zoo import from_torchvision as zoo_torchvision

zoo_torchvision.import_models()

from timm.layers import ConvNormAct, RmsNorm, SqueezeExcite
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models import byobnet, coat, cspnet, efficientnet, hrnet, metaformer, mobilenetv3, resnet
from timm.models._efficientnet_blocks import SqueezeExcite as Squeeze
from timm.models._efficientnet_builder import decode_arch_def

TIMM = block = Blocks("timm", "timm.models")

ONE = "layer norm over a single channel returns its shift whatever comes in, so that the map in front may scale"

# ---------------------------------------------------------------------------------- blocks that plain arguments do not make


def attending(layer: Callable[..., nn.Module], **options: Any) -> nn.Module:
    layers = byobnet.LayerFn(self_attn=partial(layer, num_heads=2, **options))
    return byobnet.SelfAttnBlock(4, 4, layers=layers)


def bottleneck() -> nn.Module:
    return byobnet.BottleneckBlock(4, 8, bottle_ratio=1.0, layers=byobnet.LayerFn(attn=partial(SqueezeExcite, rd_channels=2)))


def reparametrized() -> nn.Module:
    stages = byobnet.ByoBlockCfg("rep", d=1, c=4, s=1), byobnet.ByoBlockCfg("rep", d=1, c=3, s=2)
    config = byobnet.ByoModelCfg(stages, stem_chs=3, stem_type="3x3", stem_pool="")
    return byobnet.ByobNet(config, num_classes=3, in_chans=2)


def coat_serial() -> nn.Module:
    positions = {"shared_cpe": coat.ConvPosEnc(8), "shared_crpe": coat.ConvRelPosEnc(4, 2, {3: 1, 5: 1})}
    return coat.SerialBlock(8, 2, mlp_ratio=1.0, qkv_bias=True, **positions)


def dark() -> nn.Module:
    return cspnet.DarkStage(3, 4, 2, 1, 1, block_fn=cspnet.DarkBlock, act_layer="leaky_relu", norm_layer="batchnorm2d")


def mobile(kind: Callable[..., nn.Module], *stages: str, features: int = 6, **options: Any) -> nn.Module:
    """A whole network of these stages, in the notation of timm."""
    sizes = {"stem_size": 4, "num_features": features, "num_classes": 3, "in_chans": 2}
    return kind(block_args=decode_arch_def([[stage] for stage in stages]), **sizes, **options)


def narrow(channels: int, out: int, times: int = 24, **options: Any) -> nn.Module:
    """A convolution with a fraction of its channels: the widths of inception's blocks are fixed."""
    return ConvNormAct(max(channels // times, 2), max(out // times, 2), **options)


# -------------------------------------------------------------------------------------------------- the blocks
# fmt: off
block("beit", "Block", (2, 5, 8), found=40, missed=8, why=ZEROS, dim=8, qkv_bias=True, init_values=0.5, window_size=(2, 2),
    num_heads=2, mlp_ratio=1.0)
block("byoanet", lambda: attending(BottleneckAttn, feat_size=(3, 3)), (1, 4, 3, 3), found=20)
block("byoanet, bottleneck layer", "layers.bottleneck_attn.BottleneckAttn", (1, 8, 3, 3), found=4, dim=8, feat_size=(3, 3),
    num_heads=2)
block("byoanet, halo", lambda: attending(HaloAttn, block_size=2, halo_size=1), (1, 4, 4, 4), found=20)
block("byoanet, halo layer", "layers.halo_attn.HaloAttn", (1, 8, 4, 4), found=4, dim=8, num_heads=2, block_size=2,
    halo_size=1)
block("byoanet, lambda", "layers.lambda_layer.LambdaLayer", (2, 8, 3, 3), found=1, dim=8, num_heads=2, dim_head=2, r=3)
block("byobnet", "BasicBlock", (2, 4, 4, 4), found=8, in_chs=4, out_chs=8)
block("byobnet, bottle", bottleneck, (2, 4, 4, 4), found=18)
block("byobnet, edge", "EdgeBlock", (2, 4, 4, 4), found=8, in_chs=4, out_chs=4)
block("byobnet, mobileone", "MobileOneBlock", (2, 4, 4, 4), found=0, in_chs=4, out_chs=4, num_conv_branches=2)
block("byobnet, rep", reparametrized, (2, 2, 8, 8), found=19)
block("cait", "LayerScaleBlock", (2, 5, 8), found=52, dim=8, num_heads=2, mlp_ratio=1.0)
block("coat", coat_serial, (1, 10, 8), [3, 3], found=26)
block("coat, model", "CoaT", (1, 1, 64, 64), found=30, img_size=64, patch_size=4, in_chans=1, num_classes=2, embed_dims=(4, 4,
    4, 4), serial_depths=(0, 0, 0, 1), num_heads=2, mlp_ratios=(1, 1, 1, 1), crpe_window={3: 2})
block("convit", "Block", (1, 4, 8), found=32, dim=8, num_heads=2, mlp_ratio=1.0)
block("convit, MHSA", "Block", (1, 4, 8), found=32, dim=8, num_heads=2, mlp_ratio=1.0, use_gpsa=False, qkv_bias=True)
block("convmixer", "ConvMixer", (1, 2, 8, 8), found=12, dim=4, depth=2, kernel_size=3, patch_size=2, in_chans=2,
    num_classes=3)
block("convnext", "ConvNeXtBlock", (1, 4, 4, 4), found=8, in_chs=4, kernel_size=3, mlp_ratio=2)
block("convnext, v2", "ConvNeXtBlock", (1, 4, 4, 4), found=4, in_chs=4, kernel_size=3, mlp_ratio=2, use_grn=True,
    ls_init_value=None)
block("cpubone", "CPUBoneBlock", (1, 4, 4, 4), found=20, in_channels=4, expand_ratio=2, mlp_ratio=2, proj_drop=0.0)
block("cpubone, small", "CPUBoneBlock", (1, 4, 5, 5), found=16, in_channels=4, expand_ratio=2, mlp_ratio=2, proj_drop=0.0,
    fused_conv=True, small_kernels=True, att_stride=2, attn_upsample="nearest")
block("crossvit", "MultiScaleBlock", [(1, 4, 4), (1, 3, 4)], found=56, dim=(4, 4), patches=(4, 2), depth=(1, 1, 1),
    num_heads=(2, 2), mlp_ratio=(1.0, 1.0, 1.0), qkv_bias=True, drop_path=[0.0])
block("csatv2", "TransformerBlock", (1, 4, 6, 6), found=16, inp=4, oup=4, num_heads=2, attn_head_dim=2, downsample=True)
block("csatv2, convolutional", "Block", (2, 2, 7, 7), found=5, missed=1, why=ONE, dim=2, ls_init_value=0.5)
block("cspnet", "CrossStage", (2, 4, 4, 4), found=10, in_chs=4, out_chs=4, stride=1, dilation=1, depth=1, block_ratio=0.5,
    act_layer="relu", norm_layer="batchnorm2d")
block("cspnet, CrossStage3", "CrossStage3", (2, 3, 8, 8), found=11, in_chs=3, out_chs=4, stride=2, dilation=1, depth=1,
    block_ratio=0.5, act_layer="relu", norm_layer="batchnorm2d")
block("cspnet, dark", dark, (2, 3, 8, 8), found=4)
block("cspnext", "CspNextLayer", (2, 4, 4, 4), found=0, in_channels=4, out_channels=4, num_blocks=1, channel_attention=True)
block("cspnext, SPP", "SPPBottleneck", (2, 4, 4, 4), found=2, in_channels=4, out_channels=4, act_layer="relu")
block("davit", "ChannelBlock", (1, 8, 2, 2), found=20, dim=8, num_heads=2, mlp_ratio=1.0)
block("deepseek_vit", "DeepseekVitBlock", (1, 4, 8), (4, 8), found=36, dim=8, num_heads=2, mlp_ratio=1.0, norm_layer=RmsNorm)
block("deit", "VisionTransformerDistilled", (1, 1, 4, 4), found=40, img_size=4, patch_size=2, in_chans=1, num_classes=3,
    embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.0)
block("densenet", "DenseBlock", (2, 4, 4, 4), found=18, num_layers=2, num_input_features=4, bn_size=2, growth_rate=2)
block("dla", "DlaBasic", (2, 4, 4, 4), found=4, inplanes=4, planes=4)
block("dpn", "DualPathBlock", (2, 4, 4, 4), found=16, in_chs=4, num_1x1_a=4, num_3x3_b=4, num_1x1_c=4, inc=2, groups=2,
    block_type="proj")
block("dpn, b", "DualPathBlock", (2, 6, 4, 4), found=14, in_chs=6, num_1x1_a=4, num_3x3_b=4, num_1x1_c=4, inc=2, groups=2,
    b=True)
block("edgenext", "SplitTransposeBlock", (1, 8, 3, 3), found=34, missed=16, why=f"queries and keys are {EPS}", dim=8,
    num_scales=2, num_heads=2, expand_ratio=1.0, use_pos_emb=False, ls_init_value=0.5)
block("edgenext, conv", "ConvBlock", (1, 4, 4, 4), found=8, dim=4, kernel_size=3, expand_ratio=2.0, ls_init_value=0.5)
block("efficientformer", "MetaBlock2d", (1, 4, 4, 4), found=4, dim=4, mlp_ratio=2.0)
block("efficientformer_v2", "Attention2d", (2, 4, 2, 2), found=6, missed=6,
    why=f"{KEYS}; the scale of a head moves its attention biases, which the module keeps after its first call", dim=4,
    key_dim=2, num_heads=2, attn_ratio=1, resolution=2)
block("efficientformer_v2, conv", "EfficientFormerV2Block", (1, 4, 4, 4), found=4, dim=4, mlp_ratio=2.0, use_attn=False,
    layer_scale_init_value=0.5)
block("efficientformer_v2, downsample", "Attention2dDownsample", (2, 4, 4, 4), found=4, missed=4, why=KEYS, dim=4, key_dim=2,
    num_heads=2, attn_ratio=1, resolution=4)
block("efficientnet", lambda: mobile(efficientnet.EfficientNet, "ds_r1_k3_s1_e1_c4_se0.25", "ir_r1_k3_s1_e2_c4_se0.25",
    round_chs_fn=int, act_layer=nn.SiLU), (2, 2, 8, 8), found=0)
block("efficientnet, CondConv", "models._efficientnet_blocks.CondConvResidual", (2, 3, 4, 4), found=16, in_chs=3, out_chs=3,
    exp_ratio=1.0, num_experts=2)
block("efficientnet, ReLU", lambda: mobile(efficientnet.EfficientNet, "ds_r1_k3_s1_e1_c4", "ir_r1_k3_s1_e2_c4_se0.25",
    round_chs_fn=int), (2, 2, 8, 8), found=31)
block("efficientnet, edge residual", "models._efficientnet_blocks.EdgeResidual", (2, 4, 4, 4), found=8, in_chs=4, out_chs=4,
    exp_ratio=2.0)
block("efficientnet, inverted residual", "models._efficientnet_blocks.InvertedResidual", (2, 4, 4, 4), found=16, in_chs=4,
    out_chs=4, exp_ratio=2.0)
block("efficientnet, separable", "models._efficientnet_blocks.DepthwiseSeparableConv", (2, 4, 4, 4), found=4, in_chs=4,
    out_chs=4)
block("efficientvim", "EfficientViMBlock", (1, 4, 3, 3), found=26, dim=4, mlp_ratio=2.0, state_dim=3)
block("efficientvit_mit", "LiteMLA", (2, 4, 4, 4), found=28, in_channels=4, out_channels=4, heads=2, dim=2, scales=(3,))
block("efficientvit_msra", "EfficientVitBlock", (4, 4, 2, 2), found=26, missed=4, why=KEYS, dim=4, key_dim=2, num_heads=2,
    attn_ratio=1, resolution=2, window_resolution=2, kernels=[3, 3])
block("eva", "EvaBlock", (2, 5, 8), found=48, missed=8, why=ZEROS, dim=8, swiglu_mlp=True, scale_mlp=True, init_values=0.5,
    num_heads=2, mlp_ratio=1.0)
block("eva, post-norm", "EvaBlockPostNorm", (2, 5, 8), found=8, missed=8, why=ZEROS, dim=8, num_heads=2, mlp_ratio=1.0)
block("fasternet", "MLPBlock", (2, 4, 4, 4), found=14, dim=4, n_div=2, mlp_ratio=2.0, drop_path=0.0,
    layer_scale_init_value=0.5)
block("fastvit", "RepMixerBlock", (1, 4, 4, 4), found=12, dim=4, mlp_ratio=1.0)
block("focalnet", "FocalNetBlock", (1, 4, 4, 4), found=29, dim=4, focal_level=2, focal_window=3, mlp_ratio=1.0)
block("gcvit", "GlobalContextVitBlock", (1, 4, 4, 8), found=32, dim=8, feat_size=(4, 4), window_size=2, use_global=False,
    num_heads=2, mlp_ratio=1.0)
block("gemma4_vit", "Gemma4Block", (1, 3, 8), (1, 3, 4), (1, 3, 4), found=26, dim=8, num_heads=2, head_dim=4,
    intermediate_size=8, num_kv_heads=1)
block("gemma4_vit, clipped", "Gemma4GatedMlp", (2, 3, 4), found=0, missed=4,
    why="clamps at the values of buffers, which are not looked at", in_features=4, hidden_features=4,
    use_clipped_linears=True)
block("ghostnet", "GhostBottleneck", (2, 4, 4, 4), found=8, in_chs=4, mid_chs=4, out_chs=4, se_ratio=0.25)
block("hardcorenas", lambda: mobile(mobilenetv3.MobileNetV3, "ir_r1_k5_s1_e2_c4_nre_se0.25", "ir_r1_k3_s1_e1_c4_nre",
    "cn_r1_k1_s1_c6", features=5, round_chs_fn=int, act_layer=nn.Hardswish,
    se_layer=partial(Squeeze, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=int)), (2, 2, 8, 8), found=34)
block("hgnet", "HighPerfGpuBlock", (2, 4, 4, 4), found=11, in_chs=4, mid_chs=3, out_chs=4, layer_num=2, residual=True,
    light_block=True, use_lab=True)
block("hgnet, se", "HighPerfGpuBlock", (2, 4, 4, 4), found=8, in_chs=4, mid_chs=3, out_chs=4, layer_num=2, agg="se")
block("hiera", "HieraBlock", (1, 4, 8), found=32, dim=8, dim_out=8, heads=2, q_stride=1, use_expand_proj=False, mlp_ratio=1.0)
block("hieradet_sam2", "MultiScaleBlock", (1, 4, 4, 4), found=44, dim=4, dim_out=8, num_heads=2, mlp_ratio=1.0, q_stride=(2,
    2), window_size=2, init_values=0.5)
block("hrnet", lambda: hrnet.HighResolutionModule(2, resnet.BasicBlock, (1, 1), [2, 3], (2, 3), "SUM"), [(2, 2, 8, 8),
    (2, 3, 4, 4)], found=5)
block("iformer", "SHMABlock", (2, 4, 3, 3), found=6, missed=2, why=KEYS, dim=4, layer_scale_init_value=0.5)
block("iformer, conv", "ConvBlock", (1, 4, 3, 3), found=8, dim=4, kernel_size=3, ratio=2, layer_scale_init_value=0.5)
block("inception_next", "MetaNeXtBlock", (1, 8, 4, 4), found=16, dim=8, mlp_ratio=1.0)
block("inception_resnet_v2", "Mixed_5b", (2, 8, 4, 4), found=8, conv_block=narrow)
block("inception_v3", "InceptionA", (2, 3, 4, 4), found=8, in_channels=72, pool_features=48, conv_block=narrow)
block("inception_v4", "Mixed4a", (2, 6, 6, 6), found=8, conv_block=narrow)
block("lcnetv2", "RepDepthwiseSeparable", (2, 4, 4, 4), found=7, in_chs=4, out_chs=4, split_pw=True, use_rep=True,
    use_se=True, use_shortcut=True)
block("levit", "Attention", (2, 4, 8), found=8, missed=8, why=KEYS, dim=8, key_dim=4, num_heads=2, attn_ratio=1.0,
    resolution=(2, 2), use_conv=False)
block("lowformer", "LowFormerBlock", (1, 4, 4, 4), found=20, in_channels=4, expand_ratio=2, attn_mlp_ratio=2)
block("lowformer, fused", "LowFormerBlock", (1, 4, 4, 4), found=16, in_channels=4, expand_ratio=2, attn_mlp_ratio=2,
    fused_conv=True, att_stride=2)
block("mambaout", "GatedConvBlock", (1, 4, 4, 4), found=16, dim=4, expansion_ratio=2.0, kernel_size=3)
block("maxxvit", "MbConvBlock", (2, 4, 4, 4), found=4, in_chs=4, out_chs=4)
block("metaformer", "MetaFormerBlock", (2, 4, 4, 4), found=14, dim=4, layer_scale_init_value=0.5)
block("metaformer, Attention", lambda: metaformer.MetaFormerBlock(8, token_mixer=metaformer.Attention,
    norm_layer=metaformer.LayerNormNoBias, use_nchw=False, res_scale_init_value=0.5, head_dim=4), (1, 5, 8), found=34)
block("metaformer, SepConv", lambda: metaformer.MetaFormerBlock(4, token_mixer=metaformer.SepConv, layer_scale_init_value=0.5,
    res_scale_init_value=0.5, kernel_size=3, padding=1), (1, 4, 4, 4), found=28)
block("metaformer, head", "MlpHead", (4, 4), found=8, dim=4, num_classes=3, mlp_ratio=2)
block("mlp_mixer", "MixerBlock", (2, 5, 6), found=7, dim=6, seq_len=5, mlp_ratio=(1.0, 1.0))
block("mlp_mixer, ResMLP", "ResBlock", (2, 5, 6), found=14, dim=6, seq_len=5, mlp_ratio=2)
block("mlp_mixer, gMLP", "SpatialGatingBlock", (2, 5, 6), found=8, dim=6, seq_len=5, mlp_ratio=2)
block("mobilenetv3", lambda: mobile(mobilenetv3.MobileNetV3, "ds_r1_k3_s1_e1_c4_nre", "ir_r1_k3_s1_e2_c4_se0.25_nre",
    round_chs_fn=int, act_layer=nn.Hardswish, se_layer=partial(Squeeze, gate_layer="hard_sigmoid")), (2, 2, 8, 8), found=22)
block("mobilenetv3, mobile attention", "models._efficientnet_blocks.MobileAttention", (1, 4, 4, 4), found=12, in_chs=4,
    out_chs=4, num_heads=2, key_dim=2, value_dim=2, use_multi_query=True)
block("mobilenetv3, universal inverted", "models._efficientnet_blocks.UniversalInvertedResidual", (2, 4, 4, 4), found=24,
    in_chs=4, out_chs=4, dw_kernel_size_start=3, exp_ratio=2.0)
block("mobilenetv5", "MobileNetV5MultiScaleFusionAdapter", (2, 1, 2, 4, 4), found=4, in_chs=[2, 2], out_chs=4,
    output_resolution=2, layer_scale_init_value=0.5)
block("mobilevit", "MobileVitBlock", (1, 4, 4, 4), found=32, in_chs=4, transformer_dim=4, transformer_depth=1, patch_size=2,
    num_heads=2, mlp_ratio=1.0)
block("mobilevit, v2", "MobileVitV2Block", (1, 4, 4, 4), found=52, in_chs=4, transformer_depth=1, patch_size=2, mlp_ratio=1.0)
block("mvitv2", "MultiScaleBlock", (1, 10, 8), [3, 3], found=20, dim=8, dim_out=8, feat_size=(3, 3), kernel_q=(3, 3),
    kernel_kv=(3, 3), num_heads=2, mlp_ratio=1.0)
block("mvitv2, stride", "MultiScaleBlock", (1, 16, 4), [4, 4], found=28, dim=4, dim_out=8, feat_size=(4, 4), kernel_q=(3, 3),
    kernel_kv=(3, 3), stride_q=(2, 2), stride_kv=(2, 2), expand_attn=True, has_cls_token=False, num_heads=2, mlp_ratio=1.0)
block("naflexvit", "NaFlexVit", (1, 1, 4, 4), found=40, in_chans=1, num_classes=3, pos_embed_grid_size=(2, 2), patch_size=2,
    embed_dim=8, depth=1, global_pool="avg", num_heads=2, mlp_ratio=1.0)
block("naflexvit, map", "NaFlexVit", (1, 1, 4, 4), found=36, in_chans=1, num_classes=3, pos_embed_grid_size=(2, 2),
    patch_size=2, embed_dim=4, depth=1, num_heads=2, mlp_ratio=1.0, global_pool="map")
block("naflexvit, rope", "NaFlexVit", (1, 1, 4, 4), found=44, in_chans=1, num_classes=3, pos_embed_grid_size=(2, 2),
    patch_size=2, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.0, global_pool="avg", pos_embed="none", rope_type="mixed",
    attn_gated=True, swiglu_mlp=True)
block("nasnet", "FirstCell", (2, 2, 4, 4), (2, 2, 8, 8), found=30, in_chs_left=2, out_chs_left=1, in_chs_right=2,
    out_chs_right=2)
block("nest", "TransformerLayer", (1, 2, 4, 8), found=32, dim=8, num_heads=2, mlp_ratio=1.0)
block("nextvit", "NextConvBlock", (2, 4, 4, 4), found=12, in_chs=4, out_chs=4, head_dim=2, mlp_ratio=1.0)
block("nextvit, attention", "EfficientAttention", (1, 16, 8), found=24, dim=8, head_dim=4, sr_ratio=2)
block("nfnet", "NormFreeBlock", (2, 4, 4, 4), found=3, in_chs=4, bottle_ratio=1.0, skipinit=True, act_layer=nn.ReLU)
block("pit", "PoolingVisionTransformer", (1, 1, 6, 6), found=56, img_size=6, patch_size=2, stride=2, base_dims=(4, 4),
    depth=(1, 1), heads=(1, 2), num_classes=3, in_chans=1, mlp_ratio=1.0)
block("pnasnet", "Cell", (2, 2, 4, 4), (2, 2, 4, 4), found=36, in_chs_left=2, out_chs_left=2, in_chs_right=2, out_chs_right=2)
block("pvt_v2", "Block", (1, 16, 8), [4, 4], found=48, dim=8, sr_ratio=2, num_heads=2, mlp_ratio=1.0)
block("pvt_v2, linear", "Block", (1, 9, 8), [3, 3], found=40, dim=8, linear_attn=True, num_heads=2, mlp_ratio=1.0)
block("qwen3_vit", "Qwen3VitEncoder", (1, 1, 4, 4), found=18, img_size=4, patch_size=1, in_chans=1, out_features=3,
    embed_dim=4, depth=1, num_heads=1, pos_embed_grid_size=4, mlp_ratio=1.0)
block("rdnet", "RDNet", (1, 1, 8, 8), found=22, in_chans=1, num_classes=3, growth_rates=(2,), num_blocks_list=(2,),
    block_type=("BlockESE",), is_downsample_block=(None,), bottleneck_width_ratio=2.0, patch_size=2, num_init_features=4)
block("regnet", "Bottleneck", (2, 4, 4, 4), found=10, in_chs=4, out_chs=4, bottle_ratio=1, group_size=2, se_ratio=0.5)
block("repghost", "RepGhostBottleneck", (2, 4, 4, 4), found=8, in_chs=4, mid_chs=4, out_chs=4, se_ratio=0.25)
block("repvit", "RepViTBlock", (2, 4, 4, 4), found=8, in_dim=4, mlp_ratio=2, kernel_size=3, use_se=True, act_layer=nn.GELU)
block("res2net", "Bottle2neck", (2, 8, 4, 4), found=8, inplanes=8, planes=2, base_width=64, scale=3,
    norm_layer=nn.BatchNorm2d)
block("resnest", "ResNestBottleneck", (2, 8, 4, 4), found=36, inplanes=8, planes=2, radix=2)
block("resnet", "BasicBlock", (2, 4, 4, 4), found=4, inplanes=4, planes=4)
block("resnetv2", "ResNetV2", (2, 1, 16, 16), found=8, layers=[1], channels=(8,), num_classes=2, in_chans=1, stem_chs=8,
    act_layer="relu", norm_layer="batchnorm2d")
block("rexnet", "LinearBottleneck", (32, 3, 24, 24), found=3, in_chs=3, out_chs=4, stride=1, exp_ratio=2.0, se_ratio=0.5)
block("rexnet, ReLU", "LinearBottleneck", (2, 4, 4, 4), found=12, in_chs=4, out_chs=5, stride=1, exp_ratio=2.0, se_ratio=0.5,
    dw_act_layer="relu")
block("selecsls", "SelecSlsBlock", (2, 4, 4, 4), found=16, in_chs=4, skip_chs=0, mid_chs=4, out_chs=4, is_first=True,
    stride=1)
block("senet", "SEBottleneck", (2, 8, 4, 4), found=14, inplanes=8, planes=2, groups=2, reduction=4)
block("sequencer", "Sequencer2dBlock", (1, 3, 3, 4), found=8, dim=4, hidden_size=2, mlp_ratio=1.0)
block("shvit", "SHSA", (1, 8, 3, 3), found=10, missed=2, why=KEYS, dim=8, qk_dim=2, pdim=4)
block("shvit, merging", "PatchMerging", (2, 2, 4, 4), found=24, dim=2, out_dim=4)
block("sknet", "SelectiveKernelBasic", (2, 4, 4, 4), found=12, inplanes=4, planes=4)
block("starnet", "Block", (2, 4, 8, 8), found=16, dim=4, mlp_ratio=2)
block("swiftformer", "Block", (1, 6, 3, 3), found=30, missed=3, why=f"queries, keys and scores of tokens are {EPS}", dim=6,
    mlp_ratio=1.0)
block("swiftformer, convolution", "ConvEncoder", (2, 4, 4, 4), found=8, dim=4, hidden_dim=6)
block("swin_transformer", "SwinTransformerBlock", (1, 4, 4, 8), found=32, dim=8, shift_size=1, input_resolution=(4, 4),
    num_heads=2, window_size=2, mlp_ratio=1.0)
block("swin_transformer_v2", "WindowAttention", (2, 4, 4), found=516, missed=2, why=f"queries and keys are {EPS}; {ZEROS}",
    dim=4, window_size=(2, 2), num_heads=1)
block("swin_transformer_v2_cr", "WindowMultiHeadAttention", (2, 4, 8), found=16, missed=4, why=f"queries and keys are {EPS}",
    dim=8, num_heads=2, window_size=(2, 2), meta_hidden_dim=8)
block("tiny_vit", "TinyVitBlock", (1, 4, 4, 8), found=32, dim=8, window_size=2, num_heads=2, mlp_ratio=1.0)
block("tnt", "Block", (2, 4, 4), (1, 3, 4), found=48, dim=4, dim_out=4, num_pixel=4, num_heads_in=2, num_heads_out=2,
    mlp_ratio=1.0)
block("tresnet", "Bottleneck", (2, 8, 4, 4), found=68, inplanes=8, planes=2)
block("twins", "Block", (1, 16, 8), [4, 4], found=32, dim=8, ws=2, num_heads=2, mlp_ratio=1.0)
block("twins, global", "Block", (1, 16, 8), [4, 4], found=40, dim=8, ws=1, sr_ratio=2, num_heads=2, mlp_ratio=1.0)
block("vgg", "ConvMlp", (2, 4, 4, 4), found=6, in_features=4, out_features=6, kernel_size=3)
block("visformer", "Block", (1, 8, 3, 3), found=32, dim=8, group=8, spatial_conv=True, num_heads=2, mlp_ratio=1.0)
block("vision_transformer", "Block", (2, 5, 8), found=32, dim=8, num_heads=2, mlp_ratio=1.0)
block("vision_transformer, QK norm", "Block", (2, 5, 8), found=44, dim=8, qkv_bias=True, qk_norm=True, init_values=0.5,
    num_heads=2, mlp_ratio=1.0)
block("vision_transformer, parallel", "ParallelScalingBlock", (2, 5, 8), found=32, dim=8, init_values=0.5, num_heads=2,
    mlp_ratio=1.0)
block("vision_transformer_hybrid", "ConvStem", (2, 2, 4, 4), found=8, in_chans=2, depth=3, channels=(4, 4, 6), stride=(1, 1,
    2))
block("vision_transformer_relpos", "VisionTransformerRelPos", (1, 1, 4, 4), found=62, img_size=4, patch_size=2, in_chans=1,
    num_classes=3, embed_dim=8, depth=1, rel_pos_dim=6, num_heads=2, mlp_ratio=1.0)
block("vision_transformer_relpos, post-norm", "ResPostRelPosBlock", (2, 5, 8), (2, 2, 5, 5), found=16, dim=8, qkv_bias=True,
    num_heads=2, mlp_ratio=1.0)
block("vision_transformer_relpos, table", "VisionTransformerRelPos", (1, 1, 4, 4), found=56, img_size=4, patch_size=2,
    in_chans=1, num_classes=3, embed_dim=8, depth=1, rel_pos_type="bias", num_heads=2, mlp_ratio=1.0)
block("vision_transformer_sam", "Block", (1, 4, 4, 8), found=28, dim=8, use_rel_pos=True, window_size=2, input_size=(4, 4),
    num_heads=2, mlp_ratio=1.0)
block("vitamin", "MbConvLNBlock", (1, 4, 4, 4), found=4, in_chs=4, out_chs=4, expand_ratio=2.0)
block("vitamin, GeGLU", "GeGluMlp", (2, 5, 6), found=14, in_features=6, hidden_features=8)
block("volo", "Outlooker", (1, 4, 4, 4), found=12, dim=4, kernel_size=3, padding=1, stride=1, num_heads=2, mlp_ratio=1.0)
block("vovnet", "OsaBlock", (2, 4, 4, 4), found=6, in_chs=4, mid_chs=3, out_chs=4, layer_per_block=2, residual=True,
    attn="ese")
block("xception", "Block", (2, 4, 4, 4), found=14, in_channels=4, out_channels=5, reps=2)
block("xception_aligned", "XceptionModule", (2, 4, 4, 4), found=20, in_chs=4, out_chs=4, norm_layer=nn.BatchNorm2d)
block("xception_aligned, pre-activation", "PreXceptionModule", (2, 4, 4, 4), found=20, in_chs=4, out_chs=4,
    norm_layer=nn.BatchNorm2d)
block("xcit", "XCABlock", (1, 9, 8), 3, 3, found=58, missed=16, why=f"queries and keys are {EPS}", dim=8, eta=1.0,
    num_heads=2, mlp_ratio=1.0)

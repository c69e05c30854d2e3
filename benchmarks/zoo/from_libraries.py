"""Small models of libraries beside timm, torchvision and transformers: diffusion, segmentation, detection, graphs, sound.

What is not installed is left out. The page was made with diffusers 0.42, segmentation_models_pytorch 0.6, open_clip 3.3,
ultralytics 8.4, monai 1.6, torch_geometric 2.8, torchaudio 2.11, speechbrain 1.1, x-transformers 2.31, vit-pytorch 1.26,
and denoising-diffusion-pytorch 2.3.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, randn

from zoo.from_torchvision import declare_operators

Inputs = tuple[Any, ...]
BUILDERS: dict[str, Callable[[], tuple[nn.Module, Inputs, dict[str, Any]]]] = {}
UNET = {"block_out_channels": (32, 64), "layers_per_block": 1}
CROSS = {"cross_attention_dim": 32, "attention_head_dim": 8}
AUTOENCODER = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "heads": 2, "mlp_dim": 64}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
STAGES = [f"s{stage}" for stage in range(1, 5)]


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 12))


def steps() -> Tensor:
    return torch.tensor([3, 7])


def enter(path: str, *args: Any, inputs: Callable[[], Inputs], title: str = "", given: Any = None, **options: Any) -> None:
    """Enter a model by the path of its class; `given` are further inputs by name."""
    library, _, name = path.partition(".")

    def build() -> tuple[nn.Module, Inputs, dict[str, Any]]:
        module, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(module), attribute)(*args, **options), inputs(), {**(given() if given else {})}

    BUILDERS[f"{library} {title or name.rpartition('.')[2]}"] = build


def names() -> list[str]:
    """Models of the libraries that are installed."""
    declare_operators()
    return [name for name in BUILDERS if importlib.util.find_spec(name.partition(" ")[0]) is not None]


def family(name: str) -> str:
    """Each is one of its own."""
    return name


def build(name: str) -> tuple[nn.Module, Inputs, dict[str, Any]]:
    """A model and inputs for it; on the CPU, since some read numbers while they are built."""
    declare_operators()
    with torch.device("cpu"):
        return BUILDERS[name]()


# ------------------------------------------------------------------------------------------------------------------- diffusion
def diffusers(name: str, inputs: Callable[[], Inputs], given: Callable[[], dict[str, Any]] = dict, **options: Any) -> None:
    enter(f"diffusers.{name}", inputs=inputs, given=lambda: {"return_dict": False, **given()}, **options)


DOWN_UP = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSS_DOWN = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
CROSS_UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
diffusers("UNet2DModel", lambda: (randn(2, 3, 16, 16), steps()), sample_size=16, **UNET, **DOWN_UP)
diffusers(
    "UNet2DConditionModel",
    lambda: (randn(2, 4, 16, 16), steps(), randn(2, 5, 32)),
    sample_size=16,
    **(UNET | CROSS | CROSS_DOWN | CROSS_UP),
)
diffusers(
    "ControlNetModel",
    lambda: (randn(2, 4, 16, 16), steps(), randn(2, 5, 32), randn(2, 3, 32, 32)),
    conditioning_embedding_out_channels=(16, 32),
    **(UNET | CROSS | CROSS_DOWN),
)
diffusers(
    "UNet1DModel",
    lambda: (randn(2, 2, 512), steps()),
    block_out_channels=(32, 32, 64),
    extra_in_channels=64,
    sample_size=512,
)
diffusers("AutoencoderKL", lambda: (randn(2, 3, 16, 16),), sample_size=16, **AUTOENCODER)
diffusers("VQModel", lambda: (randn(2, 3, 16, 16),), num_vq_embeddings=16, **AUTOENCODER)
diffusers(
    "DiTTransformer2DModel",
    lambda: (randn(2, 4, 8, 8), steps(), torch.tensor([1, 2])),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
)
diffusers(
    "FluxTransformer2DModel",
    tuple,
    lambda: {
        "hidden_states": randn(1, 16, 4),
        "encoder_hidden_states": randn(1, 6, 32),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": randn(16, 3),
        "txt_ids": torch.zeros(6, 3),
    },
    patch_size=1,
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=[4, 4, 8],
)
diffusers(
    "SD3Transformer2DModel",
    tuple,
    lambda: {
        "hidden_states": randn(1, 4, 8, 8),
        "encoder_hidden_states": randn(1, 6, 32),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([5.0]),
    },
    sample_size=8,
    patch_size=1,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    out_channels=4,
    num_attention_heads=4,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=32,
)
enter(
    "denoising_diffusion_pytorch.Unet",
    inputs=lambda: (randn(2, 3, 16, 16), steps()),
    dim=16,
    dim_mults=(1, 2),
    flash_attn=False,
)

# -------------------------------------------------------------------------------------------------- segmentation, detection
for architecture, encoder in {
    "Unet": "resnet18",
    "UnetPlusPlus": "resnet18",
    "MAnet": "resnet18",
    "Segformer": "resnet18",
    "UPerNet": "resnet18",
    "FPN": "vgg11_bn",
    "DeepLabV3Plus": "mobilenet_v2",
    "PAN": "resnet18",
}.items():
    size = 128 if architecture == "PAN" else 64
    enter(
        f"segmentation_models_pytorch.{architecture}",
        encoder,
        inputs=lambda size=size: (randn(1, 3, size, size),),
        title=f"{architecture} of {encoder}",
        encoder_weights=None,
        classes=3,
    )
for name in ("yolov5n", "yolov8n", "yolo11n"):
    enter(
        *("ultralytics.nn.tasks.DetectionModel", f"{name}.yaml"),
        inputs=lambda: (randn(1, 3, 64, 64),),
        title=name,
        nc=3,
        verbose=False,
    )
FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
SOLID = {**FLAT, "spatial_dims": 3}
RESIDUAL = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}


def monai(name: str, *args: Any, size: int = 16, axes: int = 2, title: str = "", **options: Any) -> None:
    enter(f"monai.networks.nets.{name}", *args, inputs=lambda: (randn(1, 1, *[size] * axes),), title=title, **options)


monai("UNet", axes=3, **SOLID, **RESIDUAL)
monai("UNet", title="UNet, ReLU, batch norm", act="RELU", norm="BATCH", **FLAT, **RESIDUAL)
monai("AttentionUnet", **FLAT, channels=(8, 16, 32), strides=(2, 2))
monai("DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32])
monai("SegResNet", axes=3, **SOLID, init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
monai("VNet", size=32, axes=3)
monai("UNETR", 1, 2, (32, 32, 32), 8, 48, 64, 4, size=32, axes=3)
monai("SwinUNETR", size=64, **FLAT, feature_size=12)
monai("DenseNet", 2, 1, 3, size=32, init_features=8, growth_rate=4, block_config=(2, 2))

# ----------------------------------------------------------------------------------------------------------------------- graphs
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])
for name in ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN"):
    options = {
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([0, 2, 3, 1]),
    }
    enter(
        *(f"torch_geometric.nn.{name}", 8, 16, 2, 4),
        inputs=lambda: (randn(6, 8), EDGES.clone()),
        **(options if name == "PNA" else {}),
    )
enter(
    *("torch_geometric.nn.GAT", 8, 16, 2, 4),
    inputs=lambda: (randn(6, 8), EDGES.clone()),
    title="GATv2, batch norm",
    v2=True,
    norm="batch_norm",
    jk="cat",
)

# ---------------------------------------------------------------------------------------------------- text, images, sound
SMALL_VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
SMALL_RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
for title, vision in {"CLIP of a ViT": SMALL_VIT, "CLIP of a ResNet": SMALL_RESNET}.items():
    enter(
        "open_clip.CLIP",
        inputs=lambda size=vision["image_size"]: (randn(2, 3, size, size), tokens()),
        title=title,
        embed_dim=32,
        vision_cfg=vision,
        text_cfg=TEXT,
    )


def x_transformers(title: str, layers: str, **options: Any) -> None:
    def build() -> tuple[nn.Module, Inputs, dict[str, Any]]:
        found = importlib.import_module("x_transformers")
        stack = getattr(found, layers)(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
        return found.TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=stack), (tokens(),), {}

    BUILDERS[f"x_transformers {title}"] = build


x_transformers("Decoder", "Decoder")
x_transformers(
    "Decoder, squared ReLU, RMS norm, rotary", "Decoder", ff_relu_squared=True, use_rmsnorm=True, rotary_pos_emb=True
)
x_transformers("Encoder, GLU, talking heads", "Encoder", ff_glu=True, attn_pre_talking_heads=True, alibi_pos_bias=True)
x_transformers("Decoder, macaron, gated residuals", "Decoder", attn_kv_heads=2, macaron=True, gate_residual=True)


def vit(module: str, name: str, size: int = 32, **options: Any) -> None:
    enter(f"vit_pytorch.{module}.{name}", inputs=lambda: (randn(2, 3, size, size),), title=module, **options)


vit("simple_vit", "SimpleViT", **VIT, depth=2)
vit("cait", "CaiT", **VIT, depth=1, cls_depth=1)
vit("xcit", "XCiT", **VIT, depth=1, cls_depth=1)
vit("deepvit", "DeepViT", **VIT, depth=1)
vit("rvt", "RvT", **VIT, depth=1)
CVT = {f"{s}_{key}": value for s in STAGES[:3] for key, value in (("emb_dim", 16), ("depth", 1), ("heads", 1))}
vit("cvt", "CvT", num_classes=5, **CVT)
TWINS = {"s1_local_patch_size": 4, "s2_local_patch_size": 4, "s3_local_patch_size": 2, "num_classes": 5}
TWINS |= {f"{s}_{key}": value for s in STAGES for key, value in (("emb_dim", 16), ("depth", 1), ("global_k", 2))}
vit("twins_svt", "TwinsSVT", 64, **TWINS)
vit("levit", "LeViT", 64, image_size=64, num_classes=5, stages=2, dim=(16, 32), depth=1, heads=(2, 2), mlp_mult=2)
vit("max_vit", "MaxViT", num_classes=5, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4)
MOBILE = {"dims": [16, 20, 24], "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64], "num_classes": 5}
vit("mobile_vit", "MobileViT", 64, image_size=(64, 64), **MOBILE)
CROSSED = {"dim": (32, 32, 32, 64), "depth": (1, 1, 1, 1), "global_window_size": (2, 2, 1, 1), "local_window_size": 2}
vit("crossformer", "CrossFormer", 64, num_classes=5, **CROSSED)
vit("regionvit", "RegionViT", 64, num_classes=5, dim=(8, 16, 32, 64), depth=(1, 1, 1, 1), window_size=2)
vit("nest", "NesT", image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=5)
TAS = {"enc_num_feats": 16, "msk_num_feats": 8, "msk_num_hidden_feats": 16, "msk_num_layers": 2, "msk_num_stacks": 1}
enter("torchaudio.models.ConvTasNet", inputs=lambda: (randn(2, 1, 64),), num_sources=2, enc_kernel_size=4, **TAS)
enter("torchaudio.models.HDemucs", inputs=lambda: (randn(1, 2, 4096),), sources=["a", "b"], channels=8, depth=3, nfft=256)
enter("torchaudio.models.DeepSpeech", 16, inputs=lambda: (randn(2, 1, 10, 16),), n_hidden=32, n_class=7)
WAVE = {"upsample_scales": [2, 2], "hop_length": 4, "n_freq": 10, "n_classes": 8, "n_res_block": 1, "n_fc": 16, "n_rnn": 16}
enter("torchaudio.models.WaveRNN", inputs=lambda: (randn(2, 1, 24), randn(2, 1, 10, 10)), n_hidden=16, n_output=16, **WAVE)
enter("torchaudio.models.Conformer", 16, 2, 32, 2, 7, inputs=lambda: (randn(2, 10, 16), torch.tensor([10, 8])))
ECAPA = {"lin_neurons": 16, "channels": [32, 32, 32, 32, 96], "attention_channels": 8, "se_channels": 8, "res2net_scale": 4}
enter("speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN", 16, inputs=lambda: (randn(2, 20, 16),), **ECAPA)
CRDNN = {"cnn_channels": (8, 8), "rnn_layers": 1, "rnn_neurons": 16, "dnn_neurons": 16}
enter("speechbrain.lobes.models.CRDNN.CRDNN", inputs=lambda: (randn(2, 12, 16),), input_shape=[None, None, 16], **CRDNN)

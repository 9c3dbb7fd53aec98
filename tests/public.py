"""Public architectures at their smallest, and what their per-sample gradients are held against.

Networks of torchvision, timm, transformers and peft, built from configurations with random weights, and nets of torch's
own layers. As a program it prints one line for each: `python tests/public.py [name or part of one …]`.
"""

import copy
import dataclasses
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from functorch_mnist import models, per_sample

B, CLASSES, VOCABULARY, LENGTH = 3, 5, 50, 7
D = torch.float64
LENGTHS = (LENGTH, 5, 3)
"""Tokens of each example before its padding."""


class Case(NamedTuple):
    """A module, a batch of its inputs, and the loss of its output for one example."""

    module: nn.Module
    loss_fn: Callable[[object, Tensor], Tensor]
    """`loss_fn(output, target) -> ()`, both without a batch axis."""
    targets: Tensor
    args: tuple[Tensor, ...]
    named: dict[str, Tensor] = {}  # noqa: RUF012


def normals(*shape, seed=1):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=1, low=3, high=VOCABULARY):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# Losses of one output


def classified(output, y):
    return F.cross_entropy(output, y)


def segmented(output, y):
    return F.cross_entropy(output.flatten(1).mT, y.flatten())


def modelled(output, y):
    """Cross-entropy of the logits of a class, or of those of the tokens that are not -100."""
    return F.cross_entropy(output.logits, y)


def projected(output, y):
    """The square of a fixed combination of all numbers."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])
    return (flat @ torch.arange(1, flat.numel() + 1, dtype=flat.dtype).sin()).square()


# Cases of one form


def image(module, side=32):
    """A classifier of images."""
    return Case(module, classified, torch.arange(B) % CLASSES, (normals(B, 3, side, side),))


def padded(pad):
    """Token ids with padding to the right, and their mask."""
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": torch.where(mask, tokens(B, LENGTH), pad), "attention_mask": mask.long()}


def text(module, pad=0):
    """A classifier of sequences."""
    return Case(module, modelled, torch.arange(B) % CLASSES, (), padded(pad))


def language(module, pad=0):
    """A causal language model: each token is to be followed by the next."""
    named = padded(pad)
    ids, mask = named["input_ids"], named["attention_mask"].bool()
    targets = torch.where(mask, ids, -100).roll(-1, 1)
    targets[:, -1] = -100
    return Case(module, modelled, targets, (), named)


def thin(module, factor):
    """The convolutional network, which may be on the meta device, with all its widths divided."""

    def narrow(width):
        return width if width in (3, CLASSES) else width // factor

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = narrow(layer.in_channels), narrow(layer.out_channels)
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            layer.in_features, layer.out_features = narrow(layer.in_features), narrow(layer.out_features)
            shape = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = narrow(layer.num_features)
            shape = (layer.num_features,)
            layer.running_mean, layer.running_var = torch.zeros(shape), torch.ones(shape)
            layer.num_batches_tracked = torch.tensor(0)
        else:
            continue
        layer.weight = nn.Parameter(torch.empty(shape))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(shape[0]))
        layer.reset_parameters()
    return module


# torchvision


def vision(name, factor=1, side=32, **options):
    from torchvision import models as vision_models

    with torch.device("meta"):
        net = getattr(vision_models, name)(weights=None, num_classes=CLASSES, **options)
    return image(thin(net, factor), side)


def vision_convnext():
    from torchvision.models import convnext

    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, 24, 1), convnext.CNBlockConfig(24, None, 2)]
    return image(convnext.ConvNeXt(blocks, num_classes=CLASSES))


def vision_densenet():
    from torchvision.models import DenseNet

    return image(DenseNet(4, (2, 2, 2, 2), 8, num_classes=CLASSES))


def vision_efficientnet():
    from torchvision.models import efficientnet

    block = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 1, 8, 8, 1), block(6, 3, 2, 8, 16, 2), block(6, 5, 2, 16, 24, 1)]
    return image(efficientnet.EfficientNet(blocks, 0.2, num_classes=CLASSES))


def vision_efficientnet_v2():
    from torchvision.models import efficientnet

    blocks = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 2),
        efficientnet.MBConvConfig(4, 3, 2, 16, 24, 1),
    ]
    return image(efficientnet.EfficientNet(blocks, 0.2, num_classes=CLASSES, last_channel=64))


def vision_maxvit():
    from torchvision.models import MaxVit

    return image(MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.2, num_classes=CLASSES))


def vision_mnasnet():
    from torchvision.models import MNASNet

    return image(MNASNet(0.1, num_classes=CLASSES))


def vision_mobilenet_v2():
    from torchvision.models import MobileNetV2

    blocks = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 1]]  # expansion, width, number, stride
    return image(MobileNetV2(CLASSES, 0.25, blocks))


def vision_mobilenet_v3():
    from torchvision.models import mobilenetv3

    block = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(8, 3, 8, 8, True, "RE", 2),
        block(8, 3, 24, 16, False, "RE", 2),
        block(16, 5, 32, 16, True, "HS", 1),
    ]
    return image(mobilenetv3.MobileNetV3(blocks, 64, num_classes=CLASSES))


def vision_regnet():
    from torchvision.models import regnet

    blocks = regnet.BlockParams.from_init_params(depth=5, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.5)
    return image(regnet.RegNet(blocks, num_classes=CLASSES, stem_width=8))


def vision_resnext():
    from torchvision.models import resnet

    with torch.device("meta"):
        net = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=2, width_per_group=16)
    return image(thin(net, 8))


def vision_shufflenet():
    from torchvision.models import ShuffleNetV2

    return image(ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=CLASSES))


def vision_swin(version):
    from torchvision.models import swin_transformer as swin

    options = {1: {}, 2: {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}}[version]
    net = swin.SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=CLASSES, **options)
    return image(net)


def vision_vit():
    from torchvision.models import VisionTransformer

    return image(VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=CLASSES), 16)


# timm


def timm_net(name, side=32, **options):
    import timm

    return image(timm.create_model(name, num_classes=CLASSES, **options), side)


def timm_nfnet():
    from timm.models import nfnet

    shape = nfnet.NfCfg(depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_type="3x3", stem_chs=8)
    shape = dataclasses.replace(shape, attn_layer="se", attn_kwargs={"rd_ratio": 0.5}, num_features=32)
    return image(nfnet.NormFreeNet(shape, num_classes=CLASSES))


def timm_mixer(block):
    from timm.models import mlp_mixer

    shape = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
    options = {"block_layer": getattr(mlp_mixer, block)}
    if block == "ResBlock":
        options |= {"norm_layer": mlp_mixer.Affine, "mlp_ratio": 4}
    return image(mlp_mixer.MlpMixer(num_classes=CLASSES, **shape, **options))


def timm_resnetv2():
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    options = {"conv_layer": partial(StdConv2d, eps=1e-8), "norm_layer": partial(GroupNormAct, num_groups=4)}
    return image(ResNetV2((1, 1, 1, 1), (16, 32, 32, 64), CLASSES, stem_chs=16, **options))


def timm_poolformer():
    from timm.models import metaformer

    options = {"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "norm_layers": metaformer.GroupNorm1}
    options |= {"layer_scale_init_values": 1e-5, "res_scale_init_values": None, "use_mlp_head": False}
    return image(metaformer.MetaFormer(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **options))


def timm_nest():
    from timm.models.nest import Nest

    return image(Nest(32, 3, 4, 2, (16, 32), (2, 2), (1, 1), num_classes=CLASSES))


# transformers

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}


def hf(model, config, **options):
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def encoder(name, pad=0, **options):
    options = {**LAYERS, **WIDTHS, "max_position_embeddings": 16, "num_labels": CLASSES, **options}
    return text(hf(f"{name}ForSequenceClassification", f"{name}Config", **options), pad)


def decoder(name, **options):
    options = {
        **LAYERS,
        **WIDTHS,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 16,
        **options,
    }
    return language(hf(f"{name}ForCausalLM", f"{name}Config", **options))


def gpt2():
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return hf("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, **shape)


def hf_bloom():
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    return language(hf("BloomForCausalLM", "BloomConfig", **shape))


def hf_t5():
    shape = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    net = hf("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **shape)
    return Case(net, modelled, tokens(B, 4, seed=3), (), padded(0) | {"decoder_input_ids": tokens(B, 4, seed=2)})


def hf_vit():
    shape = {"hidden_size": 16, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_labels": CLASSES}
    net = hf("ViTForImageClassification", "ViTConfig", **LAYERS, **shape)
    return Case(net, modelled, torch.arange(B) % CLASSES, (), {"pixel_values": normals(B, 3, 16, 16)})


def hf_wav2vec2():
    shape = {"hidden_size": 16, "intermediate_size": 32, "conv_dim": (8, 8), "conv_stride": (5, 2)}
    shape |= {"conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8}
    shape |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_labels": CLASSES}
    net = hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **LAYERS, **shape)
    mask = torch.arange(200) < torch.tensor([200, 150, 90])[:, None]
    named = {"input_values": normals(B, 200) * mask, "attention_mask": mask.long()}
    return Case(net, modelled, torch.arange(B) % CLASSES, (), named)


def hf_mamba():
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    return language(hf("MambaForCausalLM", "MambaConfig", **shape))


def hf_whisper():
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "vocab_size": VOCABULARY}
    shape |= {"max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1}
    net = hf(
        "WhisperForConditionalGeneration", "WhisperConfig", pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape
    )
    named = {"input_features": normals(B, 8, 20), "decoder_input_ids": tokens(B, 4, seed=2)}
    return Case(net, modelled, tokens(B, 4, seed=3), (), named)


# peft


def lora(module, make_case, targets, **options):
    """The module with adapters, the only parameters that are trained, neither factor zero."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return make_case(peft.get_peft_model(module, config))


# torch's own layers


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.embed, self.encoder = nn.Embedding(VOCABULARY, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids, padding):
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1))


def torch_encoder():
    ids = padded(0)["input_ids"]
    return Case(Encoder(), classified, torch.arange(B) % CLASSES, (ids, ids == 0))


def torch_transformer():
    net = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    return Case(net, projected, torch.zeros(B), (normals(B, 6, 8), normals(B, 5, 8, seed=2)))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.cells = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 8), CLASSES)

    def forward(self, ids):
        return self.head(self.cells(self.embed(ids))[0].mean(1))


def recurrent(kind, **options):
    return Case(Recurrent(kind, **options), classified, torch.arange(B) % CLASSES, (tokens(B, LENGTH),))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4, add_bias_kv=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, query, key, value):
        attended, weights = self.attention(query, key, value)
        return {"logits": self.head(self.norm(query + attended).mean(1)), "weights": weights}


def torch_attention():
    inputs = (normals(B, 5, 8), normals(B, 6, 6, seed=2), normals(B, 6, 4, seed=3))
    return Case(Attention(), projected, torch.zeros(B), inputs)


def convolutions(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.bottom = convolutions(1, 4), convolutions(4, 8), convolutions(8, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.left2, self.left1, self.head = convolutions(16, 8), convolutions(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        b = self.left2(torch.cat([b, self.up2(c)], 1))
        return self.head(self.left1(torch.cat([a, self.up1(b)], 1)))


def torch_unet():
    return Case(UNet(), segmented, tokens(B, 8, 8, low=0, high=2), (normals(B, 1, 8, 8),))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch * 2, -1, height * width).mT.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.mT.reshape(batch, channels, height, width))


class Diffusion(nn.Module):
    """Predicts the noise of an image at a time step."""

    def __init__(self, width=8):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.stem, self.down = nn.Conv2d(3, width, 3, padding=1), Residual(width, 2 * width, 2 * width)
        self.pool = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.middle, self.attention = Residual(2 * width, 2 * width, 2 * width), SelfAttention(2 * width)
        self.up = Residual(4 * width, width, 2 * width)
        self.head = nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x, step):
        half = self.stem.out_channels // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angles = step[:, None] * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        skip = self.down(self.stem(x), time)
        h = self.attention(self.middle(self.pool(skip), time))
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.head(self.up(torch.cat([h, skip], 1), time))


def torch_diffusion():
    steps = torch.tensor([1, 30, 900])
    return Case(
        Diffusion(), lambda noise, y: F.mse_loss(noise, y), normals(B, 3, 8, 8, seed=2), (normals(B, 3, 8, 8), steps)
    )


class Recommender(nn.Module):
    """Features and bags of categories, the inner products of their embeddings, a score."""

    def __init__(self, tables=3, width=4):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, width), nn.ReLU())
        self.tables = nn.ModuleList(nn.EmbeddingBag(10 + i, width, mode="sum") for i in range(tables))
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, features, categories):
        x = self.bottom(features)
        z = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        rows, columns = torch.tril_indices(z.shape[1], z.shape[1], -1)
        return self.top(torch.cat([x, (z @ z.mT)[:, rows, columns]], 1)).squeeze(1)


def torch_recommender():
    inputs = (normals(B, 6), tokens(B, 3, 4, low=0, high=10))
    return Case(Recommender(), F.binary_cross_entropy_with_logits, torch.tensor([0.0, 1.0, 1.0], dtype=D), inputs)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 3)
        self.score = nn.Bilinear(4, 3, CLASSES)

    def forward(self, x, y):
        return self.score(self.left(x).tanh(), self.right(y).tanh())


def torch_bilinear():
    return Case(Bilinear(), classified, torch.arange(B) % CLASSES, (normals(B, 6), normals(B, 5, seed=2)))


def torch_weight_norm():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(144, 8)), nn.Tanh(), nn.Linear(8, CLASSES),
    )  # fmt: skip
    return image(net, 8)


TABLE: dict[str, Callable[[], Case]] = {
    "torch/transformer": torch_transformer,
    "torch/transformer_encoder": torch_encoder,
    "torch/lstm": partial(recurrent, nn.LSTM),
    "torch/lstm_projected": partial(recurrent, nn.LSTM, proj_size=4),
    "torch/gru": partial(recurrent, nn.GRU),
    "torch/rnn": partial(recurrent, nn.RNN),
    "torch/multihead_attention": torch_attention,
    "torch/unet": torch_unet,
    "torch/diffusion_unet": torch_diffusion,
    "torch/dlrm": torch_recommender,
    "torch/bilinear": torch_bilinear,
    "torch/weight_norm": torch_weight_norm,
    "torchvision/alexnet": partial(vision, "alexnet", 16, 64),
    "torchvision/convnext": vision_convnext,
    "torchvision/densenet": vision_densenet,
    "torchvision/efficientnet": vision_efficientnet,
    "torchvision/efficientnet_v2": vision_efficientnet_v2,
    "torchvision/googlenet": partial(vision, "googlenet", 8, init_weights=False),
    "torchvision/inception_v3": partial(vision, "inception_v3", 16, 75, init_weights=False, aux_logits=False),
    "torchvision/maxvit": vision_maxvit,
    "torchvision/mnasnet": vision_mnasnet,
    "torchvision/mobilenet_v2": vision_mobilenet_v2,
    "torchvision/mobilenet_v3": vision_mobilenet_v3,
    "torchvision/regnet": vision_regnet,
    "torchvision/resnet": partial(vision, "resnet18", 8),
    "torchvision/resnext": vision_resnext,
    "torchvision/shufflenet": vision_shufflenet,
    "torchvision/squeezenet": partial(vision, "squeezenet1_1", 4),
    "torchvision/swin": partial(vision_swin, 1),
    "torchvision/swin_v2": partial(vision_swin, 2),
    "torchvision/vgg": partial(vision, "vgg11_bn", 16),
    "torchvision/vit": vision_vit,
    "timm/levit": partial(
        timm_net, "levit_128s", 96, img_size=96, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 2, 2), depth=(1, 1, 1)
    ),
    "timm/efficientvit_m": partial(
        timm_net, "efficientvit_m0", 96, img_size=96, embed_dim=(16, 24, 32), depth=(1, 1, 1), num_heads=(2, 2, 2),
        key_dim=(4, 4, 4),
    ),
    "timm/tiny_vit": partial(
        timm_net, "tiny_vit_5m_224", 64, embed_dims=(8, 16, 16, 24), num_heads=(1, 2, 2, 3), depths=(1, 1, 1, 1),
        window_sizes=(7, 7, 4, 2),
    ),
    "timm/convnext": partial(timm_net, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm/cait": partial(
        timm_net, "cait_xxs24_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, depth_token_only=1
    ),
    "timm/beit": partial(
        timm_net, "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "timm/xcit": partial(timm_net, "xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=2, num_heads=2),
    "timm/coat": partial(
        timm_net, "coat_tiny", img_size=32, embed_dims=(16, 16, 16, 16), serial_depths=(1, 1, 1, 1), parallel_depth=1
    ),
    "timm/deit": partial(
        timm_net, "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "timm/mixer": partial(timm_mixer, "MixerBlock"),
    "timm/resmlp": partial(timm_mixer, "ResBlock"),
    "timm/nfnet": timm_nfnet,
    "timm/resnetv2_bit": timm_resnetv2,
    "timm/poolformer": timm_poolformer,
    "timm/pvt_v2": partial(
        timm_net, "pvt_v2_b0", 64, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)
    ),
    "timm/swin": partial(
        timm_net, "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2),
        num_heads=(1, 2),
    ),
    "timm/vit": partial(
        timm_net, "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ),
    "timm/mobilevit": partial(timm_net, "mobilevit_xxs", 64),
    "timm/crossvit": partial(
        timm_net, "crossvit_tiny_240", 48, img_size=48, img_scale=(1.0, 2 / 3), embed_dim=(8, 16), num_heads=(2, 2),
        depth=((1, 1, 0), (1, 1, 0)),
    ),
    "timm/edgenext": partial(
        timm_net, "edgenext_xx_small", 64, dims=(8, 16, 16, 24), depths=(1, 2, 2, 2), heads=(2, 2, 2, 2)
    ),
    "timm/nest": timm_nest,
    "transformers/bert": partial(encoder, "Bert"),
    "transformers/roberta": partial(encoder, "Roberta", pad=1, pad_token_id=1),
    "transformers/distilbert": partial(encoder, "DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "transformers/albert": partial(encoder, "Albert", embedding_size=8),
    "transformers/electra": partial(encoder, "Electra", embedding_size=8),
    "transformers/deberta_v2": partial(
        encoder, "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
        share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3,
    ),
    "transformers/gpt2": lambda: language(gpt2()),
    "transformers/gpt_neox": partial(decoder, "GPTNeoX"),
    "transformers/llama": partial(decoder, "Llama"),
    "transformers/mistral": partial(decoder, "Mistral", sliding_window=4),
    "transformers/qwen3": partial(decoder, "Qwen3", head_dim=8),
    "transformers/gemma": partial(decoder, "Gemma", head_dim=8),
    "transformers/phi": partial(decoder, "Phi", num_key_value_heads=2),
    "transformers/opt": partial(decoder, "OPT", ffn_dim=32, word_embed_proj_dim=16),
    "transformers/bloom": hf_bloom,
    "transformers/t5": hf_t5,
    "transformers/vit": hf_vit,
    "transformers/wav2vec2": hf_wav2vec2,
    "transformers/mamba": hf_mamba,
    "transformers/whisper": hf_whisper,
    "peft/gpt2_lora": lambda: lora(gpt2(), language, ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "peft/bert_lora": lambda: lora(encoder("Bert").module, text, ["query", "value", "dense"]),
}  # fmt: skip


SINGLE = {f"transformers/{name}" for name in ("llama", "mistral", "qwen3", "gemma", "bloom", "t5", "mamba")}
"""They compute in float32 inside, whatever the type of their parameters."""


def tolerance(name):
    return 1e-4 if name in SINGLE else 1e-9


def case(name):
    """The case of a name, in float64 and evaluation mode, without a number that hides a mistake.

    Weights that are all zeros or ones, and statistics of 0 and 1, are drawn instead; weights far below the usual
    deviation, 1 over the root of the number of inputs, are raised to it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = TABLE[name]()
        with torch.no_grad():
            for p in found.module.parameters():
                usual = 1 / math.sqrt(max(1, p[0].numel())) if p.dim() > 1 else 1.0
                if p.numel() > 1 and p.min() == p.max():
                    p.add_(torch.randn_like(p), alpha=0.3 * usual)
                elif p.dim() > 1 and p.square().mean().sqrt() < 0.3 * usual:
                    p.mul_(usual / p.square().mean().sqrt())
            for layer in found.module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.running_mean.normal_(-0.3, 0.3)  # few dead channels behind it
                    layer.running_var.uniform_(0.5, 1.5)
    found.module.double().eval()
    return found


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def loop(case):
    """{name: (B, *w)} by `torch.autograd.grad` of the module as it is, one example after another.

    Each example is there twice, as torch's backward pass of a batch norm of one image is wrong for a cotangent that
    is a transposed view. The loss is of the first.
    """
    rows = []
    for i in range(B):
        module = copy.deepcopy(case.module)  # some keep tensors of a forward for the next
        params = trained(module)
        args = [x[[i, i]] for x in case.args]
        named = {name: x[[i, i]] for name, x in case.named.items()}
        output = module(*args, **named)
        first = pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) and x.dim() else x, output)
        loss = case.loss_fn(first, case.targets[i])
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params.values(), strict=True)])
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(params)}


def pure(case):
    """`(loss_fn, params, batch)` for `per_sample`."""
    params, model = models.from_module(case.module)
    count, names = len(case.args), list(case.named)

    def loss_fn(params, *example):
        *inputs, target = example
        named = dict(zip(names, inputs[count:], strict=True))
        return case.loss_fn(model.apply(params, *inputs[:count], **named), target)

    return loss_fn, params, (*case.args, *case.named.values(), case.targets)


def error(found, expected):
    """The largest difference over the largest number of its tensor, or over a 1000th of the largest of all."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(y.abs().max()) for y in expected.values())
    worst = 0.0
    for name, y in expected.items():
        x = found[name].detach()
        if x.shape != y.shape or x.isfinite().logical_not().any():
            return math.inf
        worst = max(worst, float((x - y).abs().max()) / max(float(y.abs().max()), floor))
    return worst


def errors(loss_fn, params, batch, rows):
    """{quantity: its error} against the loop's gradients."""
    norms = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    max_norm = 0.9 * float(norms.median())
    weights = (max_norm / norms).clamp(max=1)
    clipped = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=max_norm).grads
    second = per_sample.second_moment(loss_fn, params, *batch)
    return {
        "norms": error({"": per_sample.norms(loss_fn, params, *batch)}, {"": norms}),
        "clipped_sum": error(clipped, {name: torch.einsum("b,b...->...", weights, g) for name, g in rows.items()}),
        "second_moment": error(second, {name: g.square().sum(0) for name, g in rows.items()}),
    }


def factored_share(plan, rows):
    """The share of the numbers of used parameters, those with a gradient, that are not taken densely."""
    used = [(row, g[0].numel()) for row, g in zip(plan.rows, rows.values(), strict=True) if row.ops and g.any()]
    return sum(count for row, count in used if row.way != "dense") / sum(count for _, count in used)


def planned(loss_fn, params, batch):
    return per_sample.plan(loss_fn, params, *[rows[0] for rows in batch], batch_size=B)


def check(name):
    """One architecture's verdict and numbers, as text: exact, wrong, or error. It raises nothing."""
    start = time.perf_counter()
    try:
        found = case(name)
        rows = loop(found)
        problem = pure(found)
        worst = errors(*problem, rows)
        plan = planned(*problem)
        wrong = {quantity: value for quantity, value in worst.items() if not value <= tolerance(name)}
        verdict = "wrong" if wrong else "exact"
        numbers = " ".join(
            f"{quantity} {value:.0e}" for quantity, value in (wrong or {"": max(worst.values())}).items()
        )
        text = f"{numbers.strip()}  factored {factored_share(plan, rows):.1%}  slow {', '.join(plan.slow) or 'none'}"
    except Exception as fault:
        verdict, text = "error", f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:150]
    return verdict, text, time.perf_counter() - start


def main(parts):
    """Prints a line for each architecture whose name holds one of the parts, and a summary."""
    torch.set_num_threads(1)
    verdicts, total = Counter(), 0.0
    for name in TABLE:
        if not parts or any(part in name for part in parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict, text, seconds = check(name)
            print(f"{name:<30} {verdict} {seconds:5.1f} s  {text}", flush=True)  # noqa: T201
            verdicts[verdict] += 1
            total += seconds
    print(f"{dict(verdicts)} in {total:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])

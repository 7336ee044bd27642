"""Names and shapes that PyTorch gives some tensors of the networks."""

# A few tensors as PyTorch has them, of one network by class.
NAMES = {
    "resnet18": {"layer2.0.downsample.1.running_var": (128,), "fc.weight": (1000, 512)},
    "vit_tiny_patch16_224": {
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "blocks.11.attn.qkv.weight": (576, 192),
        "blocks.0.norm1.weight": (192,),
    },
    "beit_base_patch16_224": {
        "blocks.11.attn.relative_position_bias_table": (732, 12),
        "blocks.0.attn.v_bias": (768,),
        "blocks.0.gamma_1": (768,),
        "fc_norm.weight": (768,),
    },
    "vit_small_patch16_dinov3": {
        "reg_token": (1, 4, 384),
        "blocks.11.gamma_2": (384,),
        "norm.bias": (384,),
    },
    "eva02_base_patch14_224": {
        "blocks.3.mlp.fc1_g.weight": (2048, 768),
        "blocks.0.attn.q_proj.bias": (768,),
    },
    "swin_tiny_patch4_window7_224": {
        "layers.1.downsample.reduction.weight": (192, 384),
        "layers.2.blocks.5.attn.relative_position_bias_table": (169, 12),
        "head.fc.bias": (1000,),
    },
    "regnety_004": {
        "s1.b1.conv1.conv.weight": (48, 32, 1, 1),
        "s4.b1.se.fc1.bias": (52,),
        "head.fc.weight": (1000, 440),
    },
    "ghostnet_100": {
        "blocks.0.0.ghost1.primary_conv.0.weight": (8, 16, 1, 1),
        "classifier.bias": (1000,),
    },
    "repvgg_a0": {
        "stem.conv_1x1.conv.weight": (48, 3, 1, 1),
        "stages.2.13.conv_kxk.bn.running_var": (192,),
        "stages.2.13.identity.weight": (192,),
        "head.fc.weight": (1000, 1280),
    },
    "swinv2_tiny_window8_256": {
        "layers.0.blocks.1.attn.q_bias": (96,),
        "layers.2.blocks.5.attn.logit_scale": (12, 1, 1),
        "layers.3.blocks.0.attn.cpb_mlp.2.weight": (24, 512),
    },
    "efficientnet_b0": {
        "blocks.1.0.se.conv_reduce.weight": (4, 96, 1, 1),
        "blocks.1.0.conv_dw.weight": (96, 1, 3, 3),
        "blocks.6.0.bn3.running_mean": (320,),
    },
    "mobilenetv2_100": {
        "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "classifier.weight": (1000, 1280),
    },
    "tf_efficientnetv2_b0": {
        "blocks.0.0.conv.weight": (16, 32, 3, 3),
        "blocks.1.0.conv_exp.weight": (64, 16, 3, 3),
        "blocks.5.7.se.conv_expand.bias": (1152,),
    },
    "mobilenetv3_small_100": {
        "blocks.5.0.bn1.running_var": (576,),
        "conv_head.weight": (1024, 576, 1, 1),
        "conv_head.bias": (1024,),
    },
    "mobilenetv4_hybrid_medium": {
        "blocks.2.4.attn.key.down_conv.weight": (160, 1, 3, 3),
        "blocks.2.4.attn.query.proj.weight": (256, 160, 1, 1),
        "blocks.2.4.layer_scale.gamma": (160,),
        "blocks.3.0.dw_start.bn.running_mean": (160,),
        "norm_head.weight": (1280,),
    },
    "legacy_xception": {"block1.rep.0.conv1.weight": (64, 1, 3, 3), "bn4.bias": (2048,)},
    "inception_v3": {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.bn.weight": (64,),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "AuxLogits.conv0.conv.weight": (128, 768, 1, 1),
    },
    "convnext_atto": {
        "stem.1.weight": (40,),
        "stages.1.downsample.1.weight": (80, 40, 2, 2),
        "stages.0.blocks.1.mlp.fc1.weight": (160, 40, 1, 1),
        "stages.0.blocks.1.gamma": (40,),
        "head.fc.weight": (1000, 320),
    },
    "mixer_b16_224": {
        "stem.proj.weight": (768, 3, 16, 16),
        "blocks.11.mlp_tokens.fc1.weight": (384, 196),
        "blocks.0.mlp_channels.fc2.weight": (768, 3072),
    },
    "resnet8": {"layer3.0.downsample.0.weight": (64, 32, 1, 1)},
    "wrn_16_2": {"block1.layer.0.convShortcut.weight": (32, 16, 1, 1)},
    "vgg8": {"block0.0.bias": (64,), "block4.1.running_mean": (512,), "classifier.bias": (100,)},
}

